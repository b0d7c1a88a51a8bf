#include <pybind11/pybind11.h>

namespace parl::bindings {
void bind_scan(pybind11::module_& module);
}

PYBIND11_MODULE(_native, module) {
    module.doc() =
        "Compiled CPU kernels. Private: parl_core.ops validates, differentiates and dispatches to them.";
    parl::bindings::bind_scan(module);
}
