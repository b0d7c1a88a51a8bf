// The cotangent of one of the network's outputs at one step, for kernels that have its tangent at hand.
#pragma once

#include "cuda/policy_head.h"

namespace parl::cuda {

template <typename T>
struct OutputCotangent {
    T value;
    T log_std;  // what the step adds to the gradient of a free log_std
};

// The output whose second derivative with output j does not vanish, of a Gaussian with log_std of a layer; of
// others j itself.
template <typename T>
__device__ __forceinline__ std::int64_t pair_of(const PolicyHead<T>& head, std::int64_t j) {
    if (head.kind != math::Head::kGaussianState) return j;
    return j < head.action_dim ? j + head.action_dim : j - head.action_dim;
}

// Curvature times tangent: `here` is that of output j, `there` its pair's, `mean` the categorical head's mean of
// all, `log_std` that of a free log_std.
template <typename T>
__device__ __forceinline__ OutputCotangent<T> curved_cotangent(const PolicyHead<T>& head,
                                                               const HeadCurvature<T>& curvature,
                                                               std::int64_t t, std::int64_t j, T here,
                                                               T there, T mean, T log_std) {
    const std::int64_t at = t * head.outputs + j;
    switch (head.kind) {
        case math::Head::kCategorical:
            return {curvature.weights[t] * head.probabilities[at] * (here - mean), T(0)};
        case math::Head::kGaussianState:
            return {curvature.diagonal[at] * here + curvature.cross[at] * there, T(0)};
        case math::Head::kGaussianGlobal:
            return {curvature.diagonal[at] * here + curvature.cross[at] * log_std,
                    curvature.cross[at] * here};
        default:
            return {curvature.diagonal[at] * here, T(0)};
    }
}

}  // namespace parl::cuda
