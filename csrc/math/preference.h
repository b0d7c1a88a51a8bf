// One labelled pair under Bradley and Terry (1952): P(second preferred) = σ(logit).
#pragma once

#include "math/elementary.h"

namespace parl::math {

// −label · log σ(logit) − (1 − label) · log σ(−logit), in nats; finite for every finite logit.
template <typename V>
PARL_INLINE V preference_cross_entropy(V logit, V label) {
    return (maximum(V(0) - logit, V(0)) + (V(1) - label) * logit) + log1p(exp(V(0) - absolute(logit)));
}

// Its derivative in the logit.
template <typename V>
PARL_INLINE V preference_slope(V logit, V label) {
    return sigmoid(logit) - label;
}

// Whether a pair with a preference is ordered as labelled. A tie of the rewards is not.
template <typename S>
PARL_INLINE bool ordered_as_labelled(S logit, S label) {
    return (label > S(0.5) && logit > S(0)) || (label < S(0.5) && logit < S(0));
}

}  // namespace parl::math
