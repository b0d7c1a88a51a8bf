// Log-probabilities of the policies' action distributions with their derivatives in what the network says,
// one action dimension at a time. Contract: parl_core/models/policies.py.
#pragma once

#include "math/elementary.h"

namespace parl::math {

// What bounds the log standard deviation of GaussianPolicy(log_std="state").
template <typename S>
inline constexpr S kLogStdLow = S(-5);
template <typename S>
inline constexpr S kLogStdHigh = S(2);

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
    constexpr double kLogTwoPi = 1.8378770664093454836;
    return {S(-0.5) * (square + S(kLogTwoPi)) - log_std,
            standard * inverse,
            square - S(1),
            -inverse * inverse,
            S(-2) * standard * inverse,
            S(-2) * square,
            inverse * inverse};
}

// A log standard deviation as a function of the network's output, with its derivatives.
template <typename S>
struct StateLogStd {
    S value, slope, bend;
};

template <typename S>
PARL_INLINE StateLogStd<S> state_log_std(S raw) {
    constexpr S kHalf = S(0.5) * (kLogStdHigh<S> - kLogStdLow<S>);
    const S t = tanh(raw), slope = kHalf * (S(1) - t * t);
    return {kLogStdLow<S> + kHalf * (t + S(1)), slope, S(-2) * t * slope};
}

// The Gaussian action whose tanh is `action`, moved inside the open interval by one rounding unit.
template <typename S>
PARL_INLINE S unsquash(S action) {
    constexpr S kEdge = S(1) - (sizeof(S) == 4 ? S(1.1920928955078125e-07) : S(2.220446049250313e-16));
    const S inside = select(action > kEdge, kEdge, select(action < -kEdge, -kEdge, action));
    return S(0.5) * (log1p(inside) - log1p(-inside));
}

// log(1 − tanh(u)²), what squashing takes off the log-probability.
template <typename S>
PARL_INLINE S log_tanh_slope(S unsquashed) {
    return S(2) * (S(0.69314718055994530942) - unsquashed - softplus(S(-2) * unsquashed));
}

}  // namespace parl::math
