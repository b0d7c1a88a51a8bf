#include "module.h"

namespace parl::bindings {

void bind_cuda(pybind11::module_& module) {
    pybind11::module_ submodule =
        module.def_submodule("cuda", "CUDA kernels. Streams are integers, torch's `Stream.cuda_stream`.");
    cuda::bind_conjugate_gradients(submodule);
    cuda::bind_linearization(submodule);
    cuda::bind_machine(submodule);
    cuda::bind_scan(submodule);
}

}  // namespace parl::bindings
