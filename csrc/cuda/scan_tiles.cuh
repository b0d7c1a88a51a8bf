// Scans by tiles of the array, whatever trajectories begin and end in them: every element is read and written once, in
// full lines, and blocks are as many as the tiles. See scan_carry.cuh for what passes between them.
#pragma once

#include "cuda/scan_carry.cuh"
#include "cuda/scan_chunk.cuh"

namespace parl::cuda {

constexpr int kTileThreads = 256, kTileWarps = kTileThreads / kWarp;

template <typename Op>
constexpr int kTile = kTileThreads * Op::kRows * kChunk<typename Op::T>;

template <typename Op>
struct TileMemory {
    std::int64_t tile, first_boundary;
    double carry;
    Affine warps[kTileWarps];
    unsigned heads[kTile<Op> / 32];                                            // one bit an element
    ComputedType<typename Op::T> bootstraps[Op::kBootstraps ? kTile<Op> : 1];  // of elements that are heads
};

__device__ __forceinline__ std::int64_t boundary(const Segments& segments, std::int64_t n) {
    return segments.offsets != nullptr ? segments.offsets[n] : n * segments.horizon;
}

// The number of the first boundary that is at least `key`, or count + 1; by all lanes of a warp, 33 parts a round.
__device__ __forceinline__ std::int64_t find_boundary(const Segments& segments, std::int64_t key, int lane) {
    if (segments.offsets == nullptr) {
        return min((key + segments.horizon - 1) / segments.horizon, segments.count + 1);
    }
    std::int64_t low = 0, high = segments.count + 1;
    while (low < high) {
        const std::int64_t span = high - low;
        const auto probe = [&](int i) {
            return span <= kWarp ? low + i : low + span / (kWarp + 1) * (i + 1);
        };
        const bool is_less = probe(lane) < high && segments.offsets[probe(lane)] < key;
        const int less = __popc(__ballot_sync(kAllLanes, is_less));
        const std::int64_t below = less > 0 ? probe(less - 1) + 1 : low;
        high = less < kWarp ? min(probe(less), high) : high;
        low = below;
    }
    return low;
}

// Marks the elements of the tile at [low, high) where scans of trajectories begin. Offsets may be of any content.
template <typename Op>
__device__ __forceinline__ void find_heads(const Op& op, const Segments& segments, std::int64_t low,
                                           std::int64_t high, TileMemory<Op>& memory) {
    const int thread = static_cast<int>(threadIdx.x);
    // A trajectory begins at its boundary, and ends with the element before the next one.
    constexpr std::int64_t kShift = Op::kReverse ? 1 : 0;
    if (thread < kWarp) {
        const std::int64_t first = find_boundary(segments, low + kShift, thread);
        if (thread == 0) memory.first_boundary = first;
    }
    __syncthreads();
    for (std::int64_t m = memory.first_boundary + thread; m <= segments.count; m += kTileThreads) {
        const std::int64_t head = boundary(segments, m) - kShift;
        if (head >= high) break;
        if (head < low || (Op::kReverse && (m == 0 || boundary(segments, m - 1) > head))) continue;
        const auto place = static_cast<unsigned>(head - low);
        atomicOr(memory.heads + place / 32, 1u << place % 32);
        if constexpr (Op::kBootstraps) {
            const auto* const bootstrap = op.returns.bootstrap;
            memory.bootstraps[place] =
                bootstrap != nullptr ? widen(bootstrap[m - 1]) : ComputedType<typename Op::T>(0);
        }
    }
    __syncthreads();
}

template <typename Op>
__global__ void __launch_bounds__(kTileThreads, Op::kBlocks)
    scan_tiles(const Op op, const Segments segments, const LanePowers powers, const TileStates states,
               const std::int64_t tiles, const bool aligned) {
    constexpr int kSize = kChunk<typename Op::T>, kRows = Op::kRows;
    TileMemory<Op>& memory = *dynamic_shared<TileMemory<Op>>();
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    // In the order in which blocks begin, so that a tile waits for tiles alone that have begun before it.
    if (thread == 0) memory.tile = atomicAdd(states.ticket, 1u);
    for (int i = thread; i < kTile<Op> / 32; i += kTileThreads) memory.heads[i] = 0;
    __syncthreads();
    const std::int64_t tile = memory.tile;
    const std::int64_t low = (Op::kReverse ? tiles - 1 - tile : tile) * kTile<Op>;
    const std::int64_t high = min(low + kTile<Op>, segments.steps);

    Chunk chunks[kRows];
    typename Op::Items items[kRows];
    unsigned heads[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        const int place = ((warp * kRows + row) * kWarp + lane) * kSize;
        const std::int64_t start = low + (Op::kReverse ? kTile<Op> - kSize - place : place);
        const auto inside = static_cast<int>(max(min(high - start, std::int64_t{kSize}), std::int64_t{0}));
        chunks[row] = {start, 0, inside, aligned};
        op.load(chunks[row], segments.steps, items[row]);
    }
    find_heads(op, segments, low, high, memory);

    // What the warp's steps compose to, and those before each of its chunks.
    Affine own = identity(), before[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        const auto place = static_cast<int>(chunks[row].start - low);
        heads[row] = memory.heads[place / 32] >> place % 32 & ((1u << kSize) - 1);
        op.prepare(items[row], heads[row], [&](int k) { return memory.bootstraps[place + k]; });
        const LaneScan scan =
            scan_row<Op>(chunk_map(op, items[row], heads[row]), powers, LaneGroup{lane, kWarp});
        before[row] = compose(scan.before, own);
        own = compose(scan.all, own);
    }
    if (lane == 0) memory.warps[warp] = own;
    __syncthreads();
    if (warp == 0) {
        Affine all = identity();
        for (const Affine& map : memory.warps) all = compose(map, all);
        const double carry = carry_into(states, tile, all, lane);
        if (lane == 0) memory.carry = carry;
    }
    __syncthreads();
    double y = memory.carry;
    for (int w = 0; w < warp; ++w) y = apply(memory.warps[w], y);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        finish_chunk(op, items[row], heads[row], apply(before[row], y), chunks[row]);
    }
}

}  // namespace parl::cuda
