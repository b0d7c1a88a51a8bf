// exp, log and what is made of them, for scalars and for vectors alike.
//
// Each function is a template over V: float, double, or a vector of them (cpu/simd.h) that has the operators
// of its scalar and the primitives below. No branches and no tables, so that vectors compute all lanes alike.
// Errors are a few units in the last place; NaNs stay NaNs; overflow gives an infinity and underflow a
// denormal number or zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/inline.h"

namespace parl::math {

// The primitives, for scalars. Vectors have their own, found by argument-dependent lookup.
template <typename V>
struct ScalarOf {
    using type = typename V::Scalar;
};
template <>
struct ScalarOf<float> {
    using type = float;
};
template <>
struct ScalarOf<double> {
    using type = double;
};

PARL_INLINE std::int32_t to_bits(float x) {
    std::int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
PARL_INLINE std::int64_t to_bits(double x) {
    std::int64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
PARL_INLINE float from_bits(std::int32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
PARL_INLINE double from_bits(std::int64_t bits) {
    double x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
// Shifted up, where bits may leave at the top: undefined for a signed scalar, not for a vector.
PARL_INLINE std::int32_t shift_up(std::int32_t bits, int places) {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(bits) << places);
}
PARL_INLINE std::int64_t shift_up(std::int64_t bits, int places) {
    return static_cast<std::int64_t>(static_cast<std::uint64_t>(bits) << places);
}
template <typename Bits>
PARL_INLINE Bits shift_up(Bits bits, int places) {
    return bits << places;
}
// The sum, which wraps around for the bits of some NaNs: undefined for a signed scalar, not for a vector.
PARL_INLINE std::int32_t add_bits(std::int32_t bits, std::int32_t number) {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(bits) + static_cast<std::uint32_t>(number));
}
PARL_INLINE std::int64_t add_bits(std::int64_t bits, std::int64_t number) {
    return static_cast<std::int64_t>(static_cast<std::uint64_t>(bits) + static_cast<std::uint64_t>(number));
}
template <typename Bits, typename Number>
PARL_INLINE Bits add_bits(Bits bits, Number number) {
    return bits + number;
}
PARL_INLINE float select(bool condition, float yes, float no) { return condition ? yes : no; }
PARL_INLINE double select(bool condition, double yes, double no) { return condition ? yes : no; }

// What the formats are made of. kRounder is 1.5·2^mantissa: adding it rounds to an integer, which then stands
// in the lowest bits.
template <typename S>
struct Format;
template <>
struct Format<float> {
    using Bits = std::int32_t;
    static constexpr int kMantissa = 23;
    static constexpr Bits kOne = 0x3f800000, kMantissaMask = 0x007fffff;
    static constexpr float kRounder = 12582912.0f, kSmallest = 1.17549435e-38f, kInfinity = __builtin_inff();
    static constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    // Within ±kExpBound, e^x is a normal number.
    static constexpr float kExpOverflow = 89.0f, kExpUnderflow = -104.0f, kTanhIsOne = 10.0f;
    static constexpr float kBelowNormal = -127.0f, kExpBound = 87.0f;
    static constexpr float kLargest = 3.40282347e+38f, kLargestRoot = 1e19f;
};
template <>
struct Format<double> {
    using Bits = std::int64_t;
    static constexpr int kMantissa = 52;
    static constexpr Bits kOne = 0x3ff0000000000000, kMantissaMask = 0x000fffffffffffff;
    static constexpr double kRounder = 6755399441055744.0, kSmallest = 2.2250738585072014e-308;
    static constexpr double kInfinity = __builtin_inf();
    static constexpr double kLog2E = 1.4426950408889634, kLn2High = 6.93147180369123816490e-01;
    static constexpr double kLn2Low = 1.90821492927058770002e-10;
    static constexpr double kExpOverflow = 710.0, kExpUnderflow = -746.0, kTanhIsOne = 20.0;
    static constexpr double kBelowNormal = -1023.0, kExpBound = 708.0;
    static constexpr double kLargest = 1.7976931348623157e308, kLargestRoot = 1e154;
};

template <typename V>
PARL_INLINE V absolute(V x) {
    return select(x < V(0), V(0) - x, x);
}

template <typename V>
PARL_INLINE V maximum(V x, V y) {
    return select(x < y, y, x);  // of a NaN x: x
}

template <typename V>
PARL_INLINE V minimum(V x, V y) {
    return select(y < x, y, x);  // of a NaN x: x
}

// 2^k for an integer-valued k within the exponents of normal numbers, 0 for the one below them.
template <typename V>
PARL_INLINE V power_of_two(V k) {
    using F = Format<typename ScalarOf<V>::type>;
    return from_bits(add_bits(shift_up(to_bits(k + V(F::kRounder)), F::kMantissa), F::kOne));
}

// x·2^k for an integer-valued k, in two factors, since 2^k itself may be denormal or infinite where x·2^k is
// not. A machine that has an instruction for it overloads this.
template <typename V>
PARL_INLINE V scale_by_power_of_two(V x, V k) {
    using F = Format<typename ScalarOf<V>::type>;
    const V half = (k * V(0.5) + V(F::kRounder)) - V(F::kRounder);
    return x * power_of_two(half) * power_of_two(k - half);
}

// Σᵢ coefficients[i]·xⁱ by Horner's rule.
template <typename V, int kCount>
PARL_INLINE V polynomial(V x, const typename ScalarOf<V>::type (&coefficients)[kCount]) {
    V value(coefficients[kCount - 1]);
    for (int i = kCount - 2; i >= 0; --i) value = value * x + V(coefficients[i]);
    return value;
}

// e^r − 1 for |r| ≤ ln(2)/2, as r + r²·tail: by its series, in single precision by a minimax polynomial that
// is 3e-9 off at most.
template <typename V>
PARL_INLINE V expm1_reduced(V r) {
    V tail;
    if constexpr (sizeof(typename ScalarOf<V>::type) == 4) {
        constexpr float kTail[] = {0.5f, 0.166665183f, 0.0416662042f, 0.00836895371f, 0.00139506003f};
        tail = polynomial(r, kTail);
    } else {
        constexpr double kTail[] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                    1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                    1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
        tail = polynomial(r, kTail);
    }
    return r + (r * r) * tail;
}

// x, or where e^x is infinite or zero a bound beyond which it is, too.
template <typename V>
PARL_INLINE V within_exp(V x) {
    using F = Format<typename ScalarOf<V>::type>;
    return maximum(minimum(x, V(F::kExpOverflow)), V(F::kExpUnderflow));
}

// x = k·ln 2 + r with |r| ≤ ln(2)/2, for x from `within_exp`.
template <typename V>
struct Reduced {
    V k, r;
};
template <typename V>
PARL_INLINE Reduced<V> reduce_by_ln2(V x) {
    using F = Format<typename ScalarOf<V>::type>;
    const V k = (x * V(F::kLog2E) + V(F::kRounder)) - V(F::kRounder);
    return {k, (x - k * V(F::kLn2High)) - k * V(F::kLn2Low)};
}

template <typename V>
PARL_INLINE V exp(V x) {
    const Reduced<V> reduced = reduce_by_ln2(within_exp(x));
    return scale_by_power_of_two(expm1_reduced(reduced.r) + V(1), reduced.k);
}

template <typename V>
PARL_INLINE V expm1(V x) {
    using F = Format<typename ScalarOf<V>::type>;
    const Reduced<V> reduced = reduce_by_ln2(within_exp(x));
    // Half of 2^k, since 2^k is infinite for the largest x. Where it would be denormal, e^x − 1 is −1.
    const V half = power_of_two(maximum(reduced.k - V(1), V(F::kBelowNormal)));
    const V half_expm1 = half * expm1_reduced(reduced.r) + (half - V(0.5));
    return half_expm1 + half_expm1;
}

// log(2^e·(1 + f)) for f in [√½ − 1, √2 − 1].
template <typename V>
PARL_INLINE V log_reduced(V f, V e) {
    using S = typename ScalarOf<V>::type;
    using F = Format<S>;
    const V square = V(0.5) * f * f;
    if constexpr (sizeof(S) == 4) {
        // log(1 + f) = f − f²/2 + f³·tail; tail is minimax, of error 6e-9 in log(1 + f).
        constexpr float kTail[] = {0.333333317f, -0.250008227f, 0.200012332f, -0.166232975f,
                                   0.142015575f, -0.131605952f, 0.127633003f, -0.0763558823f};
        const V rest = (V(2) * square * f) * polynomial(f, kTail) + e * V(F::kLn2Low);
        return e * V(F::kLn2High) + (f - (square - rest));
    } else {
        // By the series of the inverse hyperbolic tangent: log(1 + f) = 2 artanh(s).
        constexpr double kSeries[] = {2.0 / 3,  2.0 / 5,  2.0 / 7,  2.0 / 9, 2.0 / 11,
                                      2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19};
        const V s = f / (V(2) + f), z = s * s;
        const V rest = s * (square + polynomial(z, kSeries) * z) + e * V(F::kLn2Low);
        return e * V(F::kLn2High) + (f - (square - rest));
    }
}

template <typename V>
PARL_INLINE V log(V x) {
    using S = typename ScalarOf<V>::type;
    using F = Format<S>;
    // Denormal numbers are lifted into the normal range.
    const V lift = V(S(typename F::Bits(1) << F::kMantissa));
    const V normal = select(x < V(F::kSmallest), x * lift, x);
    const V shift = select(x < V(F::kSmallest), V(S(-F::kMantissa)), V(0));
    // normal = 2^e · m with m in [√½, √2).
    constexpr typename F::Bits kRootHalf = sizeof(S) == 4 ? 0x3f3504f3 : 0x3fe6a09e667f3bcd;
    const auto bits = add_bits(to_bits(normal), F::kOne - kRootHalf);
    const auto exponent = (bits >> F::kMantissa) - (F::kOne >> F::kMantissa);
    const V e = (from_bits(exponent + to_bits(S(F::kRounder))) - V(F::kRounder)) + shift;
    const V m = from_bits((bits & F::kMantissaMask) + kRootHalf);
    V value = log_reduced(m - V(1), e);
    value = select(x == V(F::kInfinity), x, value);
    value = select(x == V(0), V(-F::kInfinity), value);
    value = select(x < V(0), V(__builtin_nan("")), value);
    return select(x == x, value, x);
}

template <typename V>
PARL_INLINE V log1p(V x) {
    using F = Format<typename ScalarOf<V>::type>;
    const V u = x + V(1);
    const V value = log(u) + (x - (u - V(1))) / u;  // what 1 + x has rounded away
    // At the ends, where the correction is −1/0 or inf − inf.
    return select(u == V(F::kInfinity), u, select(u == V(0), V(-F::kInfinity), value));
}

template <typename V>
PARL_INLINE V tanh(V x) {
    using F = Format<typename ScalarOf<V>::type>;
    V size = absolute(x);
    size = select(size > V(F::kTanhIsOne), V(F::kTanhIsOne), size);
    const V twice = expm1(size + size);
    const V value = twice / (twice + V(2));
    return select(x < V(0), V(0) - value, value);
}

template <typename V>
PARL_INLINE V sigmoid(V x) {
    const V small = exp(V(0) - absolute(x));
    return select(x < V(0), small, V(1)) / (V(1) + small);
}

// log(1 + e^x).
template <typename V>
PARL_INLINE V softplus(V x) {
    return maximum(x, V(0)) + log1p(exp(V(0) - absolute(x)));
}

}  // namespace parl::math
