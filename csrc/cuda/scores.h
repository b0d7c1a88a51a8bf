// What goes by trajectory: each one's own gradient of the parameters, and the sums between a JVP and a VJP in
// products with Σ_i Σ_h g_h S_{i,0:h} S_{i,0:h}ᵀ.
//
// The host does not know where trajectories begin: offsets (num_trajectories + 1,) are read by the kernels,
// which stay within the steps whatever they hold.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/mlp_layers.h"

namespace parl::cuda {

struct Trajectories {
    const std::int64_t* offsets;
    std::int64_t count, num_steps;
};

// out_h = Σ_{k≥h} weights_k Σ_{j≤k} along_j within each trajectory; all (num_steps,). Steps of no trajectory are
// left as they are.
template <typename T>
void accumulate_scores(const Trajectories& trajectories, const T* along, const T* weights, T* out,
                       cudaStream_t stream);

// What each step adds to a trajectory's score. Passed to kernels by value.
template <typename T>
struct ScoreFactors {
    Matrix<const T> deltas[kMaxLayers];  // (steps, outputs): cotangents of each layer's output
    Matrix<const T> inputs[kMaxLayers];  // (steps, inputs): what the layer has seen
    const T* steps;             // (steps,) weights of log_std_gradient, which the deltas hold already
    const T* log_std_gradient;  // (steps, free_log_std)
};

// out (num_trajectories, P): all layers' δᵀ·input and column sums over each trajectory's steps, and the free
// log_std's.
template <typename T>
void write_scores(const Network& network, const Trajectories& trajectories, const ScoreFactors<T>& factors,
                  T* out, cudaStream_t stream);

}  // namespace parl::cuda
