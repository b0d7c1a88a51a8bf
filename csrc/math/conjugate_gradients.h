// The decisions of conjugate gradients, by the scalars of an iteration: when a curvature counts as zero, when the
// recurrence has parted from the truth, and when restarts no longer help. Contract: `ConjugateGradients` and
// `rounding_allowance` of parl_core/hypergrad/solvers.
#pragma once

#include <limits>

#include "math/inline.h"

namespace parl::math {

// Up to here p·A p is what rounding leaves of zero; direction_square: p·p.
template <typename T>
PARL_INLINE T negligible_curvature(T operator_norm, T direction_square) {
    return std::numeric_limits<T>::epsilon() * operator_norm * direction_square;
}

// Whether the true residual's norm, where the recurrence claimed another, calls for a restart.
template <typename T>
PARL_INLINE bool has_parted(T norm, T claimed, T rtol) {
    return norm > rtol && (claimed <= rtol || norm > T(2) * claimed);
}

// Whether a residual is no more than what rounding of A x leaves.
template <typename T>
PARL_INLINE bool is_rounding(T norm, T operator_norm, T x_norm, double rtol) {
    T condition = operator_norm * x_norm;
    if (condition > T(1000)) condition = T(1000);
    T allowance = T(4) * std::numeric_limits<T>::epsilon() * condition;
    const T most = static_cast<T>(10.0 * rtol);
    if (allowance > most) allowance = most;
    return norm <= allowance;
}

// Restarts in a row that failed to halve the residual, after one from `norm`, where `best` is the smallest residual
// that any before it began from. `patience` of them end the solve, as one does whose residual is rounding.
template <typename T, typename Count>
PARL_INLINE Count failures_after_restart(Count failures, T norm, T best, bool rounding, Count patience) {
    if (!(norm > T(0.5) * best)) return 0;
    return rounding ? patience : failures + 1;
}

}  // namespace parl::math
