#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/scores.h"

namespace parl::cuda {
namespace {

// Of a weight's gradient, a block of 16 × 16 threads computes a tile of 64 × 64, each thread 4 × 4 of it, from
// 16 steps at a time: 16 multiply-adds for eight numbers from shared memory.
constexpr int kTile = 64, kSide = 16, kEach = kTile / kSide, kSteps = 16;
constexpr int kThreads = kSide * kSide;

struct Steps {
    std::int64_t begin, end;
};

__device__ __forceinline__ std::int64_t within(std::int64_t offset, std::int64_t low, std::int64_t high) {
    return offset < low ? low : offset > high ? high : offset;
}

__device__ __forceinline__ Steps steps_of(const Trajectories& trajectories, std::int64_t trajectory) {
    const std::int64_t begin = within(trajectories.offsets[trajectory], 0, trajectories.num_steps);
    return {begin, within(trajectories.offsets[trajectory + 1], begin, trajectories.num_steps)};
}

// The sum of the values of the threads up to this one, and of all threads.
template <typename T>
struct Scanned {
    T inclusive, total;
};

template <int kBlock, typename T>
__device__ __forceinline__ Scanned<T> block_scan(T value) {
    constexpr int kWarps = kBlock / kWarp;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
        const T before = __shfl_up_sync(kAllLanes, value, step);
        if (lane >= step) value += before;
    }
    if constexpr (kWarps == 1) {
        return {value, __shfl_sync(kAllLanes, value, kWarp - 1)};
    } else {
        __shared__ T sums[kWarps];
        if (lane == kWarp - 1) sums[warp] = value;
        __syncthreads();
        T before(0), total(0);
        for (int w = 0; w < kWarps; ++w) {
            if (w == warp) before = total;
            total += sums[w];
        }
        __syncthreads();
        return {before + value, total};
    }
}

// A block to each trajectory.
template <int kBlock, typename T>
__global__ void accumulate_kernel(Trajectories trajectories, const T* along, const T* weights, T* out) {
    const Steps steps = steps_of(trajectories, blockIdx.x);
    T carry(0);
    for (std::int64_t first = steps.begin; first < steps.end; first += kBlock) {
        const std::int64_t t = first + threadIdx.x;
        const Scanned<T> sum = block_scan<kBlock>(t < steps.end ? along[t] : T(0));
        if (t < steps.end) out[t] = weights[t] * (carry + sum.inclusive);
        carry += sum.total;
    }
    carry = T(0);
    // Backwards each thread meets a step that another one may have written.
    if constexpr (kBlock > kWarp) {
        __syncthreads();
    } else {
        __syncwarp();
    }
    for (std::int64_t last = steps.end; last > steps.begin; last -= kBlock) {
        const std::int64_t t = last - 1 - threadIdx.x;
        const Scanned<T> sum = block_scan<kBlock>(t >= steps.begin ? out[t] : T(0));
        if (t >= steps.begin) out[t] = carry + sum.inclusive;
        carry += sum.total;
    }
}

// Which part of a trajectory's score a block writes.
struct Part {
    int layer;  // num_layers for the free log_std
    std::int64_t row, column;
};

__host__ __device__ inline std::int64_t tiles(std::int64_t size) { return (size + kTile - 1) / kTile; }

__device__ __forceinline__ Part part_of(const Network& network, std::int64_t number) {
    for (int l = 0; l < network.num_layers; ++l) {
        const std::int64_t across = tiles(network.layers[l].inputs);
        const std::int64_t count = across * tiles(network.layers[l].outputs);
        if (number < count) return {l, number / across * kTile, number % across * kTile};
        number -= count;
    }
    return {network.num_layers, 0, 0};
}

template <typename T>
__device__ __forceinline__ T element(Matrix<const T> matrix, std::int64_t t, std::int64_t end,
                                     std::int64_t column, std::int64_t columns) {
    return t < end && column < columns ? matrix.data[t * matrix.stride + column] : T(0);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    scores_kernel(Network network, std::int64_t parts, Trajectories trajectories, ScoreFactors<T> factors,
                  T* out) {
    __shared__ T rows[kSteps][kTile], columns[kSteps][kTile];
    const std::int64_t trajectory = blockIdx.x / parts;
    const Steps steps = steps_of(trajectories, trajectory);
    const Part part = part_of(network, blockIdx.x % parts);
    T* const score = out + trajectory * network.num_params;
    if (part.layer == network.num_layers) {
        for (std::int64_t j = threadIdx.x; j < network.free_log_std; j += kThreads) {
            T sum(0);
            for (std::int64_t t = steps.begin; t < steps.end; ++t) {
                sum += factors.steps[t] * factors.log_std_gradient[t * network.free_log_std + j];
            }
            score[j] = sum;
        }
        return;
    }
    const LayerShape& layer = network.layers[part.layer];
    const Matrix<const T> deltas = factors.deltas[part.layer], inputs = factors.inputs[part.layer];
    const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
    T sums[kEach][kEach] = {};
    T bias[kEach] = {};
    for (std::int64_t first = steps.begin; first < steps.end; first += kSteps) {
#pragma unroll
        for (int k = 0; k < kSteps * kTile / kThreads; ++k) {
            const int at = k * kThreads + static_cast<int>(threadIdx.x);
            const int step = at / kTile, column = at % kTile;
            rows[step][column] = element(deltas, first + step, steps.end, part.row + column, layer.outputs);
            columns[step][column] =
                element(inputs, first + step, steps.end, part.column + column, layer.inputs);
        }
        __syncthreads();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            T left[kEach], right[kEach];
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                left[i] = rows[step][y + kSide * i];
                right[i] = columns[step][x + kSide * i];
            }
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                bias[i] += left[i];
#pragma unroll
                for (int j = 0; j < kEach; ++j) sums[i][j] += left[i] * right[j];
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const std::int64_t row = part.row + y + kSide * i;
        if (row >= layer.outputs) continue;
        if (part.column == 0 && x == 0) score[layer.bias() + row] = bias[i];
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            const std::int64_t column = part.column + x + kSide * j;
            if (column < layer.inputs) score[layer.weight + row * layer.inputs + column] = sums[i][j];
        }
    }
}

