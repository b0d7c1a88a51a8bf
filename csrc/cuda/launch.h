// How kernels are launched: by nvcc's <<<…>>>, or, where the same sources are compiled as C++ for the tests
// (tests/csrc/emulation), by an emulation of it. Errors of the launch are thrown; what a kernel does wrong while it
// runs, CUDA reports later.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace parl::cuda {

// Throws if a call of CUDA's runtime, described by `what`, failed.
inline void check(cudaError_t error, const std::string& what) {
    if (error != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

// How many threads at most share a warp's instructions.
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The name of a kernel, as the compiler mangles it.
template <typename... P>
std::string kernel_name([[maybe_unused]] void (*kernel)(P...)) {
#if defined(__CUDACC__) && CUDART_VERSION >= 12030
    const char* name = nullptr;
    if (cudaFuncGetName(&name, reinterpret_cast<const void*>(kernel)) == cudaSuccess && name != nullptr)
        return name;
#endif
    return "a kernel";
}

#if defined(__CUDACC__) || defined(PARL_CUDA_EMULATED)

// Allows `kernel` all the dynamic shared memory that a block can have on the current device. Once and for the most, not
// for each launch: a smaller launch of another thread would lower the limit just before a larger one of this.
template <typename... P>
void allow_shared_memory(void (*kernel)(P...)) {
    static std::mutex one_at_a_time;
    static std::set<std::pair<void (*)(P...), int>> allowed;
    const std::lock_guard<std::mutex> guard(one_at_a_time);
    int device = 0, most = 0;
    check(cudaGetDevice(&device), "the current device");
    if (allowed.count({kernel, device}) != 0) return;
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "attributes of " + kernel_name(kernel));
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               most - static_cast<int>(attributes.sharedSizeBytes)),
          "shared memory of " + kernel_name(kernel));
    allowed.emplace(kernel, device);
}

// Runs `kernel(arguments...)` on `stream`.
template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
            A... arguments) {
    if (shared_bytes > 48 << 10) allow_shared_memory(kernel);
#if defined(__CUDACC__)
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<P>(arguments)...);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) check(error, "launch of " + kernel_name(kernel));
#else
    static_cast<void>(stream);
    emulation::run({grid, block, shared_bytes, reinterpret_cast<const void*>(kernel), kernel_name(kernel)},
                   [&] { kernel(static_cast<P>(arguments)...); });
#endif
}

// The block's dynamic shared memory, aligned for loads of 16 bytes.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#if defined(__CUDACC__)
    extern __shared__ __align__(16) unsigned char parl_dynamic_shared[];
    return reinterpret_cast<T*>(parl_dynamic_shared);
#else
    return static_cast<T*>(emulation::dynamic_shared_memory());
#endif
}

#endif

}  // namespace parl::cuda
