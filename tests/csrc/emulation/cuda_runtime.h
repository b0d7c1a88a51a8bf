// In place of CUDA's header of this name: what the sources under csrc/cuda use of it, on the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "emulation.h"

#define PARL_CUDA_EMULATED

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// Storage that locals.cpp finds, so that each block has its own, of NaN in the beginning.
#define __shared__ static thread_local
#define __constant__ static const
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)

using dim3 = parl::emulation::Dim3;
using uint3 = parl::emulation::Index3;

#define threadIdx (::parl::emulation::thread_index)
#define blockIdx (::parl::emulation::block_index)
#define blockDim (::parl::emulation::block_size)
#define gridDim (::parl::emulation::grid_size)
constexpr int warpSize = 32;

// Vectors of CUDA's own, aligned as there.
#define PARL_EMULATED_VECTORS(S, name, align2, align4)         \
    struct alignas(align2) name##2 { S x, y; };                \
    struct alignas(align4) name##4 { S x, y, z, w; };          \
    inline name##2 make_##name##2(S x, S y) { return {x, y}; } \
    inline name##4 make_##name##4(S x, S y, S z, S w) { return {x, y, z, w}; }
PARL_EMULATED_VECTORS(float, float, 8, 16)
PARL_EMULATED_VECTORS(double, double, 16, 16)
PARL_EMULATED_VECTORS(int, int, 8, 16)
PARL_EMULATED_VECTORS(unsigned, uint, 8, 16)
PARL_EMULATED_VECTORS(long long, longlong, 16, 16)
#undef PARL_EMULATED_VECTORS

