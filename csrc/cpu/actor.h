// The action of a squashed Gaussian policy for a single observation. Contract: parl_core/rl/sac.py.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace parl::cpu {

template <typename T>
struct ActorLayer {
    const T* weight;  // (outputs, inputs)
    const T* bias;    // (outputs,)
    std::int64_t inputs;
    std::int64_t outputs;
};

// ReLU between the layers; the last one gives the mean and the raw logarithm of the standard deviation of
// each coordinate. noise (action size,), or null for the mean action. scratch: twice the widest layer's
// inputs or outputs.
PARL_IN_EACH_ISA(template <typename T> void actor_act(const ActorLayer<T>* layers, int num_layers,
                                                      const T* observation, const T* noise, T* scratch,
                                                      T* action);)

}  // namespace parl::cpu
