// Which kernel a scan takes, and its launch.
#pragma once

#include <initializer_list>

#include "cuda/scan_groups.cuh"
#include "cuda/scan_tiles.cuh"

namespace parl::cuda {

// The smallest tile of any op, in elements.
constexpr std::int64_t kSmallestTile = kTileThreads * 4;

// Up to here the steps are moved in less time than a launch takes, so that one launch is better than two. Reasoned,
// not measured: 2²⁰ steps are 8 MB in and out, 2 µs of an H200's bandwidth.
constexpr std::int64_t kLaunchBound = std::int64_t{1} << 20;
// The longest trajectories, on average, that a warp takes alone; it does a row of 32 chunks after the other.
constexpr std::int64_t kLongest = 2048;

constexpr std::int64_t divide_up(std::int64_t number, std::int64_t by) { return (number + by - 1) / by; }

// How many flags, maps and results `tiles` tiles have.
struct TileCounts {
    std::int64_t tiles, groups, results;

    explicit TileCounts(std::int64_t tiles_)
        : tiles(tiles_), groups(divide_up(tiles_, kWarp)), results(divide_up(groups, kWarp)) {}
    std::size_t flag_bytes() const {
        return static_cast<std::size_t>(divide_up((1 + tiles + groups + results) * 4, 16)) * 16;
    }
    std::size_t bytes() const {
        return flag_bytes() + static_cast<std::size_t>(16 * (tiles + groups) + 8 * results);
    }
};

inline bool is_aligned(std::initializer_list<const void*> pointers) {
    std::uintptr_t bits = 0;
    for (const void* pointer : pointers) bits |= reinterpret_cast<std::uintptr_t>(pointer);
    return bits % 16 == 0;
}

template <typename Op>
LanePowers powers_of([[maybe_unused]] const Op& op) {
    LanePowers powers{};
    if constexpr (Op::kConstant) {
        double power = 1.0;
        for (int k = 0; k < kChunk<typename Op::T>; ++k) power = product(power, op.discount);
        for (double& each : powers.powers) {
            each = power;
            power = product(power, power);
        }
    }
    return powers;
}

template <typename Op>
void launch_groups(const Op& op, const Segments& segments, bool aligned, cudaStream_t stream) {
    // As many lanes as an average trajectory has chunks.
    const std::int64_t chunks = divide_up(segments.steps, segments.count * kChunk<typename Op::T>) + 1;
    int width = 1;
    while (width < kWarp && width < chunks) width *= 2;
    const std::int64_t blocks = divide_up(segments.count * width, kGroupThreads);
    launch(&scan_groups<Op>, dim3(static_cast<unsigned>(blocks)), dim3(kGroupThreads), 0, stream, op,
           segments, powers_of(op), width, aligned);
}

template <typename Op>
void launch_tiles(const Op& op, const Segments& segments, bool aligned, ScanWorkspace workspace,
                  cudaStream_t stream) {
    const TileCounts counts(divide_up(segments.steps, kTile<Op>));
    auto* const ticket = static_cast<unsigned*>(workspace.memory);
    auto* const flags = reinterpret_cast<int*>(ticket + 1);
    auto* const maps = reinterpret_cast<double2*>(static_cast<char*>(workspace.memory) + counts.flag_bytes());
    const TileStates states{ticket,
                            flags,
                            flags + counts.tiles,
                            flags + counts.tiles + counts.groups,
                            maps,
                            maps + counts.tiles,
                            reinterpret_cast<double*>(maps + counts.tiles + counts.groups)};
    check(cudaMemsetAsync(ticket, 0, counts.flag_bytes(), stream), "resetting a scan's flags");
    launch(&scan_tiles<Op>, dim3(static_cast<unsigned>(counts.tiles)), dim3(kTileThreads),
           sizeof(TileMemory<Op>), stream, op, segments, powers_of(op), states, counts.tiles, aligned);
}

// `arrays`: all that the op reads or writes by chunks.
template <typename Op>
void scan(const Op& op, const Segments& segments, std::initializer_list<const void*> arrays,
          ScanWorkspace workspace, cudaStream_t stream) {
    if (segments.steps == 0 || segments.count == 0) return;
    const bool aligned = is_aligned(arrays);
    if (workspace.memory != nullptr) {
        launch_tiles(op, segments, aligned, workspace, stream);
    } else {
        launch_groups(op, segments, aligned, stream);
    }
}

}  // namespace parl::cuda
