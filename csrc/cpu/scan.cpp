#include "cpu/scan.h"

#include <algorithm>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/pages.h"
#include "cpu/scan_kernels.h"

namespace parl::cpu {
namespace {

// Elements read and written below which one thread does all. A second one pays from a quarter of this on, by
// a few microseconds; but where other processes want the cores, waiting for it takes milliseconds.
constexpr std::int64_t kParallelElements = std::int64_t{1} << 17;

// The first trajectory of part `k` of `parts` with about as many steps each.
std::int64_t split(const Segments& segments, std::int64_t k, std::int64_t parts) {
    if (segments.offsets == nullptr) return segments.count * k / parts;
    const std::int64_t* end = segments.offsets + segments.count;
    if (k == parts) return segments.count;
    return std::lower_bound(segments.offsets, end, segments.steps() * k / parts) - segments.offsets;
}

// Calls range(first, last) on parts of the trajectories, each from a thread of its own. `elements`: read and
// written in a step.
template <typename Range>
void in_parallel([[maybe_unused]] const Segments& segments, [[maybe_unused]] std::int64_t elements,
                 [[maybe_unused]] int num_threads, Range range) {
#ifdef _OPENMP
    if (num_threads > 1 && segments.count > 1 && elements * segments.steps() >= kParallelElements) {
        const int most = static_cast<int>(std::min<std::int64_t>(num_threads, segments.count));
#pragma omp parallel num_threads(most)
        {
            const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
            range(split(segments, thread, threads), split(segments, thread + 1, threads));
        }
        return;
    }
#endif
    range(std::int64_t{0}, segments.count);
}

template <typename T>
void prepare_output(const Segments& segments, T* out) {
    prefer_huge_pages(out, segments.steps() * static_cast<std::int64_t>(sizeof(T)));
}

}  // namespace

std::int64_t first_decrease(const std::int64_t* offsets, std::int64_t count) {
    // Without a branch for each, so that it is vectorised.
    bool any = false;
    for (std::int64_t n = 0; n < count; ++n) any |= offsets[n + 1] < offsets[n];
    if (!any) return 0;
    std::int64_t n = 1;
    while (offsets[n] >= offsets[n - 1]) ++n;
    return n;
}

template <typename T>
void discounted_scan(const T* values, Segments segments, T discount, bool reverse, int num_threads, T* out) {
    prepare_output(segments, out);
    in_parallel(segments, 2, num_threads, [&](std::int64_t first, std::int64_t last) {
        PARL_DISPATCH(discounted_scan_range(values, segments, first, last, discount, reverse, out));
    });
}

template <typename T>
void linear_recurrence(const T* values, const T* coefficients, Segments segments, bool reverse,
                       int num_threads, T* out) {
    prepare_output(segments, out);
    in_parallel(segments, 3, num_threads, [&](std::int64_t first, std::int64_t last) {
        PARL_DISPATCH(linear_recurrence_range(values, coefficients, segments, first, last, reverse, out));
    });
}

template <typename T>
void lambda_returns(const Returns<T>& returns, Segments segments, bool add_values, int num_threads, T* out) {
    prepare_output(segments, out);
    in_parallel(segments, 3, num_threads, [&](std::int64_t first, std::int64_t last) {
        PARL_DISPATCH(lambda_returns_range(returns, segments, first, last, add_values, out));
    });
}

template <typename T>
void vtrace(const Returns<T>& returns, const T* log_ratios, Clips<T> clips, Segments segments,
            int num_threads, T* targets, T* advantages) {
    prepare_output(segments, targets);
    prepare_output(segments, advantages);
    in_parallel(segments, 5, num_threads, [&](std::int64_t first, std::int64_t last) {
        PARL_DISPATCH(vtrace_range(returns, log_ratios, clips, segments, first, last, targets, advantages));
    });
}

#define PARL_INSTANTIATE(T)                                                          \
    template void discounted_scan<T>(const T*, Segments, T, bool, int, T*);          \
    template void linear_recurrence<T>(const T*, const T*, Segments, bool, int, T*); \
    template void lambda_returns<T>(const Returns<T>&, Segments, bool, int, T*);     \
    template void vtrace<T>(const Returns<T>&, const T*, Clips<T>, Segments, int, T*, T*);
PARL_INSTANTIATE(float)
PARL_INSTANTIATE(double)

}  // namespace parl::cpu
