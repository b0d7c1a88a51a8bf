// Reading and writing arrays by chunks, a few neighbouring elements a thread, 16 bytes at a time where they are
// aligned.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <cstring>

#include "cuda/launch.h"

namespace parl::cuda {

using BFloat16 = __nv_bfloat16;

// In what an element of T is computed.
template <typename T>
struct Computed {
    using type = T;
};
template <>
struct Computed<BFloat16> {
    using type = float;
};
template <typename T>
using ComputedType = typename Computed<T>::type;

__device__ __forceinline__ float widen(BFloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

template <typename T>
__device__ __forceinline__ T narrow(ComputedType<T> x) {
    return x;
}
template <>
__device__ __forceinline__ BFloat16 narrow<BFloat16>(float x) {
    return __float2bfloat16(x);
}

// The elements of a chunk: enough that what lanes do together costs little for each, few enough for registers.
template <typename T>
constexpr int kChunk = sizeof(T) == 8 ? 4 : 8;

// Where a chunk lies: elements [first, last) of those from `start` on are in the array; `start` is a multiple of
// kChunk, and `aligned` tells whether the array begins at a multiple of 16 bytes.
struct Chunk {
    std::int64_t start;
    int first, last;
    bool aligned;
};

// Elements outside are 0.
template <typename T>
__device__ __forceinline__ void load(const T* __restrict__ from, const Chunk& chunk,
                                     ComputedType<T> (&to)[kChunk<T>]) {
    constexpr int kSize = kChunk<T>, kQuads = kSize * static_cast<int>(sizeof(T)) / 16;
    if (chunk.aligned && chunk.first == 0 && chunk.last == kSize) {
        T elements[kSize];
        const auto* const quads = reinterpret_cast<const uint4*>(from + chunk.start);
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            const uint4 quad = quads[i];
            std::memcpy(elements + i * (kSize / kQuads), &quad, sizeof quad);
        }
#pragma unroll
        for (int k = 0; k < kSize; ++k) to[k] = widen(elements[k]);
        return;
    }
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
        to[k] = k >= chunk.first && k < chunk.last ? widen(from[chunk.start + k]) : ComputedType<T>(0);
    }
}

template <typename T>
__device__ __forceinline__ void store(const ComputedType<T> (&from)[kChunk<T>], T* __restrict__ to,
                                      const Chunk& chunk) {
    constexpr int kSize = kChunk<T>, kQuads = kSize * static_cast<int>(sizeof(T)) / 16;
    if (chunk.aligned && chunk.first == 0 && chunk.last == kSize) {
        T elements[kSize];
#pragma unroll
        for (int k = 0; k < kSize; ++k) elements[k] = narrow<T>(from[k]);
        auto* const quads = reinterpret_cast<uint4*>(to + chunk.start);
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            uint4 quad;
            std::memcpy(&quad, elements + i * (kSize / kQuads), sizeof quad);
            quads[i] = quad;
        }
        return;
    }
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
        if (k >= chunk.first && k < chunk.last) to[chunk.start + k] = narrow<T>(from[k]);
    }
}

}  // namespace parl::cuda
