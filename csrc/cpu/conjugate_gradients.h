// Conjugate gradients on an operator of a linearization, in one call. Contract: `drive` and
// `ConjugateGradients` of parl_core/hypergrad/solvers, for one right-hand side, after whose start it goes on.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/linearization.h"

namespace parl::cpu {

// (A + damping·I) x = rhs, with ‖rhs‖ = 1 unless rhs is zero.
template <typename T>
struct ShiftedSystem {
    Curvature<T>* product;
    T damping;
    const T* rhs;  // (size,)
    std::int64_t size;
};

struct StoppingRule {
    double rtol;
    std::int64_t max_iterations;
    std::int64_t check_every;  // iterations between true residuals
    std::int64_t patience;     // restarts in a row that may fail to halve the residual
};

template <typename T>
struct SolveEnd {
    std::vector<T> residuals;  // (iterations + 1,); the last one is true
    std::int64_t products = 0;
    bool negative = false;   // a direction of negative curvature was met
    bool halted = false;     // the curvature was negligible; x is the last good iterate
    bool restarted = false;  // the recurrence and the truth have parted
    bool stagnated = false;
    T operator_norm = T(0);  // the largest ‖A p‖ / ‖p‖
};

// x: the start, then the solution; residual: rhs − A x at the start, kept as it is. `between` is called
// before each iteration and may throw. Bit-reproducible for a fixed num_threads.
template <typename T>
SolveEnd<T> conjugate_gradients(const ShiftedSystem<T>& system, const StoppingRule& rule, const T* residual,
                                T* x, int num_threads, const std::function<void()>& between);

}  // namespace parl::cpu
