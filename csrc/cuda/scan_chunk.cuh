// The scan of one chunk by one thread, and of a row of chunks by the lanes of a warp.
#pragma once

#include "cuda/affine.cuh"
#include "cuda/scan_ops.cuh"

namespace parl::cuda {

// The element that comes `i`-th in the scan.
template <typename Op>
__device__ __forceinline__ int in_order(int i) {
    return Op::kReverse ? kChunk<typename Op::T> - 1 - i : i;
}

// What a chunk's steps compose to; of one coefficient for all, `a` is left out.
template <typename Op>
__device__ __forceinline__ Affine chunk_map(const Op& op, const typename Op::Items& items, unsigned heads) {
    Affine map = identity();
#pragma unroll
    for (int i = 0; i < kChunk<typename Op::T>; ++i) {
        const int k = in_order<Op>(i);
        const double x = op.term(items, k), c = op.coefficient(items, k);
        if (is_head(heads, k)) {
            map = {0.0, x, true};
        } else {
            if constexpr (!Op::kConstant) map.a = product(map.a, c);
            map.b = x + c * map.b;
        }
    }
    return map;
}

template <typename Op>
__device__ __forceinline__ LaneScan scan_row(const Affine& map, [[maybe_unused]] const LanePowers& powers,
                                             LaneGroup group) {
    if constexpr (Op::kConstant) {
        return scan_lanes(map.b, map.reset, powers, group);
    } else {
        return scan_lanes(map, group);
    }
}

// Step by step from `y`, the result before the chunk, and writes the results.
template <typename Op>
__device__ __forceinline__ void finish_chunk(const Op& op, const typename Op::Items& items, unsigned heads,
                                             double y, const Chunk& chunk) {
    typename Op::S results[kChunk<typename Op::T>], before[kChunk<typename Op::T>];
#pragma unroll
    for (int i = 0; i < kChunk<typename Op::T>; ++i) {
        const int k = in_order<Op>(i);
        before[k] = is_head(heads, k) ? typename Op::S(0) : static_cast<typename Op::S>(y);
        y = is_head(heads, k) ? op.term(items, k) : op.term(items, k) + op.coefficient(items, k) * y;
        results[k] = static_cast<typename Op::S>(y);
    }
    op.store(items, results, before, chunk);
}

}  // namespace parl::cuda
