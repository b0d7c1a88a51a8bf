#include "cpu/scan.h"

#include <algorithm>

#include "math/scan.h"

namespace parl::cpu {
namespace {

// Below this many elements a thread costs more to wake than it saves.
constexpr std::int64_t kParallelElements = std::int64_t{1} << 18;

// Every step of a scan waits for the one before; steps of different trajectories do not. So this many are
// scanned side by side, which hides the latency of the arithmetic.
constexpr int kGroup = 4;

// Scans up to kGroup trajectories, in the direction kStep: 1 forwards, -1 backwards.
template <int kStep, typename T>
void scan_group(const T* values, const std::int64_t* offsets, std::int64_t num_trajectories, T discount,
                T* out) {
    std::int64_t position[kGroup];
    std::int64_t remaining[kGroup];
    T carry[kGroup] = {};
    for (std::int64_t k = 0; k < num_trajectories; ++k) {
        position[k] = kStep > 0 ? offsets[k] : offsets[k + 1] - 1;
        remaining[k] = offsets[k + 1] - offsets[k];
    }
    if (num_trajectories == kGroup) {
        const std::int64_t common = *std::min_element(remaining, remaining + kGroup);
        for (std::int64_t step = 0; step < common; ++step) {
            for (int k = 0; k < kGroup; ++k) {
                const std::int64_t i = position[k] + kStep * step;
                out[i] = carry[k] = math::scan_step(values[i], carry[k], discount);
            }
        }
        for (int k = 0; k < kGroup; ++k) {
            position[k] += kStep * common;
            remaining[k] -= common;
        }
    }
    for (std::int64_t k = 0; k < num_trajectories; ++k) {
        T tail = carry[k];
        for (std::int64_t step = 0; step < remaining[k]; ++step) {
            const std::int64_t i = position[k] + kStep * step;
            out[i] = tail = math::scan_step(values[i], tail, discount);
        }
    }
}

}  // namespace

template <typename T>
void segmented_scan(const T* values, const std::int64_t* offsets, std::int64_t num_trajectories, T discount,
                    bool reverse, [[maybe_unused]] int num_threads, T* out) {
    [[maybe_unused]] const bool parallel =
        num_threads > 1 && num_trajectories > kGroup && offsets[num_trajectories] >= kParallelElements;
    // Guided, since lengths may be far apart.
#ifdef _OPENMP
#pragma omp parallel for schedule(guided) num_threads(num_threads) if (parallel)
#endif
    for (std::int64_t first = 0; first < num_trajectories; first += kGroup) {
        const std::int64_t count = std::min<std::int64_t>(kGroup, num_trajectories - first);
        if (reverse) {
            scan_group<-1>(values, offsets + first, count, discount, out);
        } else {
            scan_group<1>(values, offsets + first, count, discount, out);
        }
    }
}

template void segmented_scan<float>(const float*, const std::int64_t*, std::int64_t, float, bool, int,
                                    float*);
template void segmented_scan<double>(const double*, const std::int64_t*, std::int64_t, double, bool, int,
                                     double*);

}  // namespace parl::cpu
