#include "cpu/ensemble.h"

#include <algorithm>

#include "cpu/threads.h"
#include "tensor_view.h"
#include "workspace.h"

namespace parl::bindings {
namespace {

// Up to so many rows, packing the weights costs more than it saves.
constexpr std::int64_t kFewRows = 4;

template <typename T>
struct Call {
    cpu::Ensemble<T> ensemble{};
    TensorView weight_views[cpu::kEnsembleMaxLayers], bias_views[cpu::kEnsembleMaxLayers];
    std::int64_t num_params = 0;  // of one member

    // widths: of the inputs and all layers.
    Call(std::int64_t members, const py::list& weights, const py::list& biases, const py::list& widths) {
        if (members < 1) throw py::value_error("members must be at least 1, got " + std::to_string(members));
        const std::size_t layers = weights.size();
        if (layers < 1 || layers > cpu::kEnsembleMaxLayers) {
            throw py::value_error("weights must be of 1 to " + std::to_string(cpu::kEnsembleMaxLayers) +
                                  " layers, got " + std::to_string(layers));
        }
        if (biases.size() != layers) throw py::value_error("biases must be as many as weights");
        if (widths.size() != layers + 1) throw py::value_error("widths must be one more than weights");
        ensemble.members = members;
        ensemble.num_layers = static_cast<int>(layers);
        for (std::size_t l = 0; l <= layers; ++l) {
            ensemble.widths[l] = widths[l].cast<std::int64_t>();
            if (ensemble.widths[l] < 1) throw py::value_error("widths must be positive");
        }
        if (ensemble.widths[layers] != 1) throw py::value_error("widths must end in one output");
        for (std::size_t l = 0; l < layers; ++l) {
            const std::int64_t inputs = ensemble.widths[l], outputs = ensemble.widths[l + 1];
            weight_views[l] = view(weights[l], "weights", {members, inputs, outputs});
            bias_views[l] = view(biases[l], "biases", {members, 1, outputs});
            ensemble.weights[l] = weight_views[l].template as<T>();
            ensemble.biases[l] = bias_views[l].template as<T>();
            num_params += (inputs + 1) * outputs;
        }
    }

    static T* values(py::handle tensor, std::int64_t size, const char* name) {
        const TensorView view = view_contiguous(tensor, name);
        require(view, kDTypeOf<T>, size, name);
        return view.as<T>();
    }

    static TensorView view(py::handle tensor, const char* name, std::initializer_list<std::int64_t> shape) {
        const TensorView found = view_contiguous(tensor, name);
        require(found, kDTypeOf<T>, found.size, name);
        require_shape(tensor, name, shape);
        return found;
    }

    // A gradient, which shares no memory with the parameters.
    T* gradient(py::handle tensor, const char* name, std::initializer_list<std::int64_t> shape) const {
        const TensorView found = view(tensor, name, shape);
        for (int l = 0; l < ensemble.num_layers; ++l) {
            require_disjoint(found, name, weight_views[l], "weights");
            require_disjoint(found, name, bias_views[l], "biases");
        }
        return found.as<T>();
    }

    cpu::EnsembleGradients<T> gradients(const py::list& weights, const py::list& biases) const {
        const auto layers = static_cast<std::size_t>(ensemble.num_layers);
        if (weights.size() != layers || biases.size() != layers) {
            throw py::value_error("gradients must be as many as weights and biases");
        }
        cpu::EnsembleGradients<T> out{};
        for (std::size_t l = 0; l < layers; ++l) {
            const std::int64_t inputs = ensemble.widths[l], outputs = ensemble.widths[l + 1];
            out.weights[l] = gradient(weights[l], "weight_gradients", {ensemble.members, inputs, outputs});
            out.biases[l] = gradient(biases[l], "bias_gradients", {ensemble.members, 1, outputs});
        }
        return out;
    }

    // (rows, inputs) for all members, or (members, rows, inputs).
    cpu::EnsembleInputs<T> inputs(py::handle tensor, std::int64_t rows) const {
        const TensorView view = view_contiguous(tensor, "inputs");
        const std::int64_t shared = rows * ensemble.widths[0];
        const bool is_shared = view.size == shared;
        require(view, kDTypeOf<T>, is_shared ? shared : ensemble.members * shared, "inputs");
        return {view.as<T>(), rows, is_shared ? 0 : shared};
    }

    // As many threads as have enough to do, and never more than there are things to divide.
    int threads(std::int64_t rows, std::int64_t things, int num_threads) const {
        const double work = static_cast<double>(rows * ensemble.members * num_params);
        return cpu::threads_worth(work,
                                  std::min<std::int64_t>({things, num_threads, cpu::kEnsembleMaxThreads}));
    }

