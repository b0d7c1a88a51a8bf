// Segmented discounted scan on the CPU. Contract: parl_core/ops/scan.py.
#pragma once

#include <cstdint>

namespace parl::cpu {

// values, out: (offsets[num_trajectories],); offsets: (num_trajectories + 1,), from 0, non-decreasing.
// Each trajectory is scanned by itself: forwards (prefix sums), or backwards if `reverse` (returns).
template <typename T>
void segmented_scan(const T* values, const std::int64_t* offsets, std::int64_t num_trajectories, T discount,
                    bool reverse, int num_threads, T* out);

}  // namespace parl::cpu
