// What is scanned: for each op the terms x and coefficients c of y = x + c · y_earlier, and what becomes of y.
//
// An op reads a chunk of an array of `steps` (`load`), makes the terms once it is known where trajectories begin
// (`prepare`), and writes results (`store`) of y and the y of the step before each in the scan, 0 where there is none.
// Bit k of `heads` tells that the scan of a trajectory begins at the chunk's element k: its first step, or, as the scan
// goes backwards, its last. `bootstrap(k)` is the value after that one.
#pragma once

#include "cuda/chunks.cuh"
#include "cuda/scan.h"
#include "math/scan.h"

namespace parl::cuda {

__device__ __forceinline__ bool is_head(unsigned heads, int k) { return (heads >> k & 1) != 0; }

template <bool kBackwards, typename Element>
struct DiscountedOp {
    using T = Element;
    using S = ComputedType<T>;
    static constexpr bool kReverse = kBackwards;
    static constexpr bool kConstant = true;  // the coefficient is `discount`, everywhere
    static constexpr bool kBootstraps = false;
    static constexpr int kRows = 2;    // chunks of a thread in a tile
    static constexpr int kBlocks = 3;  // tiles on a multiprocessor, for which registers suffice

    const T* values;
    T* out;
    double discount;

    struct Items {
        S x[kChunk<T>];
    };
    __device__ __forceinline__ void load(const Chunk& chunk, std::int64_t, Items& items) const {
        cuda::load(values, chunk, items.x);
    }
    template <typename Bootstrap>
    __device__ __forceinline__ void prepare(Items&, unsigned, const Bootstrap&) const {}
    __device__ __forceinline__ S term(const Items& items, int k) const { return items.x[k]; }
    __device__ __forceinline__ double coefficient(const Items&, int) const { return discount; }
    __device__ __forceinline__ void store(const Items&, const S (&y)[kChunk<T>], const S (&)[kChunk<T>],
                                          const Chunk& chunk) const {
        cuda::store(y, out, chunk);
    }
};

template <bool kBackwards, typename Element>
struct RecurrenceOp {
    using T = Element;
    using S = ComputedType<T>;
    static constexpr bool kReverse = kBackwards;
    static constexpr bool kConstant = false;
    static constexpr bool kBootstraps = false;
    static constexpr int kRows = 2;
    static constexpr int kBlocks = 2;

    const T* values;
    const T* coefficients;
    T* out;

    struct Items {
        S x[kChunk<T>], c[kChunk<T>], before;
    };
    __device__ __forceinline__ void load(const Chunk& chunk, std::int64_t, Items& items) const {
        cuda::load(values, chunk, items.x);
        cuda::load(coefficients, chunk, items.c);
        const bool has_before = !kReverse && chunk.last > 0 && chunk.start > 0;
        items.before = has_before ? widen(coefficients[chunk.start - 1]) : S(0);
    }
    // c_h links steps h and h+1: forwards it is the later one's.
    template <typename Bootstrap>
    __device__ __forceinline__ void prepare(Items&, unsigned, const Bootstrap&) const {}
    __device__ __forceinline__ S term(const Items& items, int k) const { return items.x[k]; }
    __device__ __forceinline__ double coefficient(const Items& items, int k) const {
        if constexpr (kReverse) return items.c[k];
        return k > 0 ? items.c[k - 1] : items.before;
    }
    __device__ __forceinline__ void store(const Items&, const S (&y)[kChunk<T>], const S (&)[kChunk<T>],
                                          const Chunk& chunk) const {
        cuda::store(y, out, chunk);
    }
};

// Values of the steps of a chunk, and of the step after it.
template <typename T>
struct Values {
    ComputedType<T> here[kChunk<T>], after;

    __device__ __forceinline__ void load(const T* values, const Chunk& chunk, std::int64_t steps) {
        cuda::load(values, chunk, here);
        const std::int64_t next = chunk.start + kChunk<T>;
        after = chunk.last > 0 && next < steps ? widen(values[next]) : ComputedType<T>(0);
    }
    // The value after step k, if its trajectory goes on there.
    __device__ __forceinline__ ComputedType<T> next(int k) const {
        return k + 1 < kChunk<T> ? here[k + 1] : after;
    }
};

template <typename Element>
struct LambdaReturnsOp {
    using T = Element;
    using S = ComputedType<T>;
    static constexpr bool kReverse = true;
    static constexpr bool kConstant = true;
    static constexpr bool kBootstraps = true;
    static constexpr int kRows = 2;
    static constexpr int kBlocks = 2;

