// Terms of a trajectory Hessian on the linearization of a multi-layer perceptron policy (linearization.h).
//
// All terms share one forward and one backward pass of tangents. Through the output, they are the curvature
// of the head times the output's tangent, plus u·∇ log π, with which the backward pass gives Jᵀu as well:
// u_h = Σ_{k≥h} g_k Σ_{j≤k} (J v)_j within each trajectory, for score weights g.
#pragma once

#include "cpu/mlp_linearization.h"

namespace parl::cpu::PARL_ISA {

template <typename T>
class MlpCurvature final : public Curvature<T> {
  public:
    MlpCurvature(MlpLinearization<T>& linearization, const Terms<T>& terms, int num_threads);
    void apply(const T* v, T* out, T* along, int num_threads) override;

  private:
    using Block = typename MlpLinearization<T>::Block;

    // The gradients handed back by Σ_t hessian_t log π_t, and what the activations' second derivatives make
    // of them.
    void keep_deltas(const T* hessian, int num_threads);
    // Passes of one block, `output` being the tangent of the network's. The second is with u, if `steps` is
    // not null.
    void forward(Block block, Work<T>& work, T* const* tangents, T* const* bent, T* output, T* along) const;
    void backward(Block block, Work<T>& work, T* const* tangents, T* const* deltas, const T* output,
                  const T* steps, bool accumulate) const;
    // Both passes of a thread's blocks with score products.
    void pass_whole_trajectories(Team team, Work<T>& work);
    void pass_long_trajectories(Team team, Work<T>& work);
    void reserve_passed();
    // steps_ = u of trajectories first … last − 1, from along_.
    void accumulate_scores(std::int64_t first, std::int64_t last);

    MlpLinearization<T>& linearization_;
    HeadCurvature<T> head_;
    T damping_;
    bool has_hessian_, has_curvature_;
    Buffer<T> scores_, along_, steps_;
    Buffer<T> cache_;
    Buffer<T*> deltas_, bends_;  // by layer, of all steps; bends_ null where second derivatives vanish

    // With scores, since a step's u needs its whole trajectory's J v: what the forward pass leaves, of all
    // steps.
    Buffer<T> passed_;
    Buffer<T*> tangents_, bent_;
    Buffer<T> output_;
};

}  // namespace parl::cpu::PARL_ISA
