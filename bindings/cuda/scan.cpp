#include "cuda/scan.h"

#include <cuda_bf16.h>

#include "device_tensor.h"
#include "module.h"

namespace parl::bindings::cuda {
namespace {

using parl::cuda::ScanWorkspace;
using parl::cuda::Segments;

// The trajectories that `offsets` cut the steps into; or, of None, the rows of `tensor`, the argument called `name`,
// whose view is `steps`. What offsets hold is on the device, and not looked at.
Segments segments_of(py::handle tensor, const char* name, const DeviceTensor& steps, py::handle offsets) {
    if (offsets.is_none()) {
        const py::tuple shape(attribute(tensor, torch_names().shape));
        if (shape.empty())
            throw py::value_error(std::string(name) + " must have one dimension or more, got 0");
        const auto horizon = shape[shape.size() - 1].cast<std::int64_t>();
        return {nullptr, horizon == 0 ? 0 : steps.size / horizon, horizon, steps.size};
    }
    const DeviceTensor view = view_device(offsets, "offsets");
    if (view.size < 1) throw py::value_error("offsets must have at least one element, got none");
    require(view, "offsets", DType::kInt64, view.size, steps, name);
    return {view.as<const std::int64_t>(), view.size - 1, 0, steps.size};
}

ScanWorkspace workspace_of(py::handle tensor, const DeviceTensor& steps, const char* name) {
    if (tensor.is_none()) return {nullptr, 0};
    const DeviceTensor view = view_device(tensor, "workspace");
    require(view, "workspace", DType::kUInt8, view.size, steps, name);
    const std::size_t needed = parl::cuda::tiled_scan_workspace(steps.size);
    const auto bytes = static_cast<std::size_t>(view.size);
    if (bytes < needed) {
        throw py::value_error("workspace must have at least " + std::to_string(needed) + " elements, got " +
                              std::to_string(bytes));
    }
    if (reinterpret_cast<std::uintptr_t>(view.data) % 16 != 0) {
        throw py::value_error("workspace must begin at a multiple of 16 bytes");
    }
    return {view.data, bytes};
}

// An output that shares no memory with `inputs`.
struct Named {
    const DeviceTensor& tensor;
    const char* name;
};
DeviceTensor view_out(py::handle tensor, const char* name, std::initializer_list<Named> inputs) {
    const DeviceTensor out = view_device(tensor, name);
    const Named& first = *inputs.begin();
    require_like(out, name, first.tensor, first.name);
    for (const Named& input : inputs) require_disjoint(out, name, input.tensor, input.name);
    return out;
}

// Calls run(T{}) on the device of `view`, the argument called `name`, T being its dtype.
template <typename Run>
void with_dtype(const DeviceTensor& view, const char* name, Run run) {
    const OnDevice device(view);
    switch (view.dtype) {
        case DType::kFloat32:
            return run(float{});
        case DType::kFloat64:
            return run(double{});
        case DType::kBFloat16:
            return run(__nv_bfloat16{});
        default:
            throw py::type_error(std::string(name) + " must be float32, float64 or bfloat16, got " +
                                 dtype_name(view.dtype));
    }
}

void discounted_scan(py::handle values_tensor, double discount, py::handle offsets, py::handle out_tensor,
                     bool reverse, py::handle workspace, std::uintptr_t stream) {
    const DeviceTensor values = view_device(values_tensor, "values");
    const DeviceTensor out = view_out(out_tensor, "out", {{values, "values"}});
    const Segments segments = segments_of(values_tensor, "values", values, offsets);
    const ScanWorkspace memory = workspace_of(workspace, values, "values");
    with_dtype(values, "values", [&](auto zero) {
        using T = decltype(zero);
        parl::cuda::discounted_scan(values.as<const T>(), segments, discount, reverse, out.as<T>(), memory,
                                    stream_of(stream));
    });
}

void linear_recurrence(py::handle values_tensor, py::handle coefficients_tensor, py::handle offsets,
                       py::handle out_tensor, bool reverse, py::handle workspace, std::uintptr_t stream) {
    const DeviceTensor values = view_device(values_tensor, "values");
    const DeviceTensor coefficients = view_device(coefficients_tensor, "coefficients");
    require_like(coefficients, "coefficients", values, "values");
    const DeviceTensor out =
        view_out(out_tensor, "out", {{values, "values"}, {coefficients, "coefficients"}});
    const Segments segments = segments_of(values_tensor, "values", values, offsets);
    const ScanWorkspace memory = workspace_of(workspace, values, "values");
    with_dtype(values, "values", [&](auto zero) {
        using T = decltype(zero);
        parl::cuda::linear_recurrence(values.as<const T>(), coefficients.as<const T>(), segments, reverse,
                                      out.as<T>(), memory, stream_of(stream));
    });
}

// Rewards, values and bootstrap, one per trajectory or None.
struct ReturnsView {
    DeviceTensor rewards, values, bootstrap;
    Segments segments;
    double discount, trace_lambda;

