// Scans of the lanes of one vector, and the loop that takes trajectories vector by vector.
//
// A step of a scan waits for the one before. Within a vector log2(W) rounds do what W steps would (Hillis and
// Steele, 1986), so that one dependent multiply-add a vector remains, the one with the carry.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/scan.h"
#include "cpu/simd.h"
#include "math/scan.h"

namespace parl::cpu::PARL_ISA {

template <typename T>
inline constexpr int kWidth = Vec<T>::kWidth;

// The lanes kSteps earlier in the scan: those of `y` as far as they reach, then those of `before`, the vector
// that the scan has come from.
template <bool kReverse, int kSteps, typename T>
PARL_INLINE Vec<T> earlier(Vec<T> y, Vec<T> before) {
    typename Lanes<T>::Native index;
    for (int i = 0; i < kWidth<T>; ++i) index[i] = kReverse ? i + kSteps : kWidth<T> - kSteps + i;
#if defined(__clang__)
    T both[2 * kWidth<T>];
    (kReverse ? y : before).store(both);
    (kReverse ? before : y).store(both + kWidth<T>);
    return Vec<T>::load(both + index[0]);
#else
    return {kReverse ? __builtin_shuffle(y.v, before.v, index) : __builtin_shuffle(before.v, y.v, index)};
#endif
}

// The last lane of the scan, in every lane.
template <bool kReverse, typename T>
PARL_INLINE Vec<T> last_lane(Vec<T> y) {
    return Vec<T>(y.v[kReverse ? 0 : kWidth<T> - 1]);
}

// The first lane of the scan.
template <bool kReverse, typename T>
PARL_INLINE Lanes<T> is_first_lane() {
    Lanes<T> lanes{};
    lanes.v[kReverse ? kWidth<T> - 1 : 0] = -1;
    return lanes;
}

template <typename T>
PARL_INLINE bool any_nan(Vec<T> y) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask(y.v, y.v, _CMP_UNORD_Q) != 0;
    if constexpr (sizeof(T) == 8) return _mm512_cmp_pd_mask(y.v, y.v, _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) return _mm256_movemask_ps(_mm256_cmp_ps(y.v, y.v, _CMP_UNORD_Q)) != 0;
    if constexpr (sizeof(T) == 8) return _mm256_movemask_pd(_mm256_cmp_pd(y.v, y.v, _CMP_UNORD_Q)) != 0;
#elif defined(__SSE2__)
    if constexpr (sizeof(T) == 4) return _mm_movemask_ps(_mm_cmpunord_ps(y.v, y.v)) != 0;
    if constexpr (sizeof(T) == 8) return _mm_movemask_pd(_mm_cmpunord_pd(y.v, y.v)) != 0;
#else
    const T sum = y.sum();
    return sum != sum;
#endif
}

// y_i = x_i + c_i · y_{i−1}, lane after lane.
template <bool kReverse, typename T>
PARL_INLINE Vec<T> scan_one_by_one(Vec<T> x, Vec<T> carry, Vec<T> coefficients) {
    Vec<T> y;
    T last = carry.v[0];
    for (int i = 0; i < kWidth<T>; ++i) {
        const int lane = kReverse ? kWidth<T> - 1 - i : i;
        last = math::scan_step(x.v[lane], last, coefficients.v[lane]);
        y.v[lane] = last;
    }
    return y;
}

// Powers of one coefficient.
template <typename T>
struct Powers {
    Vec<T> square[4];  // c, c², c⁴, c⁸
    Vec<T> carry;      // c to the number of lanes from the carry
    bool are_normal;   // or they are of c = 0: none has overflowed or lost digits below the normal numbers
};

template <bool kReverse, typename T>
PARL_INLINE Powers<T> powers_of(T coefficient) {
    Powers<T> powers;
    T power = coefficient;
    for (int k = 0; k < 4; ++k, power *= power) powers.square[k] = Vec<T>(power);
    power = coefficient;
    for (int i = 0; i < kWidth<T>; ++i, power *= coefficient) {
        powers.carry.v[kReverse ? kWidth<T> - 1 - i : i] = power;
    }
    using F = math::Format<T>;
    const T highest = math::absolute(powers.carry.v[kReverse ? 0 : kWidth<T> - 1]);
    powers.are_normal = coefficient == T(0) || (highest >= F::kSmallest && highest <= F::kLargest);
    return powers;
}