// Barriers and memory.
inline void __syncthreads(parl::emulation::Site site = {}) {
    parl::emulation::block_barrier("__syncthreads", false, site);
}
inline int __syncthreads_count(int flag, parl::emulation::Site site = {}) {
    return parl::emulation::block_barrier("__syncthreads_count", flag != 0, site);
}
inline int __syncthreads_or(int flag, parl::emulation::Site site = {}) {
    return parl::emulation::block_barrier("__syncthreads_or", flag != 0, site) != 0;
}
inline int __syncthreads_and(int flag, parl::emulation::Site site = {}) {
    return parl::emulation::block_barrier("__syncthreads_and", flag == 0, site) == 0;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { parl::emulation::sleep(); }

// Warps.
inline void __syncwarp(unsigned mask = 0xffffffffu, parl::emulation::Site site = {}) {
    parl::emulation::vote("__syncwarp", mask, false, site);
}
inline unsigned __ballot_sync(unsigned mask, int flag, parl::emulation::Site site = {}) {
    return parl::emulation::vote("__ballot_sync", mask, flag != 0, site).yes;
}
inline int __any_sync(unsigned mask, int flag, parl::emulation::Site site = {}) {
    return parl::emulation::vote("__any_sync", mask, flag != 0, site).yes != 0;
}
inline int __all_sync(unsigned mask, int flag, parl::emulation::Site site = {}) {
    const parl::emulation::Votes votes = parl::emulation::vote("__all_sync", mask, flag != 0, site);
    return votes.yes == votes.all;
}

namespace parl::emulation {

template <typename T>
T shuffle(const char* name, unsigned mask, T value, unsigned source, Site site) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "warps exchange four or eight bytes");
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = exchange(name, mask, bits, source, site);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace parl::emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, parl::emulation::Site site = {}) {
    const unsigned lane = parl::emulation::lane(), first = lane & ~(static_cast<unsigned>(width) - 1);
    const unsigned within = static_cast<unsigned>(source) & (static_cast<unsigned>(width) - 1);
    return parl::emulation::shuffle("__shfl_sync", mask, value, first + within, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, parl::emulation::Site site = {}) {
    const unsigned lane = parl::emulation::lane(), within = lane & (static_cast<unsigned>(width) - 1);
    return parl::emulation::shuffle("__shfl_up_sync", mask, value, within < delta ? lane : lane - delta,
                                    site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, parl::emulation::Site site = {}) {
    const unsigned lane = parl::emulation::lane(), size = static_cast<unsigned>(width),
                   within = lane & (size - 1);
    const unsigned source = within + delta >= size ? lane : lane + delta;
    return parl::emulation::shuffle("__shfl_down_sync", mask, value, source, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, parl::emulation::Site site = {}) {
    const unsigned lane = parl::emulation::lane(), last = lane | (static_cast<unsigned>(width) - 1);
    const unsigned source = lane ^ static_cast<unsigned>(bits);
    return parl::emulation::shuffle("__shfl_xor_sync", mask, value, source > last ? lane : source, site);
}

// Atomics; nobody interrupts here.
template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value) {
    const T before = *address;
    *address = static_cast<T>(before + value);
    return before;
}
template <typename T>
T atomicMax(T* address, std::common_type_t<T> value) {
    const T before = *address;
    *address = before < value ? value : before;
    return before;
}
template <typename T>
T atomicMin(T* address, std::common_type_t<T> value) {
    const T before = *address;
    *address = value < before ? value : before;
    return before;
}
template <typename T>
T atomicExch(T* address, std::common_type_t<T> value) {
    const T before = *address;
    *address = value;
    return before;
}
template <typename T>
T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value) {
    const T before = *address;
    if (before == compare) *address = value;
    return before;
}
template <typename T>
T atomicOr(T* address, std::common_type_t<T> value) {
    const T before = *address;
    *address = before | value;
    return before;
}
template <typename T>
T atomicAnd(T* address, std::common_type_t<T> value) {
    const T before = *address;
    *address = before & value;
    return before;
}
// Back to 0 from `last` on.
inline unsigned atomicInc(unsigned* address, unsigned last) {
    const unsigned before = *address;
    *address = before >= last ? 0 : before + 1;
    return before;
}

// Loads and stores with hints for the caches.
template <typename T>
T __ldg(const T* address) {
    return *address;
}
template <typename T>
T __ldcs(const T* address) {
    return *address;
}
template <typename T>
T __ldcg(const T* address) {
    return *address;
}
template <typename T>
void __stcs(T* address, T value) {
    *address = value;
}
template <typename T>
void __stcg(T* address, T value) {
    *address = value;
}

// Arithmetic.
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __int_as_float(int bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline int __float_as_int(float value) {
    int bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
using std::isfinite;
using std::isnan;
using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }

// The runtime. Streams are in order and finished at once.
#define CUDART_VERSION 13000
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorNotReady = 600
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;

inline const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorNoKernelImageForDevice) return "no kernel image is available";
    return error == cudaSuccess ? "no error" : "an error of the emulation";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int byte, std::size_t count, cudaStream_t) {
    std::memset(to, byte, count);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t count, cudaMemcpyKind,
                                   cudaStream_t) {
    std::memmove(to, from, count);
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = nullptr;
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
constexpr unsigned cudaEventDisableTiming = 2;
inline cudaError_t cudaMallocHost(void** memory, std::size_t bytes) {
    *memory = std::malloc(bytes);
    return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* memory) {
    std::free(memory);
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = parl::emulation::machine.driver;
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return parl::emulation::machine.driver < CUDART_VERSION ? cudaErrorInsufficientDriver : cudaSuccess;
}
struct cudaFuncAttributes {
    std::size_t sharedSizeBytes = 0;
};
template <typename... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(P...)) {
    return parl::emulation::machine.capability < 80 ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}
// Few multiprocessors, so that grids as large as the machine loop within small tests.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : 227 << 10;
    return cudaSuccess;
}
template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
    parl::emulation::allow_shared_bytes(reinterpret_cast<const void*>(kernel),
                                        static_cast<std::size_t>(bytes));
    return cudaSuccess;
}
