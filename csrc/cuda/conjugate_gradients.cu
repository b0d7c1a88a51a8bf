#include <algorithm>
#include <cmath>

#include "cuda/conjugate_gradients.h"
#include "cuda/krylov.h"
#include "cuda/launch.h"
#include "math/conjugate_gradients.h"

namespace parl::cuda {
namespace {

static_assert(kNumPartials == 3 * kMaxSweepBlocks, "three sums of each block");

// Up to here one block does a whole iteration, in one launch. It moves 11 numbers an element, at most 360 KB of
// float, mostly between registers and the first-level cache; two launches more would cost a few microseconds.
constexpr std::int64_t kOneBlock = 8192;

template <typename T>
__device__ T root(double square) {
    return static_cast<T>(sqrt(square));
}

template <typename T>
__device__ bool is_finite(T value) {
    return fabs(static_cast<double>(value)) < HUGE_VAL;
}

// Sets whether the solve goes on; what is compared is rounded to T, as a tensor would be.
template <typename T>
__device__ void decide(const CgSolve<T>& s) {
    const T norm = s.reals[kNorm];
    s.words[kActive] = is_finite(norm) && norm > static_cast<T>(s.rtol) && !s.words[kHalted] &&
                       s.words[kFailures] < s.patience && s.words[kCount] < s.max_iterations;
}

// p·A p, p·p and A p·A p.
template <typename T>
struct CurvatureVisit {
    const CgSolve<T>& s;
    const T* image;

    __device__ void operator()(std::int64_t i, double (&sums)[3]) const {
        const T direction = s.p[i];
        const T full = image[i];
        sums[0] += static_cast<double>(direction) * static_cast<double>(full);
        sums[1] += static_cast<double>(direction) * static_cast<double>(direction);
        sums[2] += static_cast<double>(full) * static_cast<double>(full);
    }
};

// The length of the step along p, left in kRatio; a solve that cannot go on is frozen.
template <typename T>
__device__ void finish_curvature(const CgSolve<T>& s, const double (&sums)[3]) {
    const T curvature = static_cast<T>(sums[0]);
    const T growth = root<T>(sums[2]) / root<T>(sums[1]);
    if (!(growth <= s.reals[kOperatorNorm])) s.reals[kOperatorNorm] = growth;  // a NaN too
    const T negligible = math::negligible_curvature(s.reals[kOperatorNorm], static_cast<T>(sums[1]));
    s.words[kUnchecked] = 1;
    s.words[kHalted] = fabs(static_cast<double>(curvature)) <= static_cast<double>(negligible);
    if (curvature < -negligible) s.words[kNegative] = 1;
    s.reals[kRatio] = s.reals[kSquare] / curvature;
    if (s.words[kHalted]) s.words[kActive] = 0;
}

// x += step·p and r −= step·A p; r·r.
template <typename T>
struct StepVisit {
    const CgSolve<T>& s;
    const T* image;
    T step;

    __device__ void operator()(std::int64_t i, double (&sums)[1]) const {
        s.x[i] += step * s.p[i];
        const T residual = s.r[i] - step * image[i];
        s.r[i] = residual;
        sums[0] += static_cast<double>(residual) * static_cast<double>(residual);
    }
};

// Leaves in kRatio how much of p goes on in the next direction.
template <typename T>
__device__ void finish_step(const CgSolve<T>& s, double sum) {
    const T square = static_cast<T>(sum);
    s.reals[kRatio] = square / s.reals[kSquare];
    s.reals[kSquare] = square;
    s.reals[kNorm] = root<T>(sum);
    s.history[++s.words[kCount]] = s.reals[kNorm];
    decide(s);
}

// Of a residual: it becomes r and p; r·r.
template <typename T>
struct StartVisit {
    const CgSolve<T>& s;
    const T* residual;

    __device__ void operator()(std::int64_t i, double (&sums)[1]) const {
        const T value = residual[i];
        s.r[i] = value;
        s.p[i] = value;
        sums[0] += static_cast<double>(value) * static_cast<double>(value);
    }
};

template <typename T>
__device__ T residual_at(const CgSolve<T>& s, const T* image, std::int64_t i) {
    return s.rhs[i] - image[i];
}

// Of the true residual, and of x.
template <typename T>
struct ResidualVisit {
    const CgSolve<T>& s;
    const T* image;

