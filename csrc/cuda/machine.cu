#include "cuda/launch.h"
#include "cuda/machine.h"

namespace parl::cuda {
namespace {

// Compiled for the same GPUs as all other kernels.
__global__ void probe() {}

std::string version(int number) {
    return "CUDA " + std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

}  // namespace

std::string why_not() {
    int count = 0, driver = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorInsufficientDriver) {
        cudaGetLastError();  // of this thread, or the next who asks would take it for his own
        cudaDriverGetVersion(&driver);
        return "the driver of the GPU is for " + version(driver) + ", too old for kernels built by " +
               version(CUDART_VERSION);
    }
    cudaFuncAttributes attributes;
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe);
    if (error == cudaSuccess) return "";
    cudaGetLastError();
    return "the kernels, built by " + version(CUDART_VERSION) +
           " for GPUs of compute capability 8.0 and later, cannot run on this one: " +
           cudaGetErrorString(error);
}

}  // namespace parl::cuda
