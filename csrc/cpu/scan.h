// Scans over trajectories on the CPU. Contracts: parl_core/ops/{recurrence,gae,vtrace}.py.
//
// Every array of steps is flat, trajectory after trajectory; results must not overlap what they are computed
// from. A thread takes whole trajectories, and the arithmetic of a trajectory depends neither on its place
// nor on the number of threads.
#pragma once

#include <cstdint>

#include "math/inline.h"

namespace parl::cpu {

// Where trajectories begin and end: at `offsets` (count + 1,), from 0, non-decreasing; or, where that is
// null, each of them is `horizon` steps long.
struct Segments {
    const std::int64_t* offsets;
    std::int64_t count;
    std::int64_t horizon;

    PARL_INLINE std::int64_t start(std::int64_t n) const {
        return offsets != nullptr ? offsets[n] : n * horizon;
    }
    PARL_INLINE std::int64_t steps() const { return start(count); }
};

// The number of the first of `offsets` (count + 1,) that is less than the one before; 0 if there is none.
std::int64_t first_decrease(const std::int64_t* offsets, std::int64_t count);

// y_h = x_h + discount · y_{h−1}, or y_{h+1} if `reverse`.
template <typename T>
void discounted_scan(const T* values, Segments segments, T discount, bool reverse, int num_threads, T* out);

// y_h = x_h + c_{h−1} · y_{h−1}, or x_h + c_h · y_{h+1} if `reverse`; the last c of a trajectory is not used.
template <typename T>
void linear_recurrence(const T* values, const T* coefficients, Segments segments, bool reverse,
                       int num_threads, T* out);

// Estimates made of rewards and values; `bootstrap` (count,), the value after each trajectory's last step,
// may be null for zeros.
template <typename T>
struct Returns {
    const T* rewards;
    const T* values;
    const T* bootstrap;
    T discount;
    T trace_lambda;
};

// Generalized advantage estimates, to which the values are added if `add_values`: λ-returns.
template <typename T>
void lambda_returns(const Returns<T>& returns, Segments segments, bool add_values, int num_threads, T* out);

template <typename T>
struct Clips {
    T rho;
    T c;
};

template <typename T>
void vtrace(const Returns<T>& returns, const T* log_ratios, Clips<T> clips, Segments segments,
            int num_threads, T* targets, T* advantages);

}  // namespace parl::cpu
