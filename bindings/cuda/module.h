// What binds the CUDA kernels: one function for each source here.
#pragma once

#include <pybind11/pybind11.h>

namespace parl::bindings {

// Adds submodule `cuda` to `module`. Its classes are local to the module, since tests load these kernels twice: compiled
// for GPUs in the extension, and for the host.
void bind_cuda(pybind11::module_& module);

namespace cuda {
void bind_conjugate_gradients(pybind11::module_& module);
void bind_linearization(pybind11::module_& module);
void bind_machine(pybind11::module_& module);
void bind_scan(pybind11::module_& module);
}  // namespace cuda

}  // namespace parl::bindings
