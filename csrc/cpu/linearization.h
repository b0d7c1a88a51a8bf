// Products with the derivatives of a policy's log-probabilities, for policies that are multi-layer
// perceptrons with a Gaussian or categorical head. Contract: parl_core/hypergrad/linearize.py.
//
// In the order of the flat parameter vector (P,): a free log standard deviation (outputs,) if there is one,
// then each layer's weight (outputs, inputs) and bias (outputs,).
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "math/activations.h"
#include "math/heads.h"

namespace parl::cpu {

using math::Head;

// What is linearised. All memory may be freed once the linearization is made.
template <typename T>
struct Policy {
    const std::int64_t* widths;  // (num_layers + 1,): inputs, hidden layers, outputs
    int num_layers;
    math::Activation activation;
    Head head;
    bool squash;
    const T* params;   // (P,)
    const T* log_std;  // (outputs,), for kGaussianFixed
};

template <typename T>
struct Steps {
    std::int64_t num_steps;
    const T* observations;        // (num_steps, inputs)
    const T* actions;             // (num_steps, action dimensions), for Gaussian heads
    const std::int64_t* indices;  // (num_steps,) in [0, outputs), for the categorical one
    const std::int64_t* offsets;  // (num_trajectories + 1,), from 0 to num_steps, non-decreasing
    std::int64_t num_trajectories;
};

// Weights of the steps (num_steps,) in the terms of a trajectory Hessian; null leaves a term out:
//     Σ_t hessian_t ∇² log π_t + Σ_t fisher_t F(s_t) + Σ_i Σ_h scores_ih S_{i,0:h} S_{i,0:h}ᵀ + damping
// with S_{i,0:h} the sum of trajectory i's ∇ log π up to its step h. They are copied.
template <typename T>
struct Terms {
    const T* hessian;
    const T* fisher;
    const T* scores;
    T damping;
};

// v ↦ A v, A the sum of such terms, in one forward and one backward pass. Not to be used by two threads at
// once, nor together with another operator of the same linearization, whose memory it uses; nor after that.
template <typename T>
class Curvature {
  public:
    virtual ~Curvature() = default;
    // v (P,) -> out (P,), which may not overlap v; along, unless null, gets J v (num_steps,).
    virtual void apply(const T* v, T* out, T* along, int num_threads) = 0;
};

// For a given number of threads, results are the same bit for bit. Not to be used by two threads at once.
template <typename T>
class Linearization {
  public:
    virtual ~Linearization() = default;
    virtual std::int64_t num_params() const = 0;
    virtual std::int64_t num_steps() const = 0;
    virtual std::int64_t num_trajectories() const = 0;
    virtual const T* log_prob() const = 0;                                  // (num_steps,)
    virtual void jvp(const T* v, T* out, int num_threads) = 0;              // (P,) -> (num_steps,)
    virtual void vjp(const T* w, T* out, int num_threads) = 0;              // (num_steps,) -> (P,)
    virtual void scores(const T* w, T* out, int num_threads) = 0;           // -> (num_trajectories, P)
    virtual Curvature<T>* curvature(const Terms<T>&, int num_threads) = 0;  // owned by the caller
};

// Owned by the caller. Throws std::bad_alloc.
template <typename T>
Linearization<T>* linearize(const Policy<T>& policy, const Steps<T>& steps, int num_threads);

PARL_IN_EACH_ISA(template <typename T> Linearization<T>* linearize(const Policy<T>& policy,
                                                                   const Steps<T>& steps, int num_threads);)

}  // namespace parl::cpu
