// The nearest neighbours of each of a growing number of states. Contract: parl_core/rl/state_entropy.py.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace parl::cpu {

// States lie in blocks of so many, coordinate by coordinate, so that their distances need no sums across lanes.
inline constexpr int kStatesInBlock = 16;

struct Neighbours {
    const float* states;  // (blocks, dim, 16)
    float* nearest;       // (k, stride): squared distances, ascending along k; stride is a multiple of 16
    std::int64_t num, dim, k, stride;
};

// Writes the list of the state in `row`; with `mutual` also enters it into the lists of the others.
PARL_IN_EACH_ISA(void find_neighbours(const Neighbours& all, std::int64_t row, bool mutual);)

}  // namespace parl::cpu
