// Products with the derivatives of a policy's log-probabilities on a GPU, for policies that are multi-layer
// perceptrons with a Gaussian or categorical head. Contract: parl_core/hypergrad/linearize.py; the same on the
// CPU: cpu/linearization.h.
//
// How this differs from automatic differentiation, and why:
// 1. The activations of one forward pass serve all products; a Hessian product with fixed weights also keeps
//    the gradients that were handed back.
// 2. A tangent forward and one backward pass are then left, with one matrix product a layer forwards and two
//    backwards, since products of tangents and values come in pairs (mlp_layers.h), and one launch between two
//    of them.
// 3. The host only launches: all memory is given by the caller, sizes follow from the shapes alone, and offsets
//    are read by the kernels. So every product can be captured in a CUDA graph, once one has been taken before.
//
// In the order of the flat parameter vector (P,): a free log standard deviation (outputs,) if there is one,
// then each layer's weight (outputs, inputs) and bias (outputs,). Results are the same bit for bit on the same
// device. A linearization and its operators compute in the same memory, so they belong on one stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>

#include "cuda/arena.h"
#include "cuda/mlp_fused.h"
#include "cuda/mlp_layers.h"
#include "cuda/operator.h"
#include "cuda/policy_head.h"
#include "cuda/scores.h"

namespace parl::cuda {

// What is linearised; but for `widths`, pointers to device memory, which must last as long as the
// linearization.
template <typename T>
struct Policy {
    const std::int64_t* widths;  // (num_layers + 1,), on the host: inputs, hidden layers, outputs
    int num_layers;
    math::Activation activation;
    math::Head head;
    bool squash;
    const T* params;   // (P,)
    const T* log_std;  // (outputs,), for kGaussianFixed
};

template <typename T>
struct Steps {
    const T* observations;        // (num_steps, inputs)
    const T* actions;             // (num_steps, action dimensions), for Gaussian heads
    const std::int64_t* indices;  // (num_steps,) in [0, outputs), for the categorical one
    Trajectories trajectories;
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

template <typename T>
class MlpCurvature;

template <typename T>
class MlpLinearization {
  public:
    // Elements of device memory for a linearization of such shapes.
    static std::int64_t memory_size(const Policy<T>& policy, const Steps<T>& steps);

    // Throws std::invalid_argument on a network that is too deep, std::runtime_error without a cuBLAS.
    MlpLinearization(const Policy<T>& policy, const Steps<T>& steps, bool allow_tf32, T* memory,
                     cudaStream_t stream);

    std::int64_t num_params() const { return network_.num_params; }
    std::int64_t num_steps() const { return trajectories_.num_steps; }
    std::int64_t num_trajectories() const { return trajectories_.count; }
    void copy_log_prob(T* out, cudaStream_t stream) const;       // (num_steps,)
    void jvp(const T* v, T* out, cudaStream_t stream) const;     // (P,) -> (num_steps,)
    void vjp(const T* w, T* out, cudaStream_t stream) const;     // (num_steps,) -> (P,)
    void scores(const T* w, T* out, cudaStream_t stream) const;  // -> (num_trajectories, P)

  private:
    friend class MlpCurvature<T>;

    // What goes back through all layers' outputs, before the activation.
    struct Cotangents {
        Matrix<T> layers[kMaxLayers];
        // Whether each row goes on with the cotangents that a Hessian product keeps: [δ̇ | δ].
        bool has_kept;
    };

    MlpLinearization(const Policy<T>& policy, const Steps<T>& steps, Arena<T> arena);
    Blas blas(cudaStream_t stream) const { return Blas(stream, workspace_, allow_tf32_); }
    // What layer l sees: (num_steps, inputs).
    Matrix<const T> input(int l) const;
    const T* weight(int l) const { return params_ + network_.layers[l].weight; }
    Partials<T> sums(int l) const { return {sums_ + network_.layers[l].column, network_.num_columns}; }
    Partials<T> log_std_sums() const;
    OutputTangent<T> output_tangent(const T* v) const;

    void forward(const Blas& blas, cudaStream_t stream) const;
    // Tangents of all layers in the direction v, whose weights are packed. With `bends`, what the activations'
    // second derivatives make of them goes into `bent`'s layers.
    void tangent_forward(const Blas& blas, const T* v, T* const* bends, const Cotangents* bent,
                         cudaStream_t stream) const;
    // From the last layer's cotangents, whose column sums are taken, to all others', and the gradient of all
    // parameters, plus the shift, of which the weights in `out` hold their part. Without `out` no gradient.
    void backward(const Blas& blas, const Cotangents& cotangents, const Shift<T>& shift, T* out,
                  cudaStream_t stream) const;

    Network network_{};
    bool allow_tf32_ = false;
    Trajectories trajectories_;
    const T* params_;
    const T* observations_;
    PolicyHead<T> head_{};
    T* workspace_;
    T* log_prob_;
    HiddenLayer<T> hidden_[kMaxLayers]{};
    PackedWeights<T> packed_{};
    Cotangents cotangents_{};  // without kept ones
    T* output_tangent_;        // (num_steps, outputs)
    T* products_;              // (num_steps, widest hidden layer)
    T* along_;                 // (num_steps,), as the next two
    T* steps_;
    T* means_;
    T* sums_;  // (row_blocks(num_steps), num_columns)
    std::int64_t memory_size_;
};

// v ↦ A v, A the sum of such terms, in one forward and one backward pass; without scores, of small networks in
// one launch (mlp_fused.h). The linearization must outlive it.
template <typename T>
class MlpCurvature final : public Operator<T> {
  public:
    // Elements of device memory for such terms, of which only the pointers' being null counts.
    static std::int64_t memory_size(const MlpLinearization<T>& linearization, const Terms<T>& terms);

    MlpCurvature(const MlpLinearization<T>& linearization, const Terms<T>& terms, T* memory,
                 cudaStream_t stream);

    std::int64_t size() const override { return linearization_.num_params(); }
    void apply(const T* v, T* out, cudaStream_t stream) override { apply(v, out, nullptr, stream); }
    // The same; along, unless null, gets J v (num_steps,).
    void apply(const T* v, T* out, T* along, cudaStream_t stream);

  private:
    using Cotangents = typename MlpLinearization<T>::Cotangents;

    MlpCurvature(const MlpLinearization<T>& linearization, const Terms<T>& terms, Arena<T> arena);
    // Where all terms are taken step by step, and the network is small enough.
    void plan_fused(Arena<T>& arena);
    // The gradients handed back by Σ_t hessian_t log π_t, and what the activations' second derivatives make of
    // them.
    void keep_cotangents(const T* hessian, cudaStream_t stream);
    // What damping and a free log_std add to the product.
    Shift<T> shift(const T* v) const;

    const MlpLinearization<T>& linearization_;
    T damping_;
    bool has_hessian_, has_curvature_;
    HeadCurvature<T> head_{};
    Cotangents cotangents_{};
    T* bends_[kMaxLayers]{};
    T* scores_ = nullptr;
    FusedProduct<T> fused_{};
    T* partials_ = nullptr;  // of its blocks
    std::int64_t memory_size_;
};

}  // namespace parl::cuda
