// Sums over vectors for Krylov methods, and what is made of them, in one launch: no scalar passes by the host.
//
// A thread sums its elements in double precision, a block its threads, and the block that is the last to end sums
// the blocks and goes on with the totals. The order of additions depends on the length and the launch alone, so
// that results are the same bit for bit, whichever block is last.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"

namespace parl::cuda {

constexpr int kSweepThreads = 256;
// 4 blocks on each of the 132 multiprocessors of an H100 or H200: a thread with four loads in flight from two
// vectors then covers the memory's latency. Fixed, so that sums do not depend on the device.
constexpr int kMaxSweepBlocks = 4 * 132;
constexpr int kSweepElements = 4;  // of a thread, before more blocks are launched

// Threads of a launch of one block alone.
constexpr int kBlockThreads = 1024;

inline int sweep_blocks(std::int64_t size) {
    constexpr std::int64_t kElements = std::int64_t{kSweepThreads} * kSweepElements;
    const std::int64_t blocks = (size + kElements - 1) / kElements;
    return blocks < 1 ? 1 : blocks > kMaxSweepBlocks ? kMaxSweepBlocks : static_cast<int>(blocks);
}

// Adds up over the threads of the block, whose number is a multiple of a warp's; thread 0 gets the totals.
// Between two sums there must be a barrier.
template <int kSums>
__device__ void sum_block(double (&sums)[kSums]) {
    __shared__ double of_warps[kSums][kBlockThreads / kWarp];
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    for (int s = 0; s < kSums; ++s) {
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            sums[s] += __shfl_down_sync(kAllLanes, sums[s], static_cast<unsigned>(distance));
        }
    }
    if (lane == 0) {
        for (int s = 0; s < kSums; ++s) of_warps[s][warp] = sums[s];
    }
    __syncthreads();
    if (warp != 0) return;
    for (int s = 0; s < kSums; ++s) {
        sums[s] = lane < warps ? of_warps[s][lane] : 0.0;
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            sums[s] += __shfl_down_sync(kAllLanes, sums[s], static_cast<unsigned>(distance));
        }
    }
}

// Visits all elements, those of this thread in order; `visit(i, sums)` adds to the sums.
template <int kSums, typename Visit>
__device__ __forceinline__ void visit_elements(std::int64_t size, const Visit& visit, double (&sums)[kSums]) {
    for (int s = 0; s < kSums; ++s) sums[s] = 0.0;
    const std::int64_t stride = std::int64_t{blockDim.x} * gridDim.x;
#pragma unroll 4
    for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += stride) {
        visit(i, sums);
    }
}

// The same, and `finish(totals)` in one thread once all blocks have visited theirs. `partials` has room for
// kSums · kMaxSweepBlocks; `ticket` is 0 before and after.
template <int kSums, typename Visit, typename Finish>
__device__ void sweep(std::int64_t size, double* partials, int* ticket, const Visit& visit,
                      const Finish& finish) {
    __shared__ bool is_last;
    double sums[kSums];
    visit_elements<kSums>(size, visit, sums);
    sum_block<kSums>(sums);
    if (gridDim.x > 1) {
        if (threadIdx.x == 0) {
            for (int s = 0; s < kSums; ++s)
                partials[s * kMaxSweepBlocks + static_cast<int>(blockIdx.x)] = sums[s];
            __threadfence();
            is_last = atomicAdd(ticket, 1) == static_cast<int>(gridDim.x) - 1;
        }
        __syncthreads();
        if (!is_last) return;
        __threadfence();
        for (int s = 0; s < kSums; ++s) {
            sums[s] = 0.0;
            for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) {
                sums[s] += partials[s * kMaxSweepBlocks + static_cast<int>(block)];
            }
        }
        sum_block<kSums>(sums);
        if (threadIdx.x == 0) *ticket = 0;
    }
    if (threadIdx.x == 0) finish(sums);
}

}  // namespace parl::cuda
