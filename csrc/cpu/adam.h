// Adam's step and Polyak averaging, each in one pass over memory.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace parl::cpu {

// The numbers of one step, alike for all elements of a tensor.
template <typename T>
struct AdamStep {
    T step_size;          // learning rate / (1 − β₁ᵗ)
    T second_correction;  // 1 / √(1 − β₂ᵗ)
    T first_weight;       // 1 − β₁
    T second_decay;       // β₂
    T second_weight;      // 1 − β₂
    T epsilon;
};

// `step` counts from 1. Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization", in the form of
// torch.optim.Adam: the denominator is √v̂ + ε.
template <typename T>
AdamStep<T> adam_step(double learning_rate, double beta1, double beta2, double epsilon, double step);

template <typename T>
struct AdamTensor {
    T* param;
    const T* gradient;
    T* exp_avg;
    T* exp_avg_sq;
    std::int64_t size;
    AdamStep<T> step;
};

// Elements [begin, end) of `count` tensors laid end to end, so that threads can share them evenly.
PARL_IN_EACH_ISA(template <typename T> void adam_range(const AdamTensor<T>* tensors, std::int64_t count,
                                                       std::int64_t begin, std::int64_t end);)

template <typename T>
struct PolyakTensor {
    T* target;
    const T* source;
    std::int64_t size;
};

// target += weight · (source − target), over elements [begin, end) of the tensors laid end to end.
PARL_IN_EACH_ISA(template <typename T> void polyak_range(const PolyakTensor<T>* tensors, std::int64_t count,
                                                         T weight, std::int64_t begin, std::int64_t end);)

// One step of all tensors. No element depends on another: the result does not depend on num_threads.
template <typename T>
void adam(const AdamTensor<T>* tensors, std::int64_t count, int num_threads);

}  // namespace parl::cpu
