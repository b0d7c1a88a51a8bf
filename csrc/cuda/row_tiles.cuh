// How launches over (rows, columns) are shared out: 32 columns and a range of rows to a block of 8 warps, each
// of which takes every eighth row; and their column sums, in an order that depends on the shape alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "math/inline.h"

namespace parl::cuda {

inline constexpr int kTileColumns = 32, kTileWarps = 8;

inline dim3 tile_block() { return dim3(kTileColumns, kTileWarps); }

inline dim3 tile_grid(std::int64_t row_blocks, std::int64_t columns) {
    return dim3(static_cast<unsigned>(row_blocks),
                static_cast<unsigned>((columns + kTileColumns - 1) / kTileColumns));
}

__device__ inline std::int64_t tile_column() {
    return static_cast<std::int64_t>(blockIdx.y) * kTileColumns + threadIdx.x;
}

// Calls function(row) for this thread's rows.
template <typename Function>
__device__ __forceinline__ void for_tile_rows(std::int64_t rows, const Function& function) {
    const std::int64_t end = rows * (blockIdx.x + 1) / gridDim.x;
#pragma unroll 4
    for (std::int64_t row = rows * blockIdx.x / gridDim.x + threadIdx.y; row < end; row += kTileWarps) {
        function(row);
    }
}

// The sum over the block's threads of one column, for the first warp; all threads call it.
template <typename T>
__device__ __forceinline__ T tile_sum(T value) {
    __shared__ T sums[kTileWarps][kTileColumns];
    sums[threadIdx.y][threadIdx.x] = value;
    __syncthreads();
    T total = value;
    if (threadIdx.y == 0) {
        for (int warp = 1; warp < kTileWarps; ++warp) total += sums[warp][threadIdx.x];
    }
    __syncthreads();
    return total;
}

}  // namespace parl::cuda