// y_i = x_i + c · y_{i−1} over the lanes (in the direction of the scan), and the carry into the first.
template <bool kReverse, typename T>
PARL_INLINE Vec<T> scan_lanes(Vec<T> x, Vec<T> carry, const Powers<T>& powers) {
    if (__builtin_expect(!powers.are_normal, 0)) return scan_one_by_one<kReverse>(x, carry, powers.square[0]);
    const Vec<T> none(T(0));
    Vec<T> y = math::scan_step(x, earlier<kReverse, 1>(x, none), powers.square[0]);
    if constexpr (kWidth<T> > 2) y = math::scan_step(y, earlier<kReverse, 2>(y, none), powers.square[1]);
    if constexpr (kWidth<T> > 4) y = math::scan_step(y, earlier<kReverse, 4>(y, none), powers.square[2]);
    if constexpr (kWidth<T> > 8) y = math::scan_step(y, earlier<kReverse, 8>(y, none), powers.square[3]);
    y = math::scan_step(y, carry, powers.carry);
    // A sum over some of the lanes may overflow where the recurrence itself, step by step, does not.
    if (__builtin_expect(!any_nan(y * Vec<T>(T(0))), 1)) return y;
    return scan_one_by_one<kReverse>(x, carry, powers.square[0]);
}

// One round of the scan with a coefficient for every lane.
template <bool kReverse, int kSteps, typename T>
PARL_INLINE void scan_round(Vec<T>& x, Vec<T>& coefficients) {
    x = math::scan_step(x, earlier<kReverse, kSteps>(x, Vec<T>(T(0))), coefficients);
    coefficients = coefficients * earlier<kReverse, kSteps>(coefficients, Vec<T>(T(1)));
}

// y_i = x_i + c_i · y_{i−1} over the lanes, and the carry into the first of them.
template <bool kReverse, typename T>
PARL_INLINE Vec<T> scan_lanes(Vec<T> x, Vec<T> carry, Vec<T> coefficients) {
    Vec<T> y = x, products = coefficients;
    scan_round<kReverse, 1>(y, products);
    if constexpr (kWidth<T> > 2) scan_round<kReverse, 2>(y, products);
    if constexpr (kWidth<T> > 4) scan_round<kReverse, 4>(y, products);
    if constexpr (kWidth<T> > 8) scan_round<kReverse, 8>(y, products);
    y = math::scan_step(y, carry, products);
    // A product of coefficients may overflow where the recurrence itself, step by step, does not.
    if (__builtin_expect(!any_nan((y + products) * Vec<T>(T(0))), 1)) return y;
    return scan_one_by_one<kReverse>(x, carry, coefficients);
}

// How a vector at `from + i` is read and written: in full …
template <typename T>
struct Whole {
    PARL_INLINE Vec<T> load(const T* from, std::int64_t i) const { return Vec<T>::load(from + i); }
    PARL_INLINE void store(Vec<T> y, T* to, std::int64_t i) const { y.store(to + i); }
};

// … or only those lanes that lie in [begin, end) of the array.
template <typename T>
struct Part {
    std::int64_t begin, end;

    PARL_INLINE Vec<T> load(const T* from, std::int64_t i) const {
        Vec<T> y(T(0));
        for (std::int64_t k = begin; k < end; ++k) y.v[k - i] = from[k];
        return y;
    }
    PARL_INLINE void store(Vec<T> y, T* to, std::int64_t i) const {
        for (std::int64_t k = begin; k < end; ++k) to[k] = y.v[k - i];
    }
};

// Takes trajectories [first, last) through `scan`, a vector at a time: scan.begin(n), then scan.step(i,
// access) for the vectors at i, in the scan's direction from the trajectory's first step there. The last
// vector of a trajectory may reach into the next one in that direction, which then writes over what is wrong
// there; at the end of the range, where other threads write, it does not.
template <bool kReverse, typename T, typename Scan>
PARL_INLINE void scan_range(const Segments& segments, std::int64_t first, std::int64_t last, Scan scan) {
    constexpr std::int64_t kStep = kWidth<T>;
    if (first == last) return;
    const std::int64_t low = segments.start(first), high = segments.start(last);
    for (std::int64_t m = first; m < last; ++m) {
        const std::int64_t n = kReverse ? last - 1 - (m - first) : m;
        const std::int64_t start = segments.start(n), stop = segments.start(n + 1);
        scan.begin(n);
        if constexpr (kReverse) {
            std::int64_t i = stop - kStep;
            for (; i >= start; i -= kStep) scan.step(i, Whole<T>{});
            if (i + kStep == start) continue;
            if (i >= low) {
                scan.step(i, Whole<T>{});
            } else {
                scan.step(i, Part<T>{start, i + kStep});
            }
        } else {
            std::int64_t i = start;
            for (; i + kStep <= stop; i += kStep) scan.step(i, Whole<T>{});
            if (i == stop) continue;
            if (i + kStep <= high) {
                scan.step(i, Whole<T>{});
            } else {
                scan.step(i, Part<T>{i, stop});
            }
        }
    }
}

}  // namespace parl::cpu::PARL_ISA
