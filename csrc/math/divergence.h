// The summands of f-divergences and their first two derivatives, from the logarithm x of a density ratio.
//
// With t = e^x, f(t) is what D_f(p‖q) averages over samples from q at x = log p/q, and e^{-x} f(t) what it
// averages over samples from p. The specification, with the same names, is
// parl_core/ops/f_divergence_terms.py.
#pragma once

#include "math/elementary.h"

namespace parl::math {

// kKlK2 … kReverseKlK3: other f whose mean is, or resembles, the KL divergence (Schulman 2020). kAlpha is
// split at α = ½, each half in the form that stays exact towards its end, α → 0 or α → 1.
enum class Divergence {
    kKl,
    kKlK2,
    kKlK3,
    kReverseKl,
    kReverseKlK2,
    kReverseKlK3,
    kJensenShannon,
    kJeffreys,
    kChiSquared,
    kNeyman,
    kSquaredHellinger,
    kTotalVariation,
    kAlphaLow,
    kAlphaHigh,
};

// A function of x, with its first and second derivative in x.
template <typename V>
struct Jet {
    V value, first, second;
};

// e^x, e^x − 1 to full relative precision (a few units in the last place) about x = 0, and a finite factor in
// place of x for products with e^x, in which 0·∞ must not come about.
template <typename V>
struct Ratio {
    V ratio, minus_one, log;
};
template <typename V>
PARL_INLINE Ratio<V> ratio_of(V x) {
    const V log = within_exp(x);
    const Reduced<V> reduced = reduce_by_ln2(log);
    const V near = expm1_reduced(reduced.r);
    const V ratio = scale_by_power_of_two(near + V(1), reduced.k);
    return {ratio, select(reduced.k == V(0), near, ratio - V(1)), log};
}

// log((1 + e^x)/2), to full relative precision about x = 0, and log(2 e^x/(1 + e^x)): their difference is x.
template <typename V>
struct MixtureLogs {
    V over_q, over_p;
};
template <typename V>
PARL_INLINE MixtureLogs<V> mixture_logs(V x) {
    using S = typename ScalarOf<V>::type;
    using F = Format<S>;
    // By symmetry at −|x|, where (1 + e^{-|x|})/2 lies in [½, 1]; doubled if below √½.
    const V lower = minimum(x, -x);
    const Ratio<V> r = ratio_of(lower);
    const auto doubled = r.ratio < V(S(0.41421356237309503));
    const V f = select(doubled, r.ratio, V(S(0.5)) * r.minus_one);
    const V log_lower = log_reduced(f, select(doubled, V(-1), V(0)));
    const auto negative = x < V(0);
    const V finite = maximum(lower, V(-F::kLargest));
    return {select(negative, log_lower, x + log_lower), select(negative, finite - log_lower, -log_lower)};
}

template <typename V>
PARL_INLINE V nan_of(V x, V otherwise) {
    return select(x == x, otherwise, x);
}

// kOverRatio: e^{-x} times f(e^x) and times its derivatives (not the derivatives of e^{-x} f(e^x)), without
// overflow where e^x alone would. `alpha` is read by kAlphaLow and kAlphaHigh only.
template <Divergence kF, bool kOverRatio, typename V>
PARL_INLINE Jet<V> divergence_jet(V x, [[maybe_unused]] typename ScalarOf<V>::type alpha) {
    using S = typename ScalarOf<V>::type;
    using F = Format<S>;
    const V one(1), half(S(0.5)), quarter(S(0.25));
    const Ratio<V> up = ratio_of(x), down = ratio_of(-x);
    const V t = up.ratio, u = down.ratio;
    if constexpr (kF == Divergence::kKl) {  // t log t
        if constexpr (kOverRatio) return {x, x + one, x + V(2)};
        const V value = t * up.log;
        return {value, value + t, value + (t + t)};
    } else if constexpr (kF == Divergence::kKlK2) {  // ½ t log² t
        const V scale = kOverRatio ? one : t, log = kOverRatio ? x : up.log;
        const V square = half * log * log;
        return {scale * square, scale * (square + log), scale * (square + V(2) * log + one)};
    } else if constexpr (kF == Divergence::kKlK3) {  // t log t − t + 1
        if constexpr (kOverRatio) return {x + down.minus_one, x, x + one};
        const V first = t * up.log;
        return {first - minimum(up.minus_one, V(F::kLargest)), first, first + t};
    } else if constexpr (kF == Divergence::kReverseKl) {  // −log t
        if constexpr (kOverRatio) return {u * down.log, -u, nan_of(x, V(0))};
        return {-x, nan_of(x, V(-1)), nan_of(x, V(0))};
    } else if constexpr (kF == Divergence::kReverseKlK2) {  // ½ log² t
        const V scale = kOverRatio ? u : one, log = kOverRatio ? -down.log : x;
        return {scale * (half * log * log), scale * log, nan_of(x, scale)};
    } else if constexpr (kF == Divergence::kReverseKlK3) {  // t − 1 − log t
        if constexpr (kOverRatio) {
            return {u * down.log - minimum(down.minus_one, V(F::kLargest)), -down.minus_one, nan_of(x, one)};
        }
        return {up.minus_one - minimum(x, V(F::kLargest)), up.minus_one, t};
    } else if constexpr (kF == Divergence::kJensenShannon) {  // ½ (t log t − (1 + t) log((1 + t)/2))
        const MixtureLogs<V> logs = mixture_logs(x);
        const V mixed = sigmoid(-x);  // 1/(1 + t)
        if constexpr (kOverRatio) {
            const V over_q = minimum(logs.over_q, V(F::kLargest));
            return {half * (logs.over_p - u * over_q), half * logs.over_p, half * (logs.over_p + mixed)};
        }
        const V first = (half * t) * logs.over_p;
        return {first - half * logs.over_q, first, (half * t) * (logs.over_p + mixed)};
    } else if constexpr (kF == Divergence::kJeffreys) {  // (t − 1) log t
        if constexpr (kOverRatio) return {-down.minus_one * x, x - down.minus_one, x + V(2)};
        const V product = t * up.log;
        return {up.minus_one * x, product + up.minus_one, product + (t + t)};
    } else if constexpr (kF == Divergence::kChiSquared) {  // (t − 1)²
        const V twice = up.minus_one + up.minus_one;
        if constexpr (kOverRatio) return {-up.minus_one * down.minus_one, twice, twice + (t + t)};
        return {up.minus_one * up.minus_one, twice * t, (t + t) * (t + up.minus_one)};
    } else if constexpr (kF == Divergence::kNeyman) {  // (t − 1)²/t
        if constexpr (kOverRatio) {
            return {down.minus_one * down.minus_one, -down.minus_one * (one + u), one + u * u};
        }
        return {-up.minus_one * down.minus_one, up.minus_one - down.minus_one, t + u};
    } else if constexpr (kF == Divergence::kSquaredHellinger) {  // ½ (√t − 1)²
        const Ratio<V> root = ratio_of(kOverRatio ? V(S(-0.5)) * x : half * x);
        const V half_step = half * root.minus_one, value = half_step * root.minus_one;
        if constexpr (kOverRatio) return {value, -half_step, half - quarter * root.ratio};
        return {value, half_step * root.ratio, quarter * root.ratio * (root.ratio + root.minus_one)};
    } else if constexpr (kF == Divergence::kTotalVariation) {  // ½ |t − 1|, with the subgradient 0 at t = 1
        const V slope = kOverRatio ? half : half * t;
        const V first = select(x < V(0), -slope, select(x > V(0), slope, x));  // x: 0, or NaN
        return {half * absolute(kOverRatio ? down.minus_one : up.minus_one), first, first};
    } else if constexpr (kF == Divergence::kAlphaHigh) {  // (t^α − α t − (1 − α))/(α(α − 1)), by t^{α−1}
        const S tilt = alpha - S(1);
        const V weight(S(1) / alpha);
        const Ratio<V> power = ratio_of(V(tilt) * (kOverRatio ? x : maximum(x, V(-F::kExpBound))));
        const V tilted = power.minus_one * V(S(1) / tilt);
        if constexpr (kOverRatio) {
            return {weight * (maximum(tilted, V(-F::kLargest)) + down.minus_one), tilted,
                    V(alpha) * tilted + one};
        }
        const V first = t * tilted;
        return {weight * (first - minimum(up.minus_one, V(F::kLargest))), first, V(alpha) * first + t};
    } else {  // the same by t^α
        static_assert(kF == Divergence::kAlphaLow);
        const S tilt = alpha - S(1);
        const V weight(S(-1) / tilt);
        const Ratio<V> power = ratio_of(V(alpha) * minimum(x, V(F::kExpBound)));
        const V tilted = power.minus_one * V(S(1) / alpha);
        if constexpr (kOverRatio) {
            const Ratio<V> over = ratio_of(V(tilt) * x);
            const V first = -weight * over.minus_one;
            return {weight * (-minimum(down.minus_one, V(F::kLargest)) - u * tilted), first,
                    V(alpha) * first + one};
        }
        return {weight * (up.minus_one - tilted), weight * (up.minus_one - power.minus_one),
                weight * (t - V(alpha) * power.ratio)};
    }
}

}  // namespace parl::math
