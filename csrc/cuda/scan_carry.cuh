// The carry into each tile of a scan whose tiles are taken by different blocks at the same time.
//
// As in decoupled look-back (Merrill and Garland, Single-pass parallel prefix scan with decoupled look-back, NVIDIA
// NVR-2016-002), a tile publishes what its steps compose to and looks at those before it. But what is composed with
// what depends on places alone, so that every run rounds alike: 32 tiles are a group, whose last tile publishes the
// group's map, and 32 groups a block of groups, whose last tile publishes the result y there. A tile composes at most
// 31 tiles and 31 groups, one a lane, and then waits for one y: a chain with one link for 1024 tiles.
#pragma once

#include "cuda/affine.cuh"

namespace parl::cuda {

constexpr int kNotYet = 0, kMap = 1, kMapWithReset = 2;

// In device memory; `flags` are 0 in the beginning.
struct TileStates {
    unsigned* ticket;  // of the next tile to be begun
    int* tile_flags;
    int* group_flags;
    int* result_flags;
    double2* tiles;
    double2* groups;
    double* results;
};

__device__ __forceinline__ int poll(const int* flag) { return *static_cast<const volatile int*>(flag); }

// Shows others that what this thread has written before is there.
__device__ __forceinline__ void publish(int* flag, int value) {
    __threadfence();
    *static_cast<volatile int*>(flag) = value;
}

__device__ __forceinline__ void publish(double2* maps, int* flags, std::int64_t place, const Affine& map) {
    maps[place] = make_double2(map.a, map.b);
    publish(flags + place, map.reset ? kMapWithReset : kMap);
}

// What the `count` maps from `first` on compose to, for all lanes of a warp; waits until they are published. Maps
// before the last one with a reset do not matter, and are not waited for.
__device__ __forceinline__ Affine compose_published(const double2* maps, const int* flags, std::int64_t first,
                                                    int count, int lane) {
    const unsigned wanted = (1u << count) - 1;  // count < 32
    unsigned missing, resets;
    for (;;) {
        const int flag = lane < count ? poll(flags + first + lane) : kMap;
        missing = __ballot_sync(kAllLanes, flag == kNotYet);
        resets = __ballot_sync(kAllLanes, flag == kMapWithReset);
        if (missing <= resets) break;  // none is missing, or those before a reset alone
        __nanosleep(20);
    }
    __threadfence();
    Affine map = identity();
    if ((wanted >> lane & 1) != 0 && (missing >> lane & 1) == 0) {
        const double2 published = __ldcg(maps + first + lane);
        map = {published.x, published.y, (resets >> lane & 1) != 0};
    }
    return scan_lanes(map, LaneGroup{lane, kWarp}).all;
}

// The result y before tile `tile`, for all lanes of the warp that calls it, of which `own` composes the steps.
__device__ __forceinline__ double carry_into(const TileStates& states, std::int64_t tile, const Affine& own,
                                             int lane) {
    const std::int64_t group = tile / kWarp, block = group / kWarp;
    const int place = static_cast<int>(tile % kWarp), group_place = static_cast<int>(group % kWarp);
    if (lane == 0) publish(states.tiles, states.tile_flags, tile, own);
    Affine before = compose_published(states.tiles, states.tile_flags, group * kWarp, place, lane);
    if (place == kWarp - 1 && lane == 0)
        publish(states.groups, states.group_flags, group, compose(own, before));
    if (!before.reset) {
        before = compose(
            before, compose_published(states.groups, states.group_flags, block * kWarp, group_place, lane));
    }
    double y = 0.0;
    if (!before.reset && block > 0) {
        while (poll(states.result_flags + block - 1) == kNotYet) __nanosleep(20);
        __threadfence();
        y = __ldcg(states.results + block - 1);
    }
    y = apply(before, y);
    if (place == kWarp - 1 && group_place == kWarp - 1 && lane == 0) {
        states.results[block] = apply(own, y);
        publish(states.result_flags + block, kMap);
    }
    return y;
}

}  // namespace parl::cuda
