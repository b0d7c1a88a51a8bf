// The Bradley-Terry cross-entropy of labelled pairs of segments. Contract: parl_core/ops/preference_loss.py.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace parl::cpu {

// Where the segments of one side of M pairs lie, for each of several rewards.
struct SegmentLayout {
    const std::int64_t* offsets;  // (M + 1,) steps; null: segment m is `length` steps from m · stride
    std::int64_t length;
    std::int64_t stride;
    std::int64_t member_stride;  // from one reward's steps to the next one's
};

// For members k and pairs m: logits[k, m] = Σ second − Σ first,
// losses[k, m] = softplus(logit) − label · logit,
// correct[k] = how many pairs with a preference (label ≠ ½) are ordered as labelled.
// labels: (M,) for label_stride 0, or (members, M) for label_stride M. Everything else is (members, M) or
// (members,).
PARL_IN_EACH_ISA(template <typename T> void preference_loss(const T* first, SegmentLayout first_layout,
                                                            const T* second, SegmentLayout second_layout,
                                                            const T* labels, std::int64_t label_stride,
                                                            std::int64_t members, std::int64_t num_pairs,
                                                            T* losses, T* logits, std::int64_t* correct);)

// steps[k, i] = scale · weights[k, m] for the steps i of segment m.
PARL_IN_EACH_ISA(template <typename T> void spread_over_segments(const T* weights, T scale,
                                                                 SegmentLayout layout, std::int64_t members,
                                                                 std::int64_t num_pairs, T* steps);)

}  // namespace parl::cpu
