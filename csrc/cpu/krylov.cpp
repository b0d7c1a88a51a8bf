#include "cpu/krylov.h"

#include "cpu/simd.h"

namespace parl::cpu::PARL_ISA {
namespace {

// Elements that are summed in T: 16 to a lane of float with AVX-512, 64 without.
constexpr std::int64_t kRun = 512;

// Where a visit is: a whole vector, or the first `count` lanes of one, the others 0.
template <typename T>
struct Whole {
    std::int64_t i;
    PARL_INLINE Vec<T> load(const T* from) const { return Vec<T>::load(from + i); }
    PARL_INLINE void store(Vec<T> values, T* to) const { values.store(to + i); }
};

template <typename T>
struct Part {
    std::int64_t i;
    int count;
    PARL_INLINE Vec<T> load(const T* from) const { return Vec<T>::load_partial(from + i, count); }
    PARL_INLINE void store(Vec<T> values, T* to) const { values.store_partial(to + i, count); }
};

// Visits all elements; `visit` adds to its sums, whose totals are written to `totals`.
template <typename T, int kSums, typename Visit>
PARL_INLINE void sweep(std::int64_t begin, std::int64_t end, const Visit& visit, double* totals) {
    constexpr int kWidth = Vec<T>::kWidth;
    for (int s = 0; s < kSums; ++s) totals[s] = 0.0;
    for (std::int64_t first = begin; first < end; first += kRun) {
        const std::int64_t last = end - first < kRun ? end : first + kRun;
        Vec<T> even[kSums], odd[kSums];  // two chains, so that additions need not wait for one another
        for (int s = 0; s < kSums; ++s) even[s] = odd[s] = Vec<T>(T(0));
        std::int64_t i = first;
        for (; i + 2 * kWidth <= last; i += 2 * kWidth) {
            visit(Whole<T>{i}, even);
            visit(Whole<T>{i + kWidth}, odd);
        }
        if (i + kWidth <= last) {
            visit(Whole<T>{i}, even);
            i += kWidth;
        }
        if (i < last) visit(Part<T>{i, static_cast<int>(last - i)}, odd);
        for (int s = 0; s < kSums; ++s) totals[s] += static_cast<double>((even[s] + odd[s]).sum());
    }
}

template <typename T>
struct SquareVisit {
    const T* r;

    template <typename At>
    PARL_INLINE void operator()(At at, Vec<T>* sums) const {
        const Vec<T> residual = at.load(r);
        sums[0] += residual * residual;
    }
};

template <typename T>
struct CurvatureVisit {
    const T* p;
    Vec<T> damping;
    T* image;

    template <typename At>
    PARL_INLINE void operator()(At at, Vec<T>* sums) const {
        const Vec<T> direction = at.load(p);
        const Vec<T> full = at.load(image) + damping * direction;
        at.store(full, image);
        sums[0] += direction * full;
        sums[1] += direction * direction;
        sums[2] += full * full;
    }
};

template <typename T>
struct StepVisit {
    Vec<T> step;
    const T* p;
    const T* image;
    T* x;
    T* r;

    template <typename At>
    PARL_INLINE void operator()(At at, Vec<T>* sums) const {
        at.store(at.load(x) + step * at.load(p), x);
        const Vec<T> residual = at.load(r) - step * at.load(image);
        at.store(residual, r);
        sums[0] += residual * residual;
    }
};

template <typename T>
struct ResidualVisit {
    const T* rhs;
    const T* x;
    Vec<T> damping;
    T* image;

    template <typename At>
    PARL_INLINE void operator()(At at, Vec<T>* sums) const {
        const Vec<T> value = at.load(x);
        const Vec<T> residual = at.load(rhs) - (at.load(image) + damping * value);
        at.store(residual, image);
        sums[0] += residual * residual;
        sums[1] += value * value;
    }
};

}  // namespace

template <typename T>
double square_sweep(const T* r, std::int64_t begin, std::int64_t end) {
    double total;
    sweep<T, 1>(begin, end, SquareVisit<T>{r}, &total);
    return total;
}

template <typename T>
CurvatureSums curvature_sweep(const T* p, T damping, T* image, std::int64_t begin, std::int64_t end) {
    double totals[3];
    sweep<T, 3>(begin, end, CurvatureVisit<T>{p, Vec<T>(damping), image}, totals);
    return {totals[0], totals[1], totals[2]};
}

template <typename T>
double step_sweep(T step, const T* p, const T* image, T* x, T* r, std::int64_t begin, std::int64_t end) {
    double total;
    sweep<T, 1>(begin, end, StepVisit<T>{Vec<T>(step), p, image, x, r}, &total);
    return total;
}

template <typename T>
void direction_sweep(const T* __restrict r, T ratio, T* __restrict p, std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) p[i] = r[i] + ratio * p[i];
}

template <typename T>
ResidualSums residual_sweep(const T* rhs, const T* x, T damping, T* image, std::int64_t begin,
                            std::int64_t end) {
    double totals[2];
    sweep<T, 2>(begin, end, ResidualVisit<T>{rhs, x, Vec<T>(damping), image}, totals);
    return {totals[0], totals[1]};
}

#define PARL_INSTANTIATE(T)                                                                   \
    template double square_sweep<T>(const T*, std::int64_t, std::int64_t);                    \
    template CurvatureSums curvature_sweep<T>(const T*, T, T*, std::int64_t, std::int64_t);   \
    template double step_sweep<T>(T, const T*, const T*, T*, T*, std::int64_t, std::int64_t); \
    template void direction_sweep<T>(const T*, T, T*, std::int64_t, std::int64_t);            \
    template ResidualSums residual_sweep<T>(const T*, const T*, T, T*, std::int64_t, std::int64_t);
PARL_INSTANTIATE(float)
PARL_INSTANTIATE(double)

}  // namespace parl::cpu::PARL_ISA
