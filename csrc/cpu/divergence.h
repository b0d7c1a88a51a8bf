// Monte-Carlo estimates of f-divergences on the CPU. Contract: parl_core/ops/f_divergence.py.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "math/divergence.h"

namespace parl::cpu {

// What is averaged at a log-ratio r: the jet of `function` at x = r, or at −r if `flipped`, over the ratio
// e^x if `over_ratio`. Derivatives are those in r.
struct DivergenceTerm {
    math::Divergence function;
    bool flipped;
    bool over_ratio;
    double alpha;
};

PARL_IN_EACH_ISA(
    // Σ wᵢ g(rᵢ), and in gradient (count,), unless null, wᵢ g'(rᵢ). log_ratio, weights: (count,); no weights:
    // 1/count.
    template <typename T> double divergence_sum(const T* log_ratio, std::int64_t count, const T* weights,
                                                const DivergenceTerm& term, int num_threads, T* gradient);

    // The same over rᵢ = Σ log_ratio[offsets[i]:offsets[i + 1]], weights (num_trajectories,).
    template <typename T>
    double divergence_sum_of_trajectories(const T* log_ratio, const std::int64_t* offsets,
                                          std::int64_t num_trajectories, const T* weights,
                                          const DivergenceTerm& term, int num_threads, T* gradient);

    // g, g' or g'' (order 0, 1, 2) of every element. log_ratio, out: (count,).
    template <typename T>
    void divergence_terms(const T* log_ratio, std::int64_t count, const DivergenceTerm& term, int order,
                          int num_threads, T* out);)

}  // namespace parl::cpu
