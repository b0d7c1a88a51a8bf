#include "cuda/machine.h"

#include "device_tensor.h"
#include "module.h"

namespace parl::bindings::cuda {

void bind_machine(py::module_& module) {
    module.def(
        "why_not",
        [](int device) {
            const OnDevice on_device(device);
            return parl::cuda::why_not();
        },
        py::arg("device"),
        "Why the kernels cannot run on CUDA device `device`; an empty string if they can.");
}

}  // namespace parl::bindings::cuda