    ReturnsView(py::handle rewards_tensor, py::handle values_tensor, py::handle bootstrap_tensor,
                py::handle offsets, double discount_, double trace_lambda_)
        : rewards(view_device(rewards_tensor, "rewards")),
          values(view_device(values_tensor, "values")),
          bootstrap{},
          segments(segments_of(rewards_tensor, "rewards", rewards, offsets)),
          discount(discount_),
          trace_lambda(trace_lambda_) {
        require_like(values, "values", rewards, "rewards");
        if (bootstrap_tensor.is_none()) return;
        bootstrap = view_device(bootstrap_tensor, "bootstrap");
        // Of rows without steps nobody asks how many there are.
        const std::int64_t count = segments.steps == 0 ? bootstrap.size : segments.count;
        require(bootstrap, "bootstrap", rewards.dtype, count, rewards, "rewards");
    }

    template <typename T>
    parl::cuda::Returns<T> as() const {
        return {rewards.as<const T>(), values.as<const T>(), bootstrap.as<const T>(), discount, trace_lambda};
    }
};

void lambda_returns(py::handle rewards, py::handle values, py::handle bootstrap, py::handle offsets,
                    py::handle out_tensor, double discount, double trace_lambda, bool add_values,
                    py::handle workspace, std::uintptr_t stream) {
    const ReturnsView view(rewards, values, bootstrap, offsets, discount, trace_lambda);
    const DeviceTensor out =
        view_out(out_tensor, "out",
                 {{view.rewards, "rewards"}, {view.values, "values"}, {view.bootstrap, "bootstrap"}});
    const ScanWorkspace memory = workspace_of(workspace, view.rewards, "rewards");
    with_dtype(view.rewards, "rewards", [&](auto zero) {
        using T = decltype(zero);
        parl::cuda::lambda_returns(view.as<T>(), view.segments, add_values, out.as<T>(), memory,
                                   stream_of(stream));
    });
}

void vtrace(py::handle log_ratios_tensor, py::handle rewards, py::handle values, py::handle bootstrap,
            py::handle offsets, py::handle targets_tensor, py::handle advantages_tensor, double discount,
            double trace_lambda, double rho_clip, double c_clip, py::handle workspace,
            std::uintptr_t stream) {
    const ReturnsView view(rewards, values, bootstrap, offsets, discount, trace_lambda);
    const DeviceTensor log_ratios = view_device(log_ratios_tensor, "log_ratios");
    require_like(log_ratios, "log_ratios", view.rewards, "rewards");
    const Named first{view.rewards, "rewards"}, second{view.values, "values"},
        third{view.bootstrap, "bootstrap"};
    const Named fourth{log_ratios, "log_ratios"};
    const DeviceTensor targets = view_out(targets_tensor, "targets", {first, second, third, fourth});
    const Named fifth{targets, "targets"};
    const DeviceTensor advantages =
        view_out(advantages_tensor, "advantages", {first, second, third, fourth, fifth});
    const ScanWorkspace memory = workspace_of(workspace, view.rewards, "rewards");
    with_dtype(view.rewards, "rewards", [&](auto zero) {
        using T = decltype(zero);
        parl::cuda::vtrace(view.as<T>(), log_ratios.as<const T>(), {rho_clip, c_clip}, view.segments,
                           targets.as<T>(), advantages.as<T>(), memory, stream_of(stream));
    });
}

}  // namespace

void bind_scan(py::module_& module) {
    module.def("scan_workspace", &parl::cuda::scan_workspace, py::arg("steps"), py::arg("count"),
               "How many bytes of workspace a scan of so many steps in so many trajectories should be given; "
               "0: none.");
    module.def("tiled_scan_workspace", &parl::cuda::tiled_scan_workspace, py::arg("steps"),
               "How many bytes a scan needs that is given any: it then goes by tiles of the array.");
    module.def(
        "discounted_scan", &discounted_scan, py::arg("values"), py::arg("discount"), py::arg("offsets"),
        py::arg("out"), py::arg("reverse"), py::arg("workspace"), py::arg("stream"),
        "Writes the discounted scan of values into out. The trajectories are those of offsets (N+1,), or of "
        "None the rows of values.");
    module.def("linear_recurrence", &linear_recurrence, py::arg("values"), py::arg("coefficients"),
               py::arg("offsets"), py::arg("out"), py::arg("reverse"), py::arg("workspace"),
               py::arg("stream"),
               "Writes the recurrence of values with a coefficient for every step into out.");
    module.def("lambda_returns", &lambda_returns, py::arg("rewards"), py::arg("values"), py::arg("bootstrap"),
               py::arg("offsets"), py::arg("out"), py::arg("discount"), py::arg("trace_lambda"),
               py::arg("add_values"), py::arg("workspace"), py::arg("stream"),
               "Writes generalized advantage estimates, with the values added if `add_values`, into out.");
    module.def("vtrace", &vtrace, py::arg("log_ratios"), py::arg("rewards"), py::arg("values"),
               py::arg("bootstrap"), py::arg("offsets"), py::arg("targets"), py::arg("advantages"),
               py::arg("discount"), py::arg("trace_lambda"), py::arg("rho_clip"), py::arg("c_clip"),
               py::arg("workspace"), py::arg("stream"), "Writes V-trace's value targets and advantages.");
}

}  // namespace parl::bindings::cuda
