#include "cuda/scan.h"

#include "device_tensor.h"
#include "module.h"

namespace parl::bindings::cuda {
namespace {

using parl::cuda::Segments;

// The trajectories that `offsets` cut the steps into; or, of None, the rows of `tensor`, the argument called `name`,
// whose view is `steps`.
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
    return {view.as<std::int64_t>(), view.size - 1, 0, steps.size};
}

void discounted_scan(py::handle values_tensor, double discount, py::handle offsets, py::handle out_tensor,
                     bool reverse, std::uintptr_t stream) {
    const DeviceTensor values = view_device(values_tensor, "values"), out = view_device(out_tensor, "out");
    require_like(out, "out", values, "values");
    require_disjoint(out, "out", values, "values");
    const Segments segments = segments_of(values_tensor, "values", values, offsets);
    const OnDevice device(values);
    switch (values.dtype) {
        case DType::kFloat32:
            return parl::cuda::discounted_scan(values.as<const float>(), segments, discount, reverse,
                                               out.as<float>(), stream_of(stream));
        case DType::kFloat64:
            return parl::cuda::discounted_scan(values.as<const double>(), segments, discount, reverse,
                                               out.as<double>(), stream_of(stream));
        default:
            throw py::type_error(std::string("values must be float32 or float64, got ") +
                                 dtype_name(values.dtype));
    }
}

}  // namespace

void bind_scan(py::module_& module) {
    module.def(
        "discounted_scan", &discounted_scan, py::arg("values"), py::arg("discount"), py::arg("offsets"),
        py::arg("out"), py::arg("reverse"), py::arg("stream"),
        "Writes the discounted scan of values into out. The trajectories are those of offsets (N+1,), or of "
        "None the rows of values.");
}

}  // namespace parl::bindings::cuda