    __device__ void operator()(std::int64_t i, double (&sums)[2]) const {
        const double residual = static_cast<double>(residual_at(s, image, i)),
                     x = static_cast<double>(s.x[i]);
        sums[0] += residual * residual;
        sums[1] += x * x;
    }
};

template <typename T>
__device__ void finish_residual(const CgSolve<T>& s, const double (&sums)[2]) {
    const T rtol = static_cast<T>(s.rtol), claimed = s.reals[kNorm], norm = root<T>(sums[0]);
    s.reals[kNorm] = norm;
    s.words[kUnchecked] = 0;
    s.words[kRestart] = math::has_parted(norm, claimed, rtol);
    if (s.words[kRestart]) {
        const bool rounding = math::is_rounding(norm, s.reals[kOperatorNorm], root<T>(sums[1]), s.rtol);
        s.words[kFailures] =
            math::failures_after_restart(s.words[kFailures], norm, s.reals[kBest], rounding, s.patience);
        if (norm < s.reals[kBest]) s.reals[kBest] = norm;
        s.reals[kSquare] = static_cast<T>(sums[0]);
    }
    s.history[s.words[kCount]] = norm;
    decide(s);
}

__global__ void reset(int* words) {
    if (threadIdx.x < kNumWords) words[threadIdx.x] = 0;
}

template <typename T>
__global__ void start(CgSolve<T> s, const T* residual) {
    sweep<1>(s.size, s.partials, s.words + kTicket, StartVisit<T>{s, residual}, [&](const double (&sums)[1]) {
        s.reals[kSquare] = static_cast<T>(sums[0]);
        s.reals[kNorm] = root<T>(sums[0]);
        s.reals[kOperatorNorm] = T(0);
        s.reals[kBest] = static_cast<T>(HUGE_VAL);
        s.history[0] = s.reals[kNorm];
        decide(s);
    });
}

template <typename T>
__global__ void curvature(CgSolve<T> s, const T* image) {
    if (!s.words[kActive]) return;
    sweep<3>(s.size, s.partials, s.words + kTicket, CurvatureVisit<T>{s, image},
             [&](const double (&sums)[3]) { finish_curvature(s, sums); });
}

template <typename T>
__global__ void step(CgSolve<T> s, const T* image) {
    if (!s.words[kActive]) return;
    sweep<1>(s.size, s.partials, s.words + kTicket, StepVisit<T>{s, image, s.reals[kRatio]},
             [&](const double (&sums)[1]) { finish_step(s, sums[0]); });
}

template <typename T>
__device__ void turn(const CgSolve<T>& s, T ratio) {
    const std::int64_t stride = std::int64_t{blockDim.x} * gridDim.x;
#pragma unroll 4
    for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < s.size; i += stride) {
        s.p[i] = s.r[i] + ratio * s.p[i];
    }
}

template <typename T>
__global__ void direction(CgSolve<T> s) {
    if (s.words[kActive]) turn(s, s.reals[kRatio]);
}

// The three in one block.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads) iteration(CgSolve<T> s, const T* image) {
    if (!s.words[kActive]) return;
    double along[3];
    visit_elements<3>(s.size, CurvatureVisit<T>{s, image}, along);
    sum_block<3>(along);
    if (threadIdx.x == 0) finish_curvature(s, along);
    __syncthreads();
    if (!s.words[kActive]) return;
    double square[1];
    visit_elements<1>(s.size, StepVisit<T>{s, image, s.reals[kRatio]}, square);
    sum_block<1>(square);  // waits for all to have read the step's length
    if (threadIdx.x == 0) finish_step(s, square[0]);
    __syncthreads();
    if (s.words[kActive]) turn(s, s.reals[kRatio]);
}

template <typename T>
__global__ void residual(CgSolve<T> s, const T* image) {
    if (!s.words[kUnchecked]) return;
    sweep<2>(s.size, s.partials, s.words + kTicket, ResidualVisit<T>{s, image},
             [&](const double (&sums)[2]) { finish_residual(s, sums); });
}

template <typename T>
__global__ void restart(CgSolve<T> s, const T* image) {
    if (!s.words[kRestart]) return;
    const std::int64_t stride = std::int64_t{blockDim.x} * gridDim.x;
    for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < s.size; i += stride) {
        s.r[i] = s.p[i] = residual_at(s, image, i);
    }
}

template <typename T, typename... P, typename... A>
void launch_sweep(void (*kernel)(P...), const CgSolve<T>& solve, cudaStream_t stream, A... arguments) {
    launch(kernel, dim3(static_cast<unsigned>(sweep_blocks(solve.size))), dim3(kSweepThreads), 0, stream,
           solve, arguments...);
}

}  // namespace

template <typename T>
void cg_start(const CgSolve<T>& solve, const T* residual, cudaStream_t stream) {
    launch(reset, dim3(1), dim3(kWarp), 0, stream, solve.words);
    launch_sweep(start<T>, solve, stream, residual);
}

template <typename T>
void cg_step(const CgSolve<T>& solve, const T* image, cudaStream_t stream) {
    if (solve.size <= kOneBlock) {
        const std::int64_t warps = (solve.size + kWarp * kSweepElements - 1) / (kWarp * kSweepElements);
        const unsigned threads =
            static_cast<unsigned>(std::clamp<std::int64_t>(kWarp * warps, kWarp, kBlockThreads));
        launch(iteration<T>, dim3(1), dim3(threads), 0, stream, solve, image);
        return;
    }
    launch_sweep(curvature<T>, solve, stream, image);
    launch_sweep(step<T>, solve, stream, image);
    launch_sweep(direction<T>, solve, stream);
}

template <typename T>
void cg_check(const CgSolve<T>& solve, const T* image, cudaStream_t stream) {
    launch_sweep(residual<T>, solve, stream, image);
    launch_sweep(restart<T>, solve, stream, image);
}

#define PARL_INSTANTIATE(T)                                               \
    template void cg_start<T>(const CgSolve<T>&, const T*, cudaStream_t); \
    template void cg_step<T>(const CgSolve<T>&, const T*, cudaStream_t);  \
    template void cg_check<T>(const CgSolve<T>&, const T*, cudaStream_t);
PARL_INSTANTIATE(float)
PARL_INSTANTIATE(double)

}  // namespace parl::cuda
