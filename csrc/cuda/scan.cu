#include "cuda/launch.h"
#include "cuda/scan.h"
#include "math/scan.h"

namespace parl::cuda {
namespace {

constexpr unsigned kThreads = 128;

// A warp takes a trajectory, 32 steps at a time.
template <bool kReverse, typename T>
__global__ void __launch_bounds__(kThreads)
    scan_trajectories(const T* __restrict__ values, Segments segments, T discount, T* __restrict__ out) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const std::int64_t n = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp;
    if (n >= segments.count) return;
    const std::int64_t begin = segments.offsets != nullptr ? segments.offsets[n] : n * segments.horizon;
    const std::int64_t end =
        segments.offsets != nullptr ? segments.offsets[n + 1] : (n + 1) * segments.horizon;
    const std::int64_t start = max(begin, std::int64_t{0}), stop = min(end, segments.steps);
    T carry(0);
    for (std::int64_t first = start; first < stop; first += kWarp) {
        const std::int64_t i = kReverse ? stop - 1 - (first - start) - lane : first + lane;
        const bool inside = kReverse ? i >= start : i < stop;
        T y = inside ? values[i] : T(0), power = discount;
        for (int delta = 1; delta < kWarp; delta *= 2, power *= power) {
            const T earlier = __shfl_up_sync(kAllLanes, y, static_cast<unsigned>(delta));
            if (lane >= delta) y = math::scan_step(y, earlier, power);
        }
        T to_carry = discount;
        for (int k = 0; k < lane; ++k) to_carry *= discount;
        y = math::scan_step(y, carry, to_carry);
        if (inside) out[i] = y;
        carry = __shfl_sync(kAllLanes, y, kWarp - 1);
    }
}

}  // namespace

template <typename T>
void discounted_scan(const T* values, Segments segments, double discount, bool reverse, T* out,
                     cudaStream_t stream) {
    if (segments.steps == 0) return;
    const auto blocks = static_cast<unsigned>((segments.count * kWarp + kThreads - 1) / kThreads);
    const auto kernel = reverse ? &scan_trajectories<true, T> : &scan_trajectories<false, T>;
    launch(kernel, dim3(blocks), dim3(kThreads), 0, stream, values, segments, static_cast<T>(discount), out);
}

template void discounted_scan(const float*, Segments, double, bool, float*, cudaStream_t);
template void discounted_scan(const double*, Segments, double, bool, double*, cudaStream_t);

}  // namespace parl::cuda
