#include "linearization.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>

#include "../policy_names.h"
#include "cuda/blas.h"
#include "module.h"

namespace parl::bindings::cuda {
namespace {

using math::Head;
using OptionalTensor = std::optional<py::object>;

template <typename T>
constexpr DType kDeviceDTypeOf = sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64;

std::int64_t rows_of(py::handle tensor, const char* name) {
    require_tensor(tensor, name);
    const py::tuple shape(attribute(tensor, torch_names().shape));
    if (shape.empty()) throw py::value_error(std::string(name) + " must have at least one dimension, got 0");
    return shape[0].cast<std::int64_t>();
}

// A contiguous tensor of `size` elements on the device of the parameters.
template <typename E>
E* data(py::handle tensor, const char* name, DType dtype, std::int64_t size, const DeviceTensor& params) {
    const DeviceTensor view = view_device(tensor, name);
    require(view, name, dtype, size, params, "params");
    return view.as<E>();
}

// What `allocate` gives when asked for `size` elements.
template <typename T>
std::pair<py::object, T*> allocated(const py::function& allocate, std::int64_t size,
                                    const DeviceTensor& params) {
    py::object memory = allocate(size);
    T* const pointer = data<T>(memory, "allocate(size)", kDeviceDTypeOf<T>, size, params);
    return {std::move(memory), pointer};
}

template <typename T>
BoundLinearization<T> make(const std::vector<std::int64_t>& widths, const std::string& activation,
                           const std::string& head_name, bool squash, py::handle params,
                           const OptionalTensor& log_std, py::handle observations, py::handle actions,
                           py::handle offsets, bool allow_tf32, const py::function& allocate,
                           std::uintptr_t stream) {
    if (widths.size() < 2) throw py::value_error("widths must have at least two elements");
    const Head head = named(kHeads, head_name, "head");
    std::int64_t num_params = head == Head::kGaussianGlobal ? widths.back() : 0;
    for (std::size_t l = 0; l < widths.size(); ++l) {
        if (widths[l] < 1) throw py::value_error("widths must be positive, got " + std::to_string(widths[l]));
        if (l > 0) num_params += (widths[l - 1] + 1) * widths[l];
    }
    if (head == Head::kGaussianState && widths.back() % 2 != 0) {
        throw py::value_error("widths must end with an even number for head 'state', got " +
                              std::to_string(widths.back()));
    }
    if (log_std.has_value() != (head == Head::kGaussianFixed)) {
        throw py::value_error("log_std must be given for head 'fixed', and for no other");
    }
    constexpr DType kDType = kDeviceDTypeOf<T>;
    const DeviceTensor flat = view_device(params, "params");
    require(flat, "params", kDType, num_params, flat, "params");
    parl::cuda::Policy<T> policy{};
    policy.widths = widths.data();
    policy.num_layers = static_cast<int>(widths.size()) - 1;
    policy.activation = named(kActivations, activation, "activation");
    policy.head = head;
    policy.squash = squash;
    policy.params = flat.as<T>();
    if (log_std) policy.log_std = data<T>(*log_std, "log_std", kDType, widths.back(), flat);

    parl::cuda::Steps<T> steps{};
    const std::int64_t num_steps = rows_of(observations, "observations");
    const std::int64_t num_offsets = rows_of(offsets, "offsets");
    if (num_offsets < 1) throw py::value_error("offsets must have at least one element, got none");
    steps.trajectories = {data<std::int64_t>(offsets, "offsets", DType::kInt64, num_offsets, flat),
                          num_offsets - 1, num_steps};
    steps.observations = data<T>(observations, "observations", kDType, num_steps * widths.front(), flat);
    if (head == Head::kCategorical) {
        steps.indices = data<std::int64_t>(actions, "actions", DType::kInt64, num_steps, flat);
    } else {
        const std::int64_t action_dim = head == Head::kGaussianState ? widths.back() / 2 : widths.back();
        steps.actions = data<T>(actions, "actions", kDType, num_steps * action_dim, flat);
    }
    const OnDevice on_device(flat);
    auto [memory, pointer] =
        allocated<T>(allocate, parl::cuda::MlpLinearization<T>::memory_size(policy, steps), flat);
    auto shared = std::make_shared<SharedLinearization<T>>();
    shared->params = flat;
    for (const py::handle tensor : {params, observations, actions, offsets, py::handle(memory)}) {
        shared->tensors.push_back(py::reinterpret_borrow<py::object>(tensor));
    }
    if (log_std) shared->tensors.push_back(*log_std);
    shared->native = std::make_unique<parl::cuda::MlpLinearization<T>>(policy, steps, allow_tf32, pointer,
                                                                       stream_of(stream));
    return {std::move(shared)};
}

py::object linearize_mlp(const std::vector<std::int64_t>& widths, const std::string& activation,
                         const std::string& head, bool squash, py::handle params,
                         const OptionalTensor& log_std, py::handle observations, py::handle actions,
                         py::handle offsets, bool allow_tf32, const py::function& allocate,
                         std::uintptr_t stream) {
    const DType dtype = view_device(params, "params").dtype;
    if (dtype == DType::kFloat32) {
        return py::cast(make<float>(widths, activation, head, squash, params, log_std, observations, actions,
                                    offsets, allow_tf32, allocate, stream));
    }
    if (dtype == DType::kFloat64) {
        return py::cast(make<double>(widths, activation, head, squash, params, log_std, observations, actions,
                                     offsets, allow_tf32, allocate, stream));
    }
    throw py::type_error("params must be float32 or float64, got " + std::string(dtype_name(dtype)));
}

// Calls function(device pointer of `in`, of `out`), of in_size and out_size elements, on the tensors' device.
template <typename T, typename Function>
void product(const SharedLinearization<T>& shared, py::handle in, const char* in_name, std::int64_t in_size,
             py::handle out, std::int64_t out_size, const Function& function) {
    const DeviceTensor from = view_device(in, in_name), to = view_device(out, "out");
    require(from, in_name, kDeviceDTypeOf<T>, in_size, shared.params, "params");
    require(to, "out", kDeviceDTypeOf<T>, out_size, shared.params, "params");
    require_disjoint(to, "out", from, in_name);
    const OnDevice on_device(shared.params);
    function(from.as<const T>(), to.as<T>());
}

template <typename T>
BoundOperator<T> curvature(const BoundLinearization<T>& self, const OptionalTensor& hessian,
                           const OptionalTensor& fisher, const OptionalTensor& scores, double damping,
                           const py::function& allocate, std::uintptr_t stream) {
    const SharedLinearization<T>& shared = *self.shared;
    const auto weights = [&](const OptionalTensor& tensor, const char* name) {
        return tensor ? data<const T>(*tensor, name, kDeviceDTypeOf<T>, shared.native->num_steps(),
                                      shared.params)
                      : nullptr;
    };
    const parl::cuda::Terms<T> terms{weights(hessian, "hessian"), weights(fisher, "fisher"),
                                     weights(scores, "scores"), static_cast<T>(damping)};
    const OnDevice on_device(shared.params);
    using Native = parl::cuda::MlpCurvature<T>;
    auto [memory, pointer] =
        allocated<T>(allocate, Native::memory_size(*shared.native, terms), shared.params);
    return {self.shared, std::move(memory),
            std::make_unique<Native>(*shared.native, terms, pointer, stream_of(stream))};
}

template <typename T>
void apply(const BoundOperator<T>& self, py::handle v, py::handle out, const OptionalTensor& along,
           std::uintptr_t stream) {
    const SharedLinearization<T>& shared = *self.shared;
    const std::int64_t size = self.native->size();
    T* products = nullptr;
    if (along) {
        const DeviceTensor view = view_device(*along, "along");
        require(view, "along", kDeviceDTypeOf<T>, shared.native->num_steps(), shared.params, "params");
        require_disjoint(view, "along", view_device(v, "v"), "v");
        require_disjoint(view, "along", view_device(out, "out"), "out");
        products = view.as<T>();
    }
    product(shared, v, "v", size, out, size,
            [&](const T* from, T* to) { self.native->apply(from, to, products, stream_of(stream)); });
}

template <typename T>
void apply_block(const BoundOperator<T>& self, py::handle v, py::handle out, std::uintptr_t stream) {
    const std::int64_t count = rows_of(v, "v"), size = self.native->size();
    product(*self.shared, v, "v", count * size, out, count * size, [&](const T* from, T* to) {
        for (std::int64_t k = 0; k < count; ++k) {
            self.native->apply(from + k * size, to + k * size, stream_of(stream));
        }
    });
}

template <typename T>
void bind(py::module_& module, const char* linearization, const char* operator_name) {
    using Bound = BoundLinearization<T>;
    py::class_<Bound>(module, linearization, py::module_local())
        .def_property_readonly("num_params",
                               [](const Bound& self) { return self.shared->native->num_params(); })
        .def(
            "log_prob",
            [](const Bound& self, py::handle out, std::uintptr_t stream) {
                const auto& native = *self.shared->native;
                T* const to = data<T>(out, "out", kDeviceDTypeOf<T>, native.num_steps(), self.shared->params);
                const OnDevice on_device(self.shared->params);
                native.copy_log_prob(to, stream_of(stream));
            },
            py::arg("out"), py::arg("stream"))
        .def(
            "jvp",
            [](const Bound& self, py::handle v, py::handle out, std::uintptr_t stream) {
                const auto& native = *self.shared->native;
                product(*self.shared, v, "v", native.num_params(), out, native.num_steps(),
                        [&](const T* from, T* to) { native.jvp(from, to, stream_of(stream)); });
            },
            py::arg("v"), py::arg("out"), py::arg("stream"))
        .def(
            "vjp",
            [](const Bound& self, py::handle w, py::handle out, std::uintptr_t stream) {
                const auto& native = *self.shared->native;
                product(*self.shared, w, "w", native.num_steps(), out, native.num_params(),
                        [&](const T* from, T* to) { native.vjp(from, to, stream_of(stream)); });
            },
            py::arg("w"), py::arg("out"), py::arg("stream"))
        .def(
            "scores",
            [](const Bound& self, py::handle w, py::handle out, std::uintptr_t stream) {
                const auto& native = *self.shared->native;
                product(*self.shared, w, "w", native.num_steps(), out,
                        native.num_trajectories() * native.num_params(),
                        [&](const T* from, T* to) { native.scores(from, to, stream_of(stream)); });
            },
            py::arg("w"), py::arg("out"), py::arg("stream"))
        .def("curvature", &curvature<T>, py::arg("hessian"), py::arg("fisher"), py::arg("scores"),
             py::arg("damping"), py::arg("allocate"), py::arg("stream"));
    py::class_<BoundOperator<T>>(module, operator_name, py::module_local())
        .def("apply", &apply<T>, py::arg("v"), py::arg("out"), py::arg("along"), py::arg("stream"))
        .def("apply_block", &apply_block<T>, py::arg("v"), py::arg("out"), py::arg("stream"));
}

}  // namespace

void bind_linearization(py::module_& module) {
    bind<float>(module, "MlpLinearizationFloat32", "MlpCurvatureFloat32");
    bind<double>(module, "MlpLinearizationFloat64", "MlpCurvatureFloat64");
    module.def("load_blas", &parl::cuda::load_blas, py::arg("cuda_version"),
               "Looks for the cuBLAS of torch's CUDA; RuntimeError where there is none.");
    module.def(
        "linearize_mlp", &linearize_mlp, py::arg("widths"), py::arg("activation"), py::arg("head"),
        py::arg("squash"), py::arg("params"), py::arg("log_std"), py::arg("observations"), py::arg("actions"),
        py::arg("offsets"), py::arg("allow_tf32"), py::arg("allocate"), py::arg("stream"),
        "A policy's log-probabilities linearised: see parl_core.hypergrad.cuda_linearize. "
        "allocate(size) gives the device memory, a tensor of the parameters' dtype, that it computes in.");
}

}  // namespace parl::bindings::cuda
