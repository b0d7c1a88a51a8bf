// Vectors of float and double as wide as the instruction set this source is compiled for (see isa.h).
//
// GCC's and Clang's vector extensions: the same source serves SSE2, AVX2, AVX-512 and NEON. a * b + c becomes
// a fused multiply-add where there is one.
#pragma once

#ifndef PARL_ISA
#error "simd.h is for sources that are compiled once for each instruction set: see isa.h"
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "math/elementary.h"

namespace parl::cpu::PARL_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

// The compiler's own vector types; not dependent, since GCC forgets the attribute on a dependent type.
typedef float NativeFloats __attribute__((vector_size(kVectorBytes)));
typedef double NativeDoubles __attribute__((vector_size(kVectorBytes)));
typedef std::int32_t NativeInts __attribute__((vector_size(kVectorBytes)));
typedef std::int64_t NativeLongs __attribute__((vector_size(kVectorBytes)));

template <typename T>
struct NativeOf;
template <>
struct NativeOf<float> {
    using Values = NativeFloats;
    using Bits = NativeInts;
    using Bit = std::int32_t;
};
template <>
struct NativeOf<double> {
    using Values = NativeDoubles;
    using Bits = NativeLongs;
    using Bit = std::int64_t;
};

// As many integers as Vec<T> has lanes: bit patterns, or all-ones and all-zeros from a comparison.
template <typename T>
struct Lanes {
    using Native = typename NativeOf<T>::Bits;
    Native v;
};
template <typename T>
PARL_INLINE Lanes<T> operator+(Lanes<T> a, typename NativeOf<T>::Bit b) {
    return {a.v + b};
}
template <typename T>
PARL_INLINE Lanes<T> operator-(Lanes<T> a, typename NativeOf<T>::Bit b) {
    return {a.v - b};
}
template <typename T>
PARL_INLINE Lanes<T> operator&(Lanes<T> a, typename NativeOf<T>::Bit b) {
    return {a.v & b};
}
template <typename T>
PARL_INLINE Lanes<T> operator<<(Lanes<T> a, int count) {
    return {a.v << count};
}
template <typename T>
PARL_INLINE Lanes<T> operator>>(Lanes<T> a, int count) {
    return {a.v >> count};
}
template <typename T>
PARL_INLINE Lanes<T> operator&(Lanes<T> a, Lanes<T> b) {
    return {a.v & b.v};
}
template <typename T>
PARL_INLINE Lanes<T> operator|(Lanes<T> a, Lanes<T> b) {
    return {a.v | b.v};
}

template <typename T>
struct Vec {
    using Scalar = T;
    using Native = typename NativeOf<T>::Values;
    static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
    Native v;

    Vec() = default;
    PARL_INLINE Vec(Native native) : v(native) {}
    PARL_INLINE Vec(T scalar) : v(scalar - Native{}) {}

    static PARL_INLINE Vec load(const T* from) {
        Vec out;
        __builtin_memcpy(&out.v, from, sizeof out.v);
        return out;
    }
    PARL_INLINE void store(T* to) const { __builtin_memcpy(to, &v, sizeof v); }

    // The first `count` lanes, the others `rest`; nothing beyond them is read or written.
    static PARL_INLINE Vec load_partial(const T* from, int count, T rest = T(0)) {
        Vec out(rest);
        __builtin_memcpy(&out.v, from, static_cast<unsigned>(count) * sizeof(T));
        return out;
    }
    PARL_INLINE void store_partial(T* to, int count) const {
        __builtin_memcpy(to, &v, static_cast<unsigned>(count) * sizeof(T));
    }

    // 0, 1, 2, …
    static PARL_INLINE Vec iota() {
        T lanes[kWidth];
        for (int i = 0; i < kWidth; ++i) lanes[i] = static_cast<T>(i);
        return load(lanes);
    }

    // By halves, which is exacter and quicker than lane after lane.
    PARL_INLINE T sum() const {
        T lanes[kWidth];
        store(lanes);
        for (int half = kWidth / 2; half > 0; half /= 2) {
            for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
        }
        return lanes[0];
    }
};

template <typename T>
PARL_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) {
    return {a.v + b.v};
}
template <typename T>
PARL_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) {
    return {a.v - b.v};
}
template <typename T>
PARL_INLINE Vec<T> operator-(Vec<T> a) {
    return {-a.v};
}
template <typename T>
PARL_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) {
    return {a.v * b.v};
}
template <typename T>
PARL_INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) {
    return {a.v / b.v};
}
template <typename T>
PARL_INLINE Vec<T>& operator+=(Vec<T>& a, Vec<T> b) {
    a.v += b.v;
    return a;
}
template <typename T>
PARL_INLINE Lanes<T> operator<(Vec<T> a, Vec<T> b) {
    return {a.v < b.v};
}
template <typename T>
PARL_INLINE Lanes<T> operator>(Vec<T> a, Vec<T> b) {
    return {a.v > b.v};
}
template <typename T>
PARL_INLINE Lanes<T> operator==(Vec<T> a, Vec<T> b) {
    return {a.v == b.v};
}
template <typename T>
PARL_INLINE Vec<T> select(Lanes<T> condition, Vec<T> yes, Vec<T> no) {
    return {condition.v ? yes.v : no.v};
}
template <typename T>
PARL_INLINE Lanes<T> to_bits(Vec<T> x) {
    return {reinterpret_cast<typename Lanes<T>::Native>(x.v)};
}
template <typename T>
PARL_INLINE Vec<T> from_bits(Lanes<T> bits) {
    return {reinterpret_cast<typename Vec<T>::Native>(bits.v)};
}

// What the machine has instructions for, which of a NaN and a number give their second operand: hence the
// reversed order, for minimum(x, y) and maximum(x, y) to give x.
#if defined(__AVX512F__)
PARL_INLINE Vec<float> minimum(Vec<float> x, Vec<float> y) { return {_mm512_maskz_min_ps(0xffff, y.v, x.v)}; }
PARL_INLINE Vec<float> maximum(Vec<float> x, Vec<float> y) { return {_mm512_maskz_max_ps(0xffff, y.v, x.v)}; }
PARL_INLINE Vec<double> minimum(Vec<double> x, Vec<double> y) {
    return {_mm512_maskz_min_pd(0xff, y.v, x.v)};
}
PARL_INLINE Vec<double> maximum(Vec<double> x, Vec<double> y) {
    return {_mm512_maskz_max_pd(0xff, y.v, x.v)};
}
PARL_INLINE Vec<float> scale_by_power_of_two(Vec<float> x, Vec<float> k) {
    return {_mm512_maskz_scalef_ps(0xffff, x.v, k.v)};
}
PARL_INLINE Vec<double> scale_by_power_of_two(Vec<double> x, Vec<double> k) {
    return {_mm512_maskz_scalef_pd(0xff, x.v, k.v)};
}
#elif defined(__AVX2__)
PARL_INLINE Vec<float> minimum(Vec<float> x, Vec<float> y) { return {_mm256_min_ps(y.v, x.v)}; }
PARL_INLINE Vec<float> maximum(Vec<float> x, Vec<float> y) { return {_mm256_max_ps(y.v, x.v)}; }
PARL_INLINE Vec<double> minimum(Vec<double> x, Vec<double> y) { return {_mm256_min_pd(y.v, x.v)}; }
PARL_INLINE Vec<double> maximum(Vec<double> x, Vec<double> y) { return {_mm256_max_pd(y.v, x.v)}; }
#endif

}  // namespace parl::cpu::PARL_ISA
