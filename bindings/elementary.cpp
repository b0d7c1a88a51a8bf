#include "cpu/elementary.h"

#include <array>

#include "tensor_view.h"

namespace parl::bindings {
namespace {

using cpu::Elementary;

struct Named {
    const char* name;
    Elementary function;
};
constexpr std::array<Named, 7> kFunctions{{{"exp", Elementary::kExp},
                                           {"expm1", Elementary::kExpm1},
                                           {"log", Elementary::kLog},
                                           {"log1p", Elementary::kLog1p},
                                           {"tanh", Elementary::kTanh},
                                           {"sigmoid", Elementary::kSigmoid},
                                           {"softplus", Elementary::kSoftplus}}};

template <typename T>
void run(Elementary function, const TensorView& values, const TensorView& out) {
    const py::gil_scoped_release release;
    PARL_DISPATCH(elementary<T>(function, values.as<T>(), values.size, out.as<T>()));
}

void elementary(const std::string& name, py::handle values_tensor, py::handle out_tensor) {
    const TensorView values = view_vector(values_tensor, "values");
    const TensorView out = view_vector(out_tensor, "out");
    if (values.dtype == DType::kInt64) throw py::type_error("values must be float32 or float64, got int64");
    if (out.dtype != values.dtype) throw py::type_error("out must have the dtype of values");
    if (out.size != values.size) {
        throw py::value_error("out must have as many elements as values, " + std::to_string(values.size) +
                              ", got " + std::to_string(out.size));
    }
    for (const Named& named : kFunctions) {
        if (name != named.name) continue;
        return values.dtype == DType::kFloat32 ? run<float>(named.function, values, out)
                                               : run<double>(named.function, values, out);
    }
    throw py::value_error("name must be one of the elementary functions, got '" + name + "'");
}

}  // namespace

void bind_elementary(py::module_& module) {
    module.def("elementary", &elementary, py::arg("name"), py::arg("values"), py::arg("out"),
               "Writes the elementary function `name` of values (T,) into out (T,): for tests.");
}

}  // namespace parl::bindings
