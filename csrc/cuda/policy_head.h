// A policy's action distribution on all steps: what lies between the network's output and the
// log-probability. All memory is the device's, and the caller's.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/mlp_layers.h"
#include "math/heads.h"

namespace parl::cuda {

// Passed to kernels by value; null what a head does not need.
template <typename T>
struct PolicyHead {
    math::Head kind;
    bool squash;
    std::int64_t num_steps, outputs, action_dim;
    T* output;            // (steps, outputs): the network's, its last bias yet to be added at the start
    T* gradient;          // (steps, outputs): of log π in that
    T* log_std_gradient;  // global log_std: (steps, outputs)
    T* probabilities;     // categorical: (steps, outputs)
    const std::int64_t* indices;  // categorical: (steps,)
    const T* actions;             // Gaussian: (steps, action_dim)
    T* unsquashed;                // Gaussian, squashed: (steps, action_dim), what they are the tanh of
    const T* log_std;             // Gaussian, not of a layer: (action_dim,)

    // Those of the Gaussian.
    PARL_INLINE const T* raw_actions() const { return squash ? unsquashed : actions; }
    bool is(math::Head head) const { return kind == head; }
};

// Weighted second derivatives of the log-probabilities, and the Fisher matrices, in the network's outputs.
template <typename T>
struct HeadCurvature {
    T* weights;   // categorical: (steps,), Fisher weight minus Hessian weight
    T* diagonal;  // Gaussian: (steps, outputs)
    T* cross;     // Gaussian, log_std of a layer or global: (steps, outputs), with the other of the pair
    T* log_std_square;  // global log_std: (outputs,), summed over steps
};

// log π and its gradients, of all steps; `bias` (outputs,) is added to the output.
template <typename T>
void start_head(const PolicyHead<T>& head, const T* bias, T* log_prob, cudaStream_t stream);

// Fills `curvature` for weights (steps,), either of which may be null; `scratch` holds (row_blocks(steps),
// outputs).
template <typename T>
void curve_head(const PolicyHead<T>& head, const T* hessian, const T* fisher,
                const HeadCurvature<T>& curvature, T* scratch, cudaStream_t stream);

// The tangent of the output: products (steps, outputs) + bias (outputs,), and that of a free log_std
// (outputs,).
template <typename T>
struct OutputTangent {
    const T* products;
    const T* bias;
    const T* log_std;
};

// Sums over a step's outputs: along (steps,), J v; means (steps,), of a categorical head the probabilities'
// mean of the tangent. Either may be null.
template <typename T>
void head_along(const PolicyHead<T>& head, const OutputTangent<T>& tangent, T* along, T* means,
                cudaStream_t stream);

// What goes back through the output: curvature times tangent, if `curvature` is not null, plus `steps` (steps,)
// times the gradient, if that is not null; and its column sums. Those of a free log_std have a place of their
// own.
template <typename T>
void head_cotangent(const PolicyHead<T>& head, const HeadCurvature<T>* curvature,
                    const OutputTangent<T>& tangent, const T* means, const T* steps, Matrix<T> out,
                    Partials<T> sums, Partials<T> log_std_sums, cudaStream_t stream);

}  // namespace parl::cuda
