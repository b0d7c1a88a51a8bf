#include "cuda/scan.h"
#include "cuda/scan_launch.cuh"

namespace parl::cuda {

std::size_t tiled_scan_workspace(std::int64_t steps) {
    return TileCounts(divide_up(steps, kSmallestTile)).bytes();
}

std::size_t scan_workspace(std::int64_t steps, std::int64_t count) {
    const bool is_small = steps <= kLaunchBound && steps <= count * kLongest;
    return is_small || count == 0 ? 0 : tiled_scan_workspace(steps);
}

template <typename T>
void discounted_scan(const T* values, Segments segments, double discount, bool reverse, T* out,
                     ScanWorkspace workspace, cudaStream_t stream) {
    if (reverse) {
        scan(DiscountedOp<true, T>{values, out, discount}, segments, {values, out}, workspace, stream);
    } else {
        scan(DiscountedOp<false, T>{values, out, discount}, segments, {values, out}, workspace, stream);
    }
}

template <typename T>
void linear_recurrence(const T* values, const T* coefficients, Segments segments, bool reverse, T* out,
                       ScanWorkspace workspace, cudaStream_t stream) {
    const auto arrays = {static_cast<const void*>(values), static_cast<const void*>(coefficients),
                         static_cast<const void*>(out)};
    if (reverse) {
        scan(RecurrenceOp<true, T>{values, coefficients, out}, segments, arrays, workspace, stream);
    } else {
        scan(RecurrenceOp<false, T>{values, coefficients, out}, segments, arrays, workspace, stream);
    }
}

#define PARL_INSTANTIATE(T)                                                                              \
    template void discounted_scan<T>(const T*, Segments, double, bool, T*, ScanWorkspace, cudaStream_t); \
    template void linear_recurrence<T>(const T*, const T*, Segments, bool, T*, ScanWorkspace, cudaStream_t);
PARL_INSTANTIATE(float)
PARL_INSTANTIATE(double)
PARL_INSTANTIATE(BFloat16)

}  // namespace parl::cuda
