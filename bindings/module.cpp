#include <pybind11/pybind11.h>

#if defined(PARL_WITH_CUDA)
#include "cuda/module.h"
#endif

namespace parl::bindings {
void bind_divergence(pybind11::module_& module);
void bind_elementary(pybind11::module_& module);
void bind_actor(pybind11::module_& module);
void bind_adam(pybind11::module_& module);
void bind_conjugate_gradients(pybind11::module_& module);
void bind_ensemble(pybind11::module_& module);
void bind_isa(pybind11::module_& module);
void bind_linearization(pybind11::module_& module);
void bind_neighbours(pybind11::module_& module);
void bind_preference(pybind11::module_& module);
void bind_sac(pybind11::module_& module);
void bind_scan(pybind11::module_& module);
}  // namespace parl::bindings

PYBIND11_MODULE(_native, module) {
    module.doc() =
        "Compiled CPU kernels. Private: parl_core.ops validates, differentiates and dispatches to them.";
    parl::bindings::bind_divergence(module);
    parl::bindings::bind_elementary(module);
    parl::bindings::bind_actor(module);
    parl::bindings::bind_adam(module);
    parl::bindings::bind_ensemble(module);
    parl::bindings::bind_isa(module);
    parl::bindings::bind_linearization(module);
    parl::bindings::bind_conjugate_gradients(module);
    parl::bindings::bind_neighbours(module);
    parl::bindings::bind_preference(module);
    parl::bindings::bind_sac(module);
    parl::bindings::bind_scan(module);
#if defined(PARL_WITH_CUDA)
    parl::bindings::bind_cuda(module);
#endif
}
