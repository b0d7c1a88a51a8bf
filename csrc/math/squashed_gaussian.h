// One coordinate of a Gaussian action squashed by tanh, reparameterised: a = tanh(u), u = mean + σ·noise,
// where log σ is the network's `raw` output rescaled by tanh into [−5, 2]. Haarnoja et al. 2018, "Soft
// Actor-Critic Algorithms and Applications", appendix C. As parl_core/models/policies.py has it.
#pragma once

#include "math/elementary.h"

namespace parl::math {

template <typename V>
struct SquashedSample {
    V action;
    V log_prob;  // this coordinate's part
    V tanh_raw;
    V spread;  // σ · noise
};

inline constexpr double kLogStdLow = -5.0, kLogStdHalfRange = 3.5;

template <typename V>
PARL_INLINE SquashedSample<V> sample_squashed(V mean, V raw, V noise) {
    using S = typename ScalarOf<V>::type;
    const V tanh_raw = tanh(raw);
    const V log_std = V(S(kLogStdLow)) + V(S(kLogStdHalfRange)) * (tanh_raw + V(1));
    const V spread = exp(log_std) * noise;
    const V u = mean + spread;
    // log(1 − tanh(u)²) without the cancellation at large |u|.
    const V log_slope = V(2) * (V(S(0.693147180559945309)) - u - softplus(V(-2) * u));
    const V log_density = V(S(-0.5)) * (noise * noise + V(S(1.837877066409345484))) - log_std;
    return {tanh(u), log_density - log_slope, tanh_raw, spread};
}

template <typename V>
struct SquashedGradient {
    V mean;
    V raw;
};

// What of a loss L(a, log π(a)) reaches the network's outputs, from ∂L/∂a and ∂L/∂log π at a fixed noise.
template <typename V>
PARL_INLINE SquashedGradient<V> squashed_gradient(V action, V tanh_raw, V spread, V by_action,
                                                  V by_log_prob) {
    using S = typename ScalarOf<V>::type;
    const V by_u = by_action * (V(1) - action * action) + by_log_prob * (action + action);
    const V by_log_std = by_u * spread - by_log_prob;
    return {by_u, by_log_std * (V(S(kLogStdHalfRange)) * (V(1) - tanh_raw * tanh_raw))};
}

}  // namespace parl::math
