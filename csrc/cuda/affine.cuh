// Affine maps y ↦ a·y + b, what steps of a recurrence compose to, and their scans over the lanes of a warp.
//
// Everything is carried in double precision: there products of single-precision coefficients leave the range only
// where the result does too, and it costs nothing beside the memory traffic on GPUs with full-rate double precision.
#pragma once

#include <cmath>

#include "cuda/launch.h"

namespace parl::cuda {

struct Affine {
    double a, b;
    bool reset;  // a trajectory begins within: y does not matter, and a is of no use
};

__device__ __forceinline__ Affine identity() { return {1.0, 0.0, false}; }

// c·y. A product of coefficients that has overflowed takes 0 to 0, as its factors would one after another.
__host__ __device__ __forceinline__ double times(double c, double y) {
    const double moved = c * y;
    return moved != moved && y == 0.0 && c == c ? 0.0 : moved;
}

// The product of coefficients. One that has underflowed is held at the smallest number, whatever comes: 0 would make a NaN
// of an infinity that goes on step by step, and what has faded does not grow again.
__host__ __device__ __forceinline__ double product(double c, double d) {
    constexpr double kFaded = 4.9406564584124654e-324;
    // Either may be 0 where the other has overflowed.
    const double both = c == 0.0 ? times(d, c) : times(c, d);
    if (c == 0.0 || d == 0.0 || both != both) return both;
    const bool has_faded = both == 0.0 || fabs(c) == kFaded || fabs(d) == kFaded;
    return has_faded ? copysign(kFaded, both) : both;
}

__device__ __forceinline__ double apply(const Affine& map, double y) {
    return map.reset ? map.b : map.b + times(map.a, y);
}

// `later` after `earlier`.
__device__ __forceinline__ Affine compose(const Affine& later, const Affine& earlier) {
    if (later.reset) return later;
    return {product(later.a, earlier.a), apply(later, earlier.b), earlier.reset};
}

// Whether one of `lanes` is among the `count` up to and with `lane`.
__device__ __forceinline__ bool any_of_last(unsigned lanes, int lane, int count) {
    return (lanes << (kWarp - 1 - lane) >> (kWarp - count)) != 0;
}

// Where a lane stands: lanes are taken in groups of `width` neighbours, a power of 2, which know nothing of each
// other.
struct LaneGroup {
    int lane, width;

    __device__ __forceinline__ int within() const { return lane & (width - 1); }
};

// Of the maps of a group's lanes, in order: those of all lanes before this one, and of all.
struct LaneScan {
    Affine before, all;
};

__device__ __forceinline__ LaneScan scan_lanes(Affine map, LaneGroup group) {
    const unsigned resets = __ballot_sync(kAllLanes, map.reset);
    const int within = group.within();
    double a = map.a, b = map.b;
    for (int delta = 1; delta < group.width; delta *= 2) {
        const double earlier_a = __shfl_up_sync(kAllLanes, a, static_cast<unsigned>(delta), group.width);
        const double earlier_b = __shfl_up_sync(kAllLanes, b, static_cast<unsigned>(delta), group.width);
        if (within < delta || any_of_last(resets, group.lane, delta)) continue;
        const Affine both = compose({a, b, false}, {earlier_a, earlier_b, false});
        a = both.a;
        b = both.b;
    }
    LaneScan scan;
    scan.before = {__shfl_up_sync(kAllLanes, a, 1, group.width), __shfl_up_sync(kAllLanes, b, 1, group.width),
                   false};
    scan.all = {__shfl_sync(kAllLanes, a, group.width - 1, group.width),
                __shfl_sync(kAllLanes, b, group.width - 1, group.width), false};
    const int last = group.lane - within + group.width - 1;
    scan.all.reset = any_of_last(resets, last, group.width);
    if (within == 0) {
        scan.before = identity();
    } else {
        scan.before.reset = any_of_last(resets, group.lane - 1, within);
    }
    return scan;
}

// The same of maps with one coefficient in [0, 1] to a power, which need not be exchanged.
struct LanePowers {
    double powers[6];  // a, a², a⁴, …, a³² of the a of one lane

    // a to the power of `exponent`, at most 63.
    __device__ __forceinline__ double to_the(int exponent) const {
        double power = 1.0;
#pragma unroll
        for (int i = 0; i < 6; ++i) {
            if ((exponent >> i & 1) != 0) power = product(power, powers[i]);
        }
        return power;
    }
};

__device__ __forceinline__ LaneScan scan_lanes(double b, bool reset, const LanePowers& a, LaneGroup group) {
    const unsigned resets = __ballot_sync(kAllLanes, reset);
    const int within = group.within();
#pragma unroll
    for (int i = 0; i < 5; ++i) {  // known at compile time, so that the powers stay in registers
        const int delta = 1 << i;
        if (delta >= group.width) break;
        const double earlier = __shfl_up_sync(kAllLanes, b, static_cast<unsigned>(delta), group.width);
        if (within >= delta && !any_of_last(resets, group.lane, delta)) b = b + a.powers[i] * earlier;
    }
    LaneScan scan;
    scan.before = {a.to_the(within), __shfl_up_sync(kAllLanes, b, 1, group.width), false};
    scan.all = {a.to_the(group.width), __shfl_sync(kAllLanes, b, group.width - 1, group.width), false};
    scan.all.reset = any_of_last(resets, group.lane - within + group.width - 1, group.width);
    if (within == 0) {
        scan.before = identity();
    } else {
        scan.before.reset = any_of_last(resets, group.lane - 1, within);
    }
    return scan;
}

}  // namespace parl::cuda
