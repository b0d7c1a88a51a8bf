#include "../../../bindings/cuda/module.h"

#include "emulation.h"
#include "examples.h"

PYBIND11_MODULE(_emulated, module) {
    module.doc() = "The CUDA kernels, compiled for the host; see emulation.h.";
    module.def("seed", &parl::emulation::set_seed, pybind11::arg("seed"),
               "From where the order of threads and blocks is drawn.");
    module.def("resident_blocks", &parl::emulation::set_resident_blocks, pybind11::arg("count"),
               "How many blocks take turns.");
    module.def(
        "machine", [](int driver, int capability) { parl::emulation::machine = {driver, capability}; },
        pybind11::arg("driver") = 13000, pybind11::arg("capability") = 90,
        "The newest CUDA that the driver knows, as 1000 · major + 10 · minor, and the GPU's compute "
        "capability.");
    parl::emulation::bind_examples(module);
    parl::bindings::bind_cuda(module);
}
