// An ensemble of reward networks with leaky ReLU (slope .01) between the layers and a tanh after the last.
// Contracts: parl_core/ops/ensemble_rewards.py, parl_core/preference/reward_learning.py.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace parl::cpu {

inline constexpr int kEnsembleMaxLayers = 16;
inline constexpr int kEnsembleMaxThreads = 64;

// Layer l maps widths[l] to widths[l + 1]; the last has one output.
template <typename T>
struct Ensemble {
    std::int64_t members;
    int num_layers;
    std::int64_t widths[kEnsembleMaxLayers + 1];
    const T* weights[kEnsembleMaxLayers];  // (members, inputs, outputs)
    const T* biases[kEnsembleMaxLayers];   // (members, 1, outputs)
};

template <typename T>
struct EnsembleGradients {
    T* weights[kEnsembleMaxLayers];
    T* biases[kEnsembleMaxLayers];
};

// The inputs of `rows` rows, contiguous; member k's are member_stride elements after member k − 1's, or for 0
// the same.
template <typename T>
struct EnsembleInputs {
    const T* data;
    std::int64_t rows;
    std::int64_t member_stride;
};

// Labelled pairs to learn from: segments (…, 2, length, inputs), labels (…); indices (members, num_pairs) say
// which pairs each member takes.
template <typename T>
struct EnsemblePairs {
    const T* segments;
    const T* labels;
    std::int64_t length;
    const std::int64_t* indices;
    std::int64_t num_pairs;
};

struct EnsembleFit {
    double loss;           // summed over members, mean over pairs
    std::int64_t correct;  // pairs with a preference that are ordered as labelled, over all members
};

// Elements of memory that the functions below take: aligned to 64 bytes, zero before their first use, and
// left alone between uses on networks of the same shape. pair_length: that of the segments, or 0 without
// pairs.
PARL_IN_EACH_ISA(template <typename T> std::int64_t ensemble_workspace(const Ensemble<T>& ensemble,
                                                                       std::int64_t pair_length,
                                                                       int num_threads);)

// rewards (members, rows).
PARL_IN_EACH_ISA(template <typename T> void ensemble_forward(const Ensemble<T>& ensemble,
                                                             const EnsembleInputs<T>& inputs, T* workspace,
                                                             int num_threads, T* rewards);)

// The same for a few rows, on one thread and without packing the weights first. scratch: twice the widest
// layer.
PARL_IN_EACH_ISA(template <typename T> void ensemble_forward_few(const Ensemble<T>& ensemble,
                                                                 const EnsembleInputs<T>& inputs, T* scratch,
                                                                 T* rewards);)

// From the gradient of the rewards, `weights` (members, rows), that of the parameters, and unless null that
// of each member's inputs (members, rows, widths[0]). The forward pass is done again, block by block.
PARL_IN_EACH_ISA(template <typename T>
                 void ensemble_backward(const Ensemble<T>& ensemble, const EnsembleInputs<T>& inputs,
                                        const T* weights, T* workspace, int num_threads,
                                        const EnsembleGradients<T>& gradients, T* input_gradients);)

// The preference loss (math/preference.h), summed over members, mean over pairs, and its gradient, in one
// pass over the pairs.
PARL_IN_EACH_ISA(template <typename T> EnsembleFit ensemble_preference_gradient(
                     const Ensemble<T>& ensemble, const EnsemblePairs<T>& pairs, T* workspace,
                     int num_threads, const EnsembleGradients<T>& gradients);)

}  // namespace parl::cpu
