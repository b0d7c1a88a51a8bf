// Scans over trajectories on a GPU. Contracts: parl_core/ops/{recurrence,gae,vtrace}.py.
//
// Every array of steps is flat, trajectory after trajectory, in device memory; results must not overlap what they are
// computed from. T is float, double or CUDA's __nv_bfloat16; sums are carried in double precision. The arithmetic is
// the same in every run. Whatever offsets hold, the kernels stay within the arrays.
//
// One kernel takes each trajectory by some lanes of a warp and needs one launch and no workspace; another takes the
// array by tiles, at the rate of the memory whatever the trajectories' lengths, and needs both. Which: scan_workspace.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
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

// Device memory for a scan by tiles, of any content, aligned to 16 bytes; `memory` null: one warp a trajectory.
struct ScanWorkspace {
    void* memory;
    std::size_t bytes;
};

// How many bytes a scan by tiles needs.
std::size_t tiled_scan_workspace(std::int64_t steps);
// The same, or 0 where trajectories are better taken each by itself.
std::size_t scan_workspace(std::int64_t steps, std::int64_t count);

// y_h = x_h + discount · y_{h−1}, or y_{h+1} if `reverse`; discount in [0, 1].
template <typename T>
void discounted_scan(const T* values, Segments segments, double discount, bool reverse, T* out,
                     ScanWorkspace workspace, cudaStream_t stream);

// y_h = x_h + c_{h−1} · y_{h−1}, or x_h + c_h · y_{h+1} if `reverse`; the last c of a trajectory is not used.
template <typename T>
void linear_recurrence(const T* values, const T* coefficients, Segments segments, bool reverse, T* out,
                       ScanWorkspace workspace, cudaStream_t stream);

// Estimates made of rewards and values; `bootstrap` (count,), the value after each trajectory's last step,
// may be null for zeros.
template <typename T>
struct Returns {
    const T* rewards;
    const T* values;
    const T* bootstrap;
    double discount;
    double trace_lambda;
};

// Generalized advantage estimates, to which the values are added if `add_values`: λ-returns.
template <typename T>
void lambda_returns(const Returns<T>& returns, Segments segments, bool add_values, T* out,
                    ScanWorkspace workspace, cudaStream_t stream);

struct Clips {
    double rho, c;
};

template <typename T>
void vtrace(const Returns<T>& returns, const T* log_ratios, Clips clips, Segments segments, T* targets,
            T* advantages, ScanWorkspace workspace, cudaStream_t stream);

}  // namespace parl::cuda
