#include "cpu/conjugate_gradients.h"

#include <pybind11/stl.h>

#include <chrono>
#include <string>
#include <tuple>

#include "linearization.h"
#include "tensor_view.h"

namespace parl::bindings {
namespace {

// How long a solve may be deaf to Ctrl-C.
constexpr std::chrono::milliseconds kSignals{50};

template <typename T>
TensorView vector_of(py::handle tensor, const char* name, std::int64_t size) {
    const TensorView view = view_vector(tensor, name);
    require(view, kDTypeOf<T>, size, name);
    if (view.data == nullptr) throw py::value_error(std::string(name) + " has no memory");
    return view;
}

void at_least_one(std::int64_t value, const char* name) {
    if (value < 1) {
        throw py::value_error(std::string(name) + " must be at least 1, got " + std::to_string(value));
    }
}

// Residuals, products, and how it ended: negative, halted, restarted, stagnated, operator_norm.
template <typename T>
using End = std::tuple<std::vector<T>, std::int64_t, bool, bool, bool, bool, T>;

template <typename T>
End<T> solve(const BoundCurvature<T>& curvature, double damping, py::handle rhs_tensor,
             py::handle residual_tensor, py::handle x_tensor, double rtol, std::int64_t max_iterations,
             std::int64_t check_every, std::int64_t patience, int num_threads) {
    const std::int64_t size = curvature.shared->native->num_params();
    const TensorView rhs = vector_of<T>(rhs_tensor, "rhs", size);
    const TensorView residual = vector_of<T>(residual_tensor, "residual", size);
    const TensorView x = vector_of<T>(x_tensor, "x", size);
    require_disjoint(x, "x", rhs, "rhs");
    require_disjoint(x, "x", residual, "residual");
    if (!(rtol > 0)) throw py::value_error("rtol must be positive, got " + std::to_string(rtol));
    at_least_one(max_iterations, "max_iterations");
    at_least_one(check_every, "check_every");
    at_least_one(patience, "patience");
    check_threads(num_threads);

    const py::gil_scoped_release release;
    std::unique_lock lock(curvature.shared->mutex);
    auto heard = std::chrono::steady_clock::now();
    const auto hear_signals = [&] {
        if (std::chrono::steady_clock::now() - heard < kSignals) return;
        // Not held meanwhile: a signal's handler may want a product.
        lock.unlock();
        {
            const py::gil_scoped_acquire acquire;
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        }
        lock.lock();
        heard = std::chrono::steady_clock::now();
    };
    cpu::SolveEnd<T> end =
        cpu::conjugate_gradients<T>({curvature.native.get(), static_cast<T>(damping), rhs.as<T>(), size},
                                    {rtol, max_iterations, check_every, patience}, residual.as<T>(),
                                    x.as<T>(), num_threads, hear_signals);
    return {std::move(end.residuals), end.products, end.negative, end.halted, end.restarted, end.stagnated,
            end.operator_norm};
}

template <typename T>
void bind(py::module_& module) {
    module.def("conjugate_gradients", &solve<T>, py::arg("operator"), py::arg("damping"), py::arg("rhs"),
               py::arg("residual"), py::arg("x"), py::arg("rtol"), py::arg("max_iterations"),
               py::arg("check_every"), py::arg("patience"), py::arg("num_threads"),
               "Solve (operator + damping) x = rhs from x, whose residual is given, in place: see "
               "parl_core.hypergrad.solvers.native_cg.");
}

}  // namespace

void bind_conjugate_gradients(py::module_& module) {
    bind<float>(module);
    bind<double>(module);
}

}  // namespace parl::bindings
