// The recurrences over trajectories, one element at a time, for scalars and vectors alike.
#pragma once

#include "math/elementary.h"

namespace parl::math {

// y_h = x_h + c · y_{h−1}, or y_{h+1} when the scan runs backwards.
template <typename V>
PARL_INLINE V scan_step(V value, V carry, V coefficient) {
    return value + coefficient * carry;
}

// Error of one-step temporal-difference learning: r + γV(s') − V(s).
template <typename V>
PARL_INLINE V td_error(V reward, V value, V next_value, V discount) {
    return (reward + discount * next_value) - value;
}

// min(x, bound); of a NaN x: x.
template <typename V>
PARL_INLINE V clip_above(V x, V bound) {
    return select(bound < x, bound, x);
}

}  // namespace parl::math