    T* workspace(std::int64_t pair_length, int num_threads) const {
        static thread_local Workspace<T> memory;
        std::vector<std::int64_t> shape{ensemble.members, pair_length};
        shape.insert(shape.end(), ensemble.widths, ensemble.widths + ensemble.num_layers + 1);
        return memory.resize(PARL_DISPATCH(ensemble_workspace(ensemble, pair_length, num_threads)), shape);
    }
};

template <typename T>
void forward(std::int64_t members, const py::list& weights, const py::list& biases, const py::list& widths,
             py::handle inputs_tensor, py::handle rewards_tensor, int num_threads) {
    check_threads(num_threads);
    const Call<T> call(members, weights, biases, widths);
    const TensorView rewards = view_contiguous(rewards_tensor, "rewards");
    const std::int64_t rows = rewards.size / members;
    require(rewards, kDTypeOf<T>, members * rows, "rewards");
    const cpu::EnsembleInputs<T> inputs = call.inputs(inputs_tensor, rows);
    const py::gil_scoped_release release;
    if (rows <= kFewRows) {
        const auto& ensemble = call.ensemble;
        const std::int64_t widest =
            *std::max_element(ensemble.widths, ensemble.widths + ensemble.num_layers + 1);
        std::vector<T> scratch(static_cast<std::size_t>(2 * widest));
        PARL_DISPATCH(ensemble_forward_few(ensemble, inputs, scratch.data(), rewards.as<T>()));
        return;
    }
    const int threads = call.threads(rows, rows, num_threads);
    T* const workspace = call.workspace(0, threads);
    PARL_DISPATCH(ensemble_forward(call.ensemble, inputs, workspace, threads, rewards.as<T>()));
}

template <typename T>
void backward(std::int64_t members, const py::list& weights, const py::list& biases, const py::list& widths,
              py::handle inputs_tensor, py::handle cotangents_tensor, const py::list& weight_gradients,
              const py::list& bias_gradients, py::handle input_gradients_tensor, int num_threads) {
    check_threads(num_threads);
    const Call<T> call(members, weights, biases, widths);
    const TensorView cotangents = view_contiguous(cotangents_tensor, "cotangents");
    const std::int64_t rows = cotangents.size / members;
    require(cotangents, kDTypeOf<T>, members * rows, "cotangents");
    if (rows < 1) throw py::value_error("cotangents must have at least one row");
    const cpu::EnsembleInputs<T> inputs = call.inputs(inputs_tensor, rows);
    const cpu::EnsembleGradients<T> gradients = call.gradients(weight_gradients, bias_gradients);
    T* const input_gradients = input_gradients_tensor.is_none()
                                   ? nullptr
                                   : call.values(input_gradients_tensor,
                                                 members * rows * call.ensemble.widths[0], "input_gradients");
    const py::gil_scoped_release release;
    const int threads = call.threads(4 * rows, rows, num_threads);
    T* const workspace = call.workspace(0, threads);
    PARL_DISPATCH(ensemble_backward(call.ensemble, inputs, cotangents.as<T>(), workspace, threads, gradients,
                                    input_gradients));
}

template <typename T>
double preference_gradient(std::int64_t members, const py::list& weights, const py::list& biases,
                           const py::list& widths, py::handle steps_tensor, py::handle starts_tensor,
                           py::handle lengths_tensor, py::handle labels_tensor, py::handle offsets_tensor,
                           std::int64_t batch_size, const py::list& weight_gradients,
                           const py::list& bias_gradients, py::handle logits_tensor, int num_threads) {
    check_threads(num_threads);
    const Call<T> call(members, weights, biases, widths);
    const std::int64_t columns = call.ensemble.widths[0];
    const TensorView steps = view_contiguous(steps_tensor, "steps");
    const TensorView starts = view_contiguous(starts_tensor, "starts");
    const TensorView lengths = view_contiguous(lengths_tensor, "lengths");
    const TensorView labels = view_contiguous(labels_tensor, "labels");
    const TensorView offsets = view_contiguous(offsets_tensor, "offsets");
    const std::int64_t num_pairs = labels.size, num_rows = steps.size / columns;
    require(steps, kDTypeOf<T>, num_rows * columns, "steps");
    require(labels, kDTypeOf<T>, num_pairs, "labels");
    require(starts, DType::kInt64, 2 * num_pairs, "starts");
    require(lengths, DType::kInt64, num_pairs, "lengths");
    require(offsets, DType::kInt64, members + 1, "offsets");
    if (batch_size < 1) throw py::value_error("batch_size must be at least 1");
    const auto *const first = starts.as<std::int64_t>(), *const length = lengths.as<std::int64_t>();
    std::int64_t longest = 1, total = 0;
    for (std::int64_t m = 0; m < num_pairs; ++m) {
        if (length[m] < 1 || length[m] > num_rows) {
            throw py::value_error("lengths must lie in [1, " + std::to_string(num_rows) + "], got " +
                                  std::to_string(length[m]));
        }
        for (int side = 0; side < 2; ++side) {
            const std::int64_t start = first[2 * m + side];
            if (start < 0 || start > num_rows - length[m]) {
                throw py::value_error("starts must lie in [0, " + std::to_string(num_rows - length[m]) +
                                      "] for " + std::to_string(length[m]) + " rows, got " +
                                      std::to_string(start));
            }
        }
        longest = std::max(longest, length[m]);
        total += 2 * length[m];
    }
    const auto* const bounds = offsets.as<std::int64_t>();
    if (bounds[0] != 0 || bounds[members] != num_pairs || !std::is_sorted(bounds, bounds + members + 1)) {
        throw py::value_error("offsets must rise from 0 to the number of pairs, " +
                              std::to_string(num_pairs));
    }
    const cpu::EnsembleGradients<T> gradients = call.gradients(weight_gradients, bias_gradients);
    T* const logits = call.values(logits_tensor, num_pairs, "logits");
    const cpu::EnsemblePairs<T> pairs{steps.as<T>(),  first,  length,    longest,
                                      labels.as<T>(), bounds, batch_size};
    const py::gil_scoped_release release;
    const int threads =
        call.threads(3 * total / members, std::max<std::int64_t>(num_pairs / members, 1), num_threads);
    T* const workspace = call.workspace(longest, threads);
    return PARL_DISPATCH(
        ensemble_preference_gradient(call.ensemble, pairs, workspace, threads, gradients, logits));
}

// Calls the function for the dtype of the first weight.
template <typename Float, typename Double, typename... Arguments>
auto by_dtype(Float run_float, Double run_double, std::int64_t members, const py::list& weights,
              Arguments&&... arguments) {
    if (weights.empty()) throw py::value_error("weights must be of one layer or more");
    const TensorView first = view_contiguous(weights[0], "weights");
    require_floating(first, "weights");
    return first.dtype == DType::kFloat32 ? run_float(members, weights, arguments...)
                                          : run_double(members, weights, arguments...);
}

}  // namespace

void bind_ensemble(py::module_& module) {
    module.attr("ensemble_max_layers") = cpu::kEnsembleMaxLayers;
    module.def(
        "ensemble_forward",
        [](std::int64_t members, const py::list& weights, const py::list& biases, const py::list& widths,
           py::handle inputs, py::handle rewards, int num_threads) {
            by_dtype(forward<float>, forward<double>, members, weights, biases, widths, inputs, rewards,
                     num_threads);
        },
        py::arg("members"), py::arg("weights"), py::arg("biases"), py::arg("widths"), py::arg("inputs"),
        py::arg("rewards"), py::arg("num_threads"),
        "Writes the rewards (members, T) of inputs (T, in) or (members, T, in).");
    module.def(
        "ensemble_backward",
        [](std::int64_t members, const py::list& weights, const py::list& biases, const py::list& widths,
           py::handle inputs, py::handle cotangents, const py::list& weight_gradients,
           const py::list& bias_gradients, py::handle input_gradients, int num_threads) {
            by_dtype(backward<float>, backward<double>, members, weights, biases, widths, inputs, cotangents,
                     weight_gradients, bias_gradients, input_gradients, num_threads);
        },
        py::arg("members"), py::arg("weights"), py::arg("biases"), py::arg("widths"), py::arg("inputs"),
        py::arg("cotangents"), py::arg("weight_gradients"), py::arg("bias_gradients"),
        py::arg("input_gradients"), py::arg("num_threads"),
        "Writes the gradients of (cotangents * rewards).sum(): of the parameters, and, unless None, of each\n"
        "member's inputs (members, T, in).");
    module.def(
        "ensemble_preference_gradient",
        [](std::int64_t members, const py::list& weights, const py::list& biases, const py::list& widths,
           py::handle steps, py::handle starts, py::handle lengths, py::handle labels, py::handle offsets,
           std::int64_t batch_size, const py::list& weight_gradients, const py::list& bias_gradients,
           py::handle logits, int num_threads) {
            return by_dtype(preference_gradient<float>, preference_gradient<double>, members, weights, biases,
                            widths, steps, starts, lengths, labels, offsets, batch_size, weight_gradients,
                            bias_gradients, logits, num_threads);
        },
        py::arg("members"), py::arg("weights"), py::arg("biases"), py::arg("widths"), py::arg("steps"),
        py::arg("starts"), py::arg("lengths"), py::arg("labels"), py::arg("offsets"), py::arg("batch_size"),
        py::arg("weight_gradients"), py::arg("bias_gradients"), py::arg("logits"), py::arg("num_threads"),
        "The loss of N pairs of stretches of steps (T, in): rows starts (N, 2), lengths (N,), labels (N,);\n"
        "offsets (members + 1,) say which are each member's. Each member's losses are summed and divided by\n"
        "batch_size. Writes logits (N,) and the gradient of the loss.");
}

}  // namespace parl::bindings
