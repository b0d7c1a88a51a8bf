// One update of soft actor-critic: critics, actor, temperature and targets. Contract: parl_core/rl/sac.py.
#pragma once

#include <cstdint>

#include "cpu/adam.h"
#include "cpu/isa.h"

namespace parl::cpu {

inline constexpr int kSacMaxLayers = 16;
inline constexpr int kSacMaxThreads = 64;

// A parameter, its gradient, and Adam's averages and step count for it.
template <typename T>
struct SacParam {
    T* value;
    T* gradient;
    T* exp_avg;
    T* exp_avg_sq;
    float* step;
    std::int64_t size;
};

// Layer l has the weight 2l and the bias 2l + 1. The actor's weights are (out, in), the critics'
// (2, in, out).
template <typename T>
struct SacState {
    std::int64_t obs_dim;
    std::int64_t act_dim;
    std::int64_t hidden[kSacMaxLayers];
    int num_layers;
    SacParam<T> actor[2 * kSacMaxLayers];
    SacParam<T> critic[2 * kSacMaxLayers];
    T* target[2 * kSacMaxLayers];
    SacParam<T> log_temperature;
};

struct SacRule {
    double discount;
    double polyak;
    bool move_targets;
    double target_entropy;
    double actor_rate;
    double critic_rate;
    double temperature_rate;
    double beta1;
    double beta2;
    double epsilon;
};

// Rows lie `…_stride` elements apart.
template <typename T>
struct SacBatch {
    std::int64_t rows;
    const T* observations;
    std::int64_t observations_stride;
    const T* actions;
    std::int64_t actions_stride;
    const T* rewards;
    std::int64_t rewards_stride;
    const T* next_observations;
    std::int64_t next_observations_stride;
    const T* terminated;
    std::int64_t terminated_stride;
    const T* next_noise;  // (rows, act_dim), standard normal, for the actions after next_observations
    const T* noise;       // the same for the actor's own step
};

struct SacReport {
    double critic_loss;
    double actor_loss;
    double entropy;
    double temperature;
};

// Elements of memory that `sac_update` takes: aligned to 64 bytes, zero before its first use, and left alone
// between uses with the same arguments.
PARL_IN_EACH_ISA(template <typename T> std::int64_t sac_workspace(const SacState<T>& state, int num_threads);)

// Bit-identical for a given number of threads.
PARL_IN_EACH_ISA(template <typename T> SacReport sac_update(const SacState<T>& state, const SacRule& rule,
                                                            const SacBatch<T>& batch, T* workspace,
                                                            int num_threads);)

}  // namespace parl::cpu
