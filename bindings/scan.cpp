#include "cpu/scan.h"

#include "tensor_view.h"

namespace parl::bindings {
namespace {

template <typename T>
void run(const TensorView& values, const TensorView& offsets, const TensorView& out, double discount,
         bool reverse, int num_threads) {
    const py::gil_scoped_release release;
    cpu::segmented_scan(values.as<T>(), offsets.as<std::int64_t>(), offsets.size - 1,
                        static_cast<T>(discount), reverse, num_threads, out.as<T>());
}

void scan(py::handle values_tensor, py::handle offsets_tensor, py::handle out_tensor, double discount,
          bool reverse, int num_threads) {
    const TensorView values = view_vector(values_tensor, "values");
    const TensorView offsets = view_vector(offsets_tensor, "offsets");
    const TensorView out = view_vector(out_tensor, "out");
    if (values.dtype == DType::kInt64) throw py::type_error("values must be float32 or float64, got int64");
    if (offsets.dtype != DType::kInt64) throw py::type_error("offsets must be int64, got a floating dtype");
    if (out.dtype != values.dtype) throw py::type_error("out must have the dtype of values");
    if (out.size != values.size) {
        throw py::value_error("out must have as many elements as values, " + std::to_string(values.size) +
                              ", got " + std::to_string(out.size));
    }
    if (offsets.size < 1) throw py::value_error("offsets must have at least one element, got none");
    if (values.dtype == DType::kFloat32) {
        run<float>(values, offsets, out, discount, reverse, num_threads);
    } else {
        run<double>(values, offsets, out, discount, reverse, num_threads);
    }
}

}  // namespace

void bind_scan(py::module_& module) {
    module.def("scan", &scan, py::arg("values"), py::arg("offsets"), py::arg("out"), py::arg("discount"),
               py::arg("reverse"), py::arg("num_threads"),
               "Writes the segmented discounted scan of values (T,) over offsets (N+1,) into out (T,). What "
               "offsets hold is checked not here but in parl_core.ops.scan, once for every backend.");
}

}  // namespace parl::bindings
