// What conjugate gradients do to vectors between two products, with all scalars and decisions in device memory, so
// that a solve only launches and a CUDA graph can hold it. Contract: `launch` with `ConjugateGradients` of
// parl_core/hypergrad/solvers, for one right-hand side, as they run away from the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace parl::cuda {

// Where a solve's floating-point scalars are among its `reals`; the last two carry over from kernel to kernel.
enum Real { kNorm, kOperatorNorm, kBest, kSquare, kRatio, kNumReals };
// Likewise its `words`: an active solve iterates, an unchecked one has a norm that is the recurrence's.
// kRestart stays set where a solve is over, which costs no more than the same r and p again.
enum Word { kCount, kFailures, kNegative, kHalted, kActive, kUnchecked, kRestart, kTicket, kNumWords };

// Of `partials`, sums by block.
constexpr int kNumPartials = 1584;

// Device memory of one solve of A x = rhs, with ‖rhs‖ = 1 unless rhs is zero. All of it may hold anything before
// `cg_start` but for rhs and x, the start.
template <typename T>
struct CgSolve {
    std::int64_t size;
    const T* rhs;      // (size,)
    T* x;              // (size,)
    T* r;              // (size,) the recurrence's residual
    T* p;              // (size,) the direction
    T* history;        // (max_iterations + 1,) norms; those after `count` are not written
    T* reals;          // (kNumReals,)
    int* words;        // (kNumWords,)
    double* partials;  // (kNumPartials,)
    double rtol;
    int max_iterations;
    int patience;  // restarts in a row that may fail to halve the residual
};

// Begins at x, whose residual rhs − A x is given.
template <typename T>
void cg_start(const CgSolve<T>& solve, const T* residual, cudaStream_t stream);

// One iteration, with the product A p; leaves the next direction in p. Nothing happens once the solve is over. One
// launch for short vectors, three for others.
template <typename T>
void cg_step(const CgSolve<T>& solve, const T* image, cudaStream_t stream);

// Puts the true residual's norm in place of the recurrence's, with the product A x, and starts again from x where the
// two disagree materially.
template <typename T>
void cg_check(const CgSolve<T>& solve, const T* image, cudaStream_t stream);

}  // namespace parl::cuda
