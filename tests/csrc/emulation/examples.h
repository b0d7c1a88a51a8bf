// Kernels right and wrong, by which the emulation itself is tested.
#pragma once

#include <pybind11/pybind11.h>

namespace parl::emulation {

void bind_examples(pybind11::module_& module);

}  // namespace parl::emulation
