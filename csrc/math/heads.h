// Log-probabilities of the policies' action distributions with their derivatives in what the network says,
// one action dimension at a time. Contract: parl_core/models/policies.py.
#pragma once

#include "math/elementary.h"

namespace parl::math {

// What a policy's network says: logits; means and, squeezed by tanh, log standard deviations; or means beside a
// log standard deviation that is a parameter, or fixed.
enum class Head { kCategorical, kGaussianState, kGaussianGlobal, kGaussianFixed };

// What bounds the log standard deviation of GaussianPolicy(log_std="state").
inline constexpr double kLogStdLow = -5.0, kLogStdHigh = 2.0;

inline constexpr double kLogTwoPi = 1.8378770664093454836;

// log N(x; mean, exp(log_std)²), its gradient and its Hessian in (mean, log_std).
template <typename S>
struct GaussianTerm {
    S log_prob;
    S by_mean, by_log_std;
    S by_mean_mean, by_mean_log_std, by_log_std_log_std;
    S fisher_mean;  // of the mean; that of log_std is 2, and they are orthogonal
};

template <typename S>
PARL_INLINE GaussianTerm<S> gaussian_term(S x, S mean, S log_std) {
    const S inverse = exp(-log_std);
    const S standard = (x - mean) * inverse;
    const S square = standard * standard;
    return {S(-0.5) * (square + S(kLogTwoPi)) - log_std,
            standard * inverse,
            square - S(1),
            -inverse * inverse,
            S(-2) * standard * inverse,
            S(-2) * square,
            inverse * inverse};
}

// A log standard deviation as a function of the tanh of the network's output, and its derivative in that
// output.
template <typename V>
PARL_INLINE V bounded_log_std(V tanh_raw) {
    using S = typename ScalarOf<V>::type;
    return V(S(kLogStdLow)) + V(S(0.5 * (kLogStdHigh - kLogStdLow))) * (tanh_raw + V(1));
}
template <typename V>
PARL_INLINE V bounded_log_std_slope(V tanh_raw) {
    using S = typename ScalarOf<V>::type;
    return V(S(0.5 * (kLogStdHigh - kLogStdLow))) * (V(1) - tanh_raw * tanh_raw);
}

// The same as a function of the output itself, with its derivatives.
template <typename S>
struct StateLogStd {
    S value, slope, bend;
};

template <typename S>
PARL_INLINE StateLogStd<S> state_log_std(S raw) {
    const S t = tanh(raw), slope = bounded_log_std_slope(t);
    return {bounded_log_std(t), slope, S(-2) * t * slope};
}

// The Gaussian action whose tanh is `action`, moved inside the open interval by one rounding unit.
template <typename S>
PARL_INLINE S unsquash(S action) {
    constexpr S kEdge = S(1) - (sizeof(S) == 4 ? S(1.1920928955078125e-07) : S(2.220446049250313e-16));
    const S inside = select(action > kEdge, kEdge, select(action < -kEdge, -kEdge, action));
    return S(0.5) * (log1p(inside) - log1p(-inside));
}

// log(1 − tanh(u)²), what squashing takes off the log-probability, without the cancellation at large |u|.
template <typename V>
PARL_INLINE V log_tanh_slope(V unsquashed) {
    using S = typename ScalarOf<V>::type;
    return V(2) * (V(S(0.69314718055994530942)) - unsquashed - softplus(V(-2) * unsquashed));
}

}  // namespace parl::math
