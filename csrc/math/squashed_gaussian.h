// One coordinate of a Gaussian action squashed by tanh, reparameterised: a = tanh(u), u = mean + σ·noise,
// where log σ is the network's `raw` output rescaled by tanh into [−5, 2]. Haarnoja et al. 2018, "Soft
// Actor-Critic Algorithms and Applications", appendix C. As parl_core/models/policies.py has it.
#pragma once

#include "math/heads.h"

namespace parl::math {

template <typename V>
struct SquashedSample {
    V action;
    V log_prob;  // this coordinate's part
    V tanh_raw;
    V spread;  // σ · noise
};

template <typename V>
PARL_INLINE SquashedSample<V> sample_squashed(V mean, V raw, V noise) {
    using S = typename ScalarOf<V>::type;
    const V tanh_raw = tanh(raw);
    const V log_std = bounded_log_std(tanh_raw);
    const V spread = exp(log_std) * noise;
    const V u = mean + spread;
    const V log_density = V(S(-0.5)) * (noise * noise + V(S(kLogTwoPi))) - log_std;
    return {tanh(u), log_density - log_tanh_slope(u), tanh_raw, spread};
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
    const V by_u = by_action * (V(1) - action * action) + by_log_prob * (action + action);
    const V by_log_std = by_u * spread - by_log_prob;
    return {by_u, by_log_std * bounded_log_std_slope(tanh_raw)};
}

}  // namespace parl::math