    Returns<T> returns;
    T* out;
    double discount;  // of the scan: the returns' discount times λ
    bool add_values;

    struct Items {
        S x[kChunk<T>];  // rewards, then errors
        Values<T> values;
    };
    __device__ __forceinline__ void load(const Chunk& chunk, std::int64_t steps, Items& items) const {
        cuda::load(returns.rewards, chunk, items.x);
        items.values.load(returns.values, chunk, steps);
    }
    template <typename Bootstrap>
    __device__ __forceinline__ void prepare(Items& items, unsigned heads, const Bootstrap& bootstrap) const {
#pragma unroll
        for (int k = 0; k < kChunk<T>; ++k) {
            const S next = is_head(heads, k) ? bootstrap(k) : items.values.next(k);
            items.x[k] =
                math::td_error(items.x[k], items.values.here[k], next, static_cast<S>(returns.discount));
        }
    }
    __device__ __forceinline__ S term(const Items& items, int k) const { return items.x[k]; }
    __device__ __forceinline__ double coefficient(const Items&, int) const { return discount; }
    __device__ __forceinline__ void store(const Items& items, const S (&y)[kChunk<T>], const S (&)[kChunk<T>],
                                          const Chunk& chunk) const {
        S results[kChunk<T>];
#pragma unroll
        for (int k = 0; k < kChunk<T>; ++k) results[k] = add_values ? y[k] + items.values.here[k] : y[k];
        cuda::store(results, out, chunk);
    }
};

// The scan's y is v_h − V(s_h).
template <typename Element>
struct VTraceOp {
    using T = Element;
    using S = ComputedType<T>;
    static constexpr bool kReverse = true;
    static constexpr bool kConstant = false;
    static constexpr bool kBootstraps = true;
    static constexpr int kRows = 1;
    static constexpr int kBlocks = 2;

    Returns<T> returns;
    const T* log_ratios;
    Clips clips;
    T* targets;
    T* advantages;

    struct Items {
        S x[kChunk<T>];  // rewards, then errors ρ_h δ_h
        S c[kChunk<T>];  // logarithms of ratios, then discount · c_h
        S rho[kChunk<T>];
        Values<T> values;
    };
    __device__ __forceinline__ void load(const Chunk& chunk, std::int64_t steps, Items& items) const {
        cuda::load(returns.rewards, chunk, items.x);
        cuda::load(log_ratios, chunk, items.c);
        items.values.load(returns.values, chunk, steps);
    }
    template <typename Bootstrap>
    __device__ __forceinline__ void prepare(Items& items, unsigned heads, const Bootstrap& bootstrap) const {
        const S discount = static_cast<S>(returns.discount), trace = static_cast<S>(returns.trace_lambda);
#pragma unroll
        for (int k = 0; k < kChunk<T>; ++k) {
            const S ratio = math::exp(items.c[k]);
            const S next = is_head(heads, k) ? bootstrap(k) : items.values.next(k);
            items.rho[k] = math::clip_above(ratio, static_cast<S>(clips.rho));
            items.c[k] = math::clip_above(ratio, static_cast<S>(clips.c)) * (discount * trace);
            items.x[k] = items.rho[k] * math::td_error(items.x[k], items.values.here[k], next, discount);
        }
    }
    __device__ __forceinline__ S term(const Items& items, int k) const { return items.x[k]; }
    __device__ __forceinline__ double coefficient(const Items& items, int k) const { return items.c[k]; }
    // r_h + discount · v_{h+1} − V(s_h) is the error with V(s_{h+1}) plus discount · (v_{h+1} − V(s_{h+1})).
    __device__ __forceinline__ void store(const Items& items, const S (&y)[kChunk<T>],
                                          const S (&before)[kChunk<T>], const Chunk& chunk) const {
        S results[kChunk<T>];
#pragma unroll
        for (int k = 0; k < kChunk<T>; ++k) results[k] = items.values.here[k] + y[k];
        cuda::store(results, targets, chunk);
#pragma unroll
        for (int k = 0; k < kChunk<T>; ++k) {
            results[k] = items.x[k] + items.rho[k] * static_cast<S>(returns.discount) * before[k];
        }
        cuda::store(results, advantages, chunk);
    }
};

}  // namespace parl::cuda
