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
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
PARL_INLINE std::int64_t to_bits(double x) {
    std::int64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
PARL_INLINE float from_bits(std::int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
PARL_INLINE double from_bits(std::int64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
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
    static constexpr float kExpOverflow = 89.0f, kExpUnderflow = -104.0f, kTanhIsOne = 10.0f;
    static constexpr float kBelowNormal = -127.0f;
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
    static constexpr double kBelowNormal = -1023.0;
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
    return from_bits((to_bits(k + V(F::kRounder)) << F::kMantissa) + F::kOne);
}

// x·2^k for an integer-valued k, in two factors, since 2^k itself may be denormal or infinite where x·2^k is
// not. A machine that has an instruction for it overloads this.
template <typename V>
PARL_INLINE V scale_by_power_of_two(V x, V k) {
    using F = Format<typename ScalarOf<V>::type>;
    const V half = (k * V(0.5) + V(F::kRounder)) - V(F::kRounder);
    return x * power_of_two(half) * power_of_two(k - half);
}

// e^r − 1 for |r| ≤ ln(2)/2, by its series.
template <typename V>
PARL_INLINE V expm1_reduced(V r) {
    using S = typename ScalarOf<V>::type;
    V tail;
    if constexpr (sizeof(S) == 4) {
        tail = V(S(1.0 / 5040));
        tail = tail * r + V(S(1.0 / 720));
        tail = tail * r + V(S(1.0 / 120));
    } else {
        tail = V(S(1.0 / 6227020800.0));
        tail = tail * r + V(S(1.0 / 479001600.0));
        tail = tail * r + V(S(1.0 / 39916800.0));
        tail = tail * r + V(S(1.0 / 3628800.0));
        tail = tail * r + V(S(1.0 / 362880.0));
        tail = tail * r + V(S(1.0 / 40320.0));
        tail = tail * r + V(S(1.0 / 5040));
        tail = tail * r + V(S(1.0 / 720));
        tail = tail * r + V(S(1.0 / 120));
    }
    tail = tail * r + V(S(1.0 / 24));
    tail = tail * r + V(S(1.0 / 6));
    tail = tail * r + V(S(0.5));
    return r + (r * r) * tail;
}

// x = k·ln 2 + r with |r| ≤ ln(2)/2, x within the range where e^x neither overflows nor vanishes.
template <typename V>
struct Reduced {
    V k, r;
};
template <typename V>
PARL_INLINE Reduced<V> reduce_by_ln2(V x) {
    using F = Format<typename ScalarOf<V>::type>;
    x = maximum(minimum(x, V(F::kExpOverflow)), V(F::kExpUnderflow));
    const V k = (x * V(F::kLog2E) + V(F::kRounder)) - V(F::kRounder);
    return {k, (x - k * V(F::kLn2High)) - k * V(F::kLn2Low)};
}

// e^x and e^x − 1, of one reduction; what is not used is not computed.
template <typename V>
struct Exponentials {
    V exp, expm1;
};
template <typename V>
PARL_INLINE Exponentials<V> exponentials(V x) {
    using F = Format<typename ScalarOf<V>::type>;
    const Reduced<V> reduced = reduce_by_ln2(x);
    const V tail = expm1_reduced(reduced.r);
    // Half of 2^k, since 2^k is infinite for the largest x. Where it would be denormal, e^x − 1 is −1.
    const V half = power_of_two(maximum(reduced.k - V(1), V(F::kBelowNormal)));
    const V half_expm1 = half * tail + (half - V(0.5));
    return {scale_by_power_of_two(tail + V(1), reduced.k), half_expm1 + half_expm1};
}

template <typename V>
PARL_INLINE V exp(V x) {
    return exponentials(x).exp;
}

template <typename V>
PARL_INLINE V expm1(V x) {
    return exponentials(x).expm1;
}

// log(2^e·(1 + f)) for f in [√½ − 1, √2 − 1].
template <typename V>
PARL_INLINE V log_reduced(V f, V e) {
    using S = typename ScalarOf<V>::type;
    using F = Format<S>;
    const V s = f / (V(2) + f), z = s * s;
    V series;
    if constexpr (sizeof(S) == 4) {
        series = V(S(2.0 / 11));
    } else {
        series = V(S(2.0 / 23));
        series = series * z + V(S(2.0 / 21));
        series = series * z + V(S(2.0 / 19));
        series = series * z + V(S(2.0 / 17));
        series = series * z + V(S(2.0 / 15));
        series = series * z + V(S(2.0 / 13));
        series = series * z + V(S(2.0 / 11));
    }
    series = series * z + V(S(2.0 / 9));
    series = series * z + V(S(2.0 / 7));
    series = series * z + V(S(2.0 / 5));
    series = series * z + V(S(2.0 / 3));
    const V square = V(0.5) * f * f;
    return e * V(F::kLn2High) + (f - (square - (s * (square + series * z) + e * V(F::kLn2Low))));
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
    const auto bits = to_bits(normal) + (F::kOne - kRootHalf);
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
    // At the ends, where the correction is 0/0 or −inf/inf.
    return select(absolute(u) == V(F::kInfinity), u, select(u == V(0), V(-F::kInfinity), value));
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
