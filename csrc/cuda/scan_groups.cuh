// Scans of trajectories each by a group of lanes of one warp: one launch, no workspace.
#pragma once

#include "cuda/scan_chunk.cuh"

namespace parl::cuda {

constexpr unsigned kGroupThreads = 128;

template <typename Op>
__global__ void __launch_bounds__(kGroupThreads)
    scan_groups(const Op op, const Segments segments, const LanePowers powers, const int width,
                const bool aligned) {
    using T = typename Op::T;
    constexpr int kSize = kChunk<T>;
    const LaneGroup group{static_cast<int>(threadIdx.x) & (kWarp - 1), width};
    const std::int64_t n = (std::int64_t{blockIdx.x} * kGroupThreads + threadIdx.x) / width;
    std::int64_t begin = 0, end = 0;
    if (n < segments.count) {
        const std::int64_t* const offsets = segments.offsets;
        begin = offsets != nullptr ? offsets[n] : n * segments.horizon;
        end = offsets != nullptr ? offsets[n + 1] : begin + segments.horizon;
        begin = max(begin, std::int64_t{0});
        end = min(end, segments.steps);
    }
    const bool is_empty = begin >= end;
    const std::int64_t first_chunk = begin / kSize,
                       chunks = is_empty ? 0 : (end - 1) / kSize - first_chunk + 1;
    const std::int64_t head = Op::kReverse ? end - 1 : begin;
    ComputedType<T> bootstrap(0);
    if constexpr (Op::kBootstraps) {
        if (!is_empty && op.returns.bootstrap != nullptr) bootstrap = widen(op.returns.bootstrap[n]);
    }
    double y = 0.0;
    // All lanes of a warp go on until its longest trajectory is done: they scan together.
    for (std::int64_t row = 0; __any_sync(kAllLanes, row < chunks); row += width) {
        const std::int64_t place = row + group.within(), index = Op::kReverse ? chunks - 1 - place : place;
        Chunk chunk{0, 0, 0, aligned};
        if (place < chunks) {
            chunk.start = (first_chunk + index) * kSize;
            chunk.first = static_cast<int>(max(begin - chunk.start, std::int64_t{0}));
            chunk.last = static_cast<int>(min(end - chunk.start, std::int64_t{kSize}));
        }
        typename Op::Items items;
        op.load(chunk, segments.steps, items);
        const bool has_head = head >= chunk.start + chunk.first && head < chunk.start + chunk.last;
        const unsigned heads = has_head ? 1u << (head - chunk.start) : 0u;
        op.prepare(items, heads, [&](int) { return bootstrap; });
        const LaneScan scan = scan_row<Op>(chunk_map(op, items, heads), powers, group);
        finish_chunk(op, items, heads, apply(scan.before, y), chunk);
        y = apply(scan.all, y);
    }
}

}  // namespace parl::cuda
