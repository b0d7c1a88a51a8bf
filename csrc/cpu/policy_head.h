// A policy's action distribution on all steps: what lies between the network's output and the
// log-probability.
#pragma once

#include "cpu/buffer.h"
#include "cpu/linearization.h"
#include "cpu/mlp.h"

namespace parl::cpu::PARL_ISA {

// Weighted second derivatives of the log-probabilities, and the Fisher matrices, in the network's outputs z.
template <typename T>
struct HeadCurvature {
    Buffer<T> weights;   // categorical: (T,) Fisher weight minus Hessian weight
    Buffer<T> diagonal;  // Gaussian: (T, outputs)
    Buffer<T> cross;  // Gaussian, with log_std of a layer or global: (T, outputs), with the other of the pair
    Buffer<T> log_std_square;  // global log_std: (outputs,), summed over steps
};

template <typename T>
class PolicyHead {
  public:
    PolicyHead(const Policy<T>& policy, const Steps<T>& steps);

    // Rows of `outputs()` numbers each, row_stride<T>(outputs()) apart: for all steps, and to be filled
    // before `start`.
    T* network_output() { return output_.get(); }
    std::int64_t outputs() const { return outputs_; }
    // Numbers of a free log standard deviation, which is no output of the network; 0 if there is none.
    std::int64_t free_log_std() const { return head_ == Head::kGaussianGlobal ? outputs_ : 0; }
    // ∇ log π in the network's output, rows as above, and in a free log_std.
    const T* gradient() const { return gradient_.get(); }
    const T* log_std_gradient() const { return log_std_gradient_.get(); }

    // From the output of steps first … last − 1 to their log-probabilities and gradients.
    void start(std::int64_t first, std::int64_t last, T* log_prob);

    // Fills `curvature` for all steps.
    void second_order(const Terms<T>& terms, HeadCurvature<T>& curvature) const;

    // J v of steps first … last − 1 from the tangents of their outputs, rows of which start at `tangent`, and
    // of a free log_std; out[0] is step first's.
    void along(std::int64_t first, std::int64_t last, const T* tangent, const T* log_std_tangent,
               T* out) const;

    // The cotangents of the outputs, and what they add to the gradient of a free log_std: curvature times
    // tangent, if `curvature` is not null, plus `steps` (of all steps) times ∇ log π, if `steps` is not null.
    void cotangent(std::int64_t first, std::int64_t last, const HeadCurvature<T>* curvature, const T* tangent,
                   const T* log_std_tangent, const T* steps, T* out, T* log_std_out) const;

  private:
    void start_gaussian(std::int64_t t, T* log_prob);
    void start_categorical(std::int64_t t, T* log_prob);

    Head head_;
    bool squash_;
    std::int64_t num_steps_, outputs_, stride_, action_dim_;
    Buffer<T> output_, gradient_;
    Buffer<T> actions_;           // Gaussian: (T, action_dim), before squashing
    Buffer<T> log_std_;           // Gaussian, not of a layer: (action_dim,)
    Buffer<T> log_std_gradient_;  // global log_std: (T, outputs)
    Buffer<T> probabilities_;     // categorical: (T, outputs)
    Buffer<std::int64_t> indices_;
};

}  // namespace parl::cpu::PARL_ISA