// Blocks along x, of which CUDA takes 2³¹ − 1.
dim3 grid_of(std::int64_t blocks, const char* what) {
    if (blocks > 0x7fffffff) throw std::runtime_error(std::string(what) + " are too many for one launch");
    return dim3(static_cast<unsigned>(blocks));
}

}  // namespace

template <typename T>
void accumulate_scores(const Trajectories& trajectories, const T* along, const T* weights, T* out,
                       cudaStream_t stream) {
    if (trajectories.count == 0) return;
    // A warp is enough for trajectories of some hundred steps; the sums of eight warps pay for longer ones.
    const bool is_long = trajectories.num_steps / trajectories.count > 512;
    const dim3 grid = grid_of(trajectories.count, "trajectories");
    if (is_long) {
        launch(accumulate_kernel<256, T>, grid, dim3(256), 0, stream, trajectories, along, weights, out);
    } else {
        launch(accumulate_kernel<kWarp, T>, grid, dim3(kWarp), 0, stream, trajectories, along, weights, out);
    }
}

template <typename T>
void write_scores(const Network& network, const Trajectories& trajectories, const ScoreFactors<T>& factors,
                  T* out, cudaStream_t stream) {
    if (trajectories.count == 0) return;
    std::int64_t parts = network.free_log_std > 0 ? 1 : 0;
    for (int l = 0; l < network.num_layers; ++l) {
        parts += tiles(network.layers[l].inputs) * tiles(network.layers[l].outputs);
    }
    launch(scores_kernel<T>, grid_of(trajectories.count * parts, "trajectories' scores"), dim3(kThreads), 0,
           stream, network, parts, trajectories, factors, out);
}

#define PARL_INSTANTIATE(T)                                                                        \
    template void accumulate_scores<T>(const Trajectories&, const T*, const T*, T*, cudaStream_t); \
    template void write_scores<T>(const Network&, const Trajectories&, const ScoreFactors<T>&, T*, \
                                  cudaStream_t);
PARL_INSTANTIATE(float)
PARL_INSTANTIATE(double)
#undef PARL_INSTANTIATE

}  // namespace parl::cuda
