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

// Labelled pairs to learn from, each two stretches of equally many rows of one table: those of member k are
// offsets[k] to offsets[k + 1], none being allowed.
template <typename T>
struct EnsemblePairs {
    const T* steps;               // (…, inputs)
    const std::int64_t* starts;   // (pairs, 2): first rows
    const std::int64_t* lengths;  // (pairs,), in rows
    std::int64_t longest;         // of lengths
    const T* labels;              // (pairs,)
    const std::int64_t* offsets;  // (members + 1,)
    std::int64_t batch_size;      // what the sum of a member's losses is divided by
};

// Elements of memory that the functions below take: aligned to 64 bytes, zero before their first use, and
// left alone between uses on networks of the same shape. pair_length: that of the longest segment, or 0
// without pairs.
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

// The preference loss (math/preference.h) and its gradient, in one pass over the pairs: the sum over members
// of the sum over its pairs, divided by batch_size. logits (pairs,): of "the second is preferred".
PARL_IN_EACH_ISA(template <typename T> double ensemble_preference_gradient(
                     const Ensemble<T>& ensemble, const EnsemblePairs<T>& pairs, T* workspace,
                     int num_threads, const EnsembleGradients<T>& gradients, T* logits);)

}  // namespace parl::cpu
