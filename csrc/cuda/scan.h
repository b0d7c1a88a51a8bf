// Scans over trajectories on a GPU. Contracts: parl_core/ops/{recurrence,gae,vtrace}.py.
//
// Pointers are to device memory. Whatever offsets hold, the kernels stay within the arrays.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace parl::cuda {

// Where trajectories begin and end in `steps` steps: at `offsets` (count + 1,), or, where that is null, each of them
// is `horizon` steps long.
struct Segments {
    const std::int64_t* offsets;
    std::int64_t count;
    std::int64_t horizon;
    std::int64_t steps;
};

// y_h = x_h + discount · y_{h−1}, or y_{h+1} if `reverse`.
template <typename T>
void discounted_scan(const T* values, Segments segments, double discount, bool reverse, T* out,
                     cudaStream_t stream);

}  // namespace parl::cuda
