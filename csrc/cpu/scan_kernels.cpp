#include "cpu/scan_kernels.h"

#include "cpu/scan_vector.h"

namespace parl::cpu::PARL_ISA {
namespace {

template <bool kReverse, typename T>
struct DiscountedScan {
    const T* values;
    T* out;
    Powers<T> powers;
    Vec<T> carry;

    PARL_INLINE void begin(std::int64_t) { carry = Vec<T>(T(0)); }

    template <typename Access>
    PARL_INLINE void step(std::int64_t i, Access access) {
        const Vec<T> y = scan_lanes<kReverse>(access.load(values, i), carry, powers);
        access.store(y, out, i);
        carry = last_lane<kReverse>(y);
    }
};

template <bool kReverse, typename T>
struct LinearRecurrence {
    const T* values;
    const T* coefficients;
    T* out;
    Vec<T> carry;
    Vec<T> previous;  // coefficients of the vector before
    bool first;

    PARL_INLINE void begin(std::int64_t) {
        carry = previous = Vec<T>(T(0));
        first = true;
    }

    template <typename Access>
    PARL_INLINE void step(std::int64_t i, Access access) {
        Vec<T> c = access.load(coefficients, i);
        if constexpr (!kReverse) {
            const Vec<T> links = earlier<false, 1>(c, previous);
            previous = c;
            c = links;
        } else if (first) {
            c = select(is_first_lane<true, T>(), Vec<T>(T(0)), c);  // there is no step after the last
            first = false;
        }
        const Vec<T> y = scan_lanes<kReverse>(access.load(values, i), carry, c);
        access.store(y, out, i);
        carry = last_lane<kReverse>(y);
    }
};

template <bool kAddValues, typename T>
struct LambdaReturns {
    Returns<T> returns;
    T* out;
    Powers<T> powers;
    Vec<T> carry;
    Vec<T> next;  // values of the vector after

    PARL_INLINE void begin(std::int64_t n) {
        carry = Vec<T>(T(0));
        next = Vec<T>(returns.bootstrap != nullptr ? returns.bootstrap[n] : T(0));
    }

    template <typename Access>
    PARL_INLINE void step(std::int64_t i, Access access) {
        const Vec<T> values = access.load(returns.values, i);
        const Vec<T> errors = math::td_error(access.load(returns.rewards, i), values,
                                             earlier<true, 1>(values, next), Vec<T>(returns.discount));
        next = values;
        const Vec<T> advantages = scan_lanes<true>(errors, carry, powers);
        carry = last_lane<true>(advantages);
        access.store(kAddValues ? advantages + values : advantages, out, i);
    }
};

template <typename T>
struct VTrace {
    Returns<T> returns;
    const T* log_ratios;
    Clips<T> clips;
    T* targets;
    T* advantages;
    Vec<T> carry;
    Vec<T> next;         // values of the vector after
    Vec<T> next_target;  // targets of the vector after

    PARL_INLINE void begin(std::int64_t n) {
        carry = Vec<T>(T(0));
        next = next_target = Vec<T>(returns.bootstrap != nullptr ? returns.bootstrap[n] : T(0));
    }

    template <typename Access>
    PARL_INLINE void step(std::int64_t i, Access access) {
        const Vec<T> discount(returns.discount);
        const Vec<T> rewards = access.load(returns.rewards, i), values = access.load(returns.values, i);
        const Vec<T> ratios = math::exp(access.load(log_ratios, i));
        const Vec<T> rho = math::clip_above(ratios, Vec<T>(clips.rho));
        const Vec<T> c = math::clip_above(ratios, Vec<T>(clips.c));
        const Vec<T> errors = rho * math::td_error(rewards, values, earlier<true, 1>(values, next), discount);
        next = values;
        const Vec<T> corrections =
            scan_lanes<true>(errors, carry, c * Vec<T>(returns.discount * returns.trace_lambda));
        carry = last_lane<true>(corrections);
        const Vec<T> target = values + corrections;
        access.store(target, targets, i);
        access.store(rho * math::td_error(rewards, values, earlier<true, 1>(target, next_target), discount),
                     advantages, i);
        next_target = target;
    }
};

}  // namespace

template <typename T>
void discounted_scan_range(const T* values, const Segments& segments, std::int64_t first, std::int64_t last,
                           T discount, bool reverse, T* out) {
    if (reverse) {
        scan_range<true, T>(segments, first, last,
                            DiscountedScan<true, T>{values, out, powers_of<true>(discount), {}});
    } else {
        scan_range<false, T>(segments, first, last,
                             DiscountedScan<false, T>{values, out, powers_of<false>(discount), {}});
    }
}

template <typename T>
void linear_recurrence_range(const T* values, const T* coefficients, const Segments& segments,
                             std::int64_t first, std::int64_t last, bool reverse, T* out) {
    if (reverse) {
        scan_range<true, T>(segments, first, last,
                            LinearRecurrence<true, T>{values, coefficients, out, {}, {}, true});
    } else {
        scan_range<false, T>(segments, first, last,
                             LinearRecurrence<false, T>{values, coefficients, out, {}, {}, true});
    }
}

template <typename T>
void lambda_returns_range(const Returns<T>& returns, const Segments& segments, std::int64_t first,
                          std::int64_t last, bool add_values, T* out) {
    const Powers<T> powers = powers_of<true>(returns.discount * returns.trace_lambda);
    if (add_values) {
        scan_range<true, T>(segments, first, last, LambdaReturns<true, T>{returns, out, powers, {}, {}});
    } else {
        scan_range<true, T>(segments, first, last, LambdaReturns<false, T>{returns, out, powers, {}, {}});
    }
}

template <typename T>
void vtrace_range(const Returns<T>& returns, const T* log_ratios, Clips<T> clips, const Segments& segments,
                  std::int64_t first, std::int64_t last, T* targets, T* advantages) {
    scan_range<true, T>(segments, first, last,
                        VTrace<T>{returns, log_ratios, clips, targets, advantages, {}, {}, {}});
}

#define PARL_INSTANTIATE(T)                                                                                \
    template void discounted_scan_range<T>(const T*, const Segments&, std::int64_t, std::int64_t, T, bool, \
                                           T*);                                                            \
    template void linear_recurrence_range<T>(const T*, const T*, const Segments&, std::int64_t,            \
                                             std::int64_t, bool, T*);                                      \
    template void lambda_returns_range<T>(const Returns<T>&, const Segments&, std::int64_t, std::int64_t,  \
                                          bool, T*);                                                       \
    template void vtrace_range<T>(const Returns<T>&, const T*, Clips<T>, const Segments&, std::int64_t,    \
                                  std::int64_t, T*, T*);
PARL_INSTANTIATE(float)
PARL_INSTANTIATE(double)

}  // namespace parl::cpu::PARL_ISA
