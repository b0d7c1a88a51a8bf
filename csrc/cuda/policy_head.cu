#include "cuda/head_cotangent.cuh"
#include "cuda/launch.h"
#include "cuda/policy_head.h"
#include "cuda/row_tiles.cuh"

namespace parl::cuda {
namespace {

using math::Head;

constexpr int kThreads = 128;
// From so many outputs on, a warp takes a step; below, a thread.
constexpr std::int64_t kWide = 32;

// The lanes that share a step.
template <int kLanes, typename T>
__device__ __forceinline__ T lane_sum(T value) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step, kLanes);
    return value;
}

template <int kLanes, typename T>
__device__ __forceinline__ T lane_maximum(T value) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
        value = math::maximum(value, __shfl_xor_sync(kAllLanes, value, step, kLanes));
    }
    return value;
}

template <int kLanes>
__device__ __forceinline__ std::int64_t lane_row() {
    return (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
}

template <int kLanes, typename T>
__global__ void start_gaussian_kernel(PolicyHead<T> head, const T* bias, T* log_prob) {
    const std::int64_t t = lane_row<kLanes>();
    if (t >= head.num_steps) return;
    const int lane = threadIdx.x % kLanes;
    const bool of_state = head.kind == Head::kGaussianState;
    T* const z = head.output + t * head.outputs;
    T* const gradient = head.gradient + t * head.outputs;
    T total(0);
    for (std::int64_t j = lane; j < head.action_dim; j += kLanes) {
        T action = head.actions[t * head.action_dim + j];
        if (head.squash) {
            action = math::unsquash(action);
            head.unsquashed[t * head.action_dim + j] = action;
            total -= math::log_tanh_slope(action);
        }
        const T mean = z[j] += bias[j];
        math::StateLogStd<T> log_std{T(0), T(0), T(0)};
        if (of_state) {
            log_std = math::state_log_std(z[head.action_dim + j] += bias[head.action_dim + j]);
        } else {
            log_std.value = head.log_std[j];
        }
        const auto term = math::gaussian_term(action, mean, log_std.value);
        total += term.log_prob;
        gradient[j] = term.by_mean;
        if (of_state) gradient[head.action_dim + j] = term.by_log_std * log_std.slope;
        if (head.kind == Head::kGaussianGlobal) head.log_std_gradient[t * head.outputs + j] = term.by_log_std;
    }
    total = lane_sum<kLanes>(total);
    if (lane == 0) log_prob[t] = total;
}

template <int kLanes, typename T>
__global__ void start_categorical_kernel(PolicyHead<T> head, const T* bias, T* log_prob) {
    const std::int64_t t = lane_row<kLanes>();
    if (t >= head.num_steps) return;
    const int lane = threadIdx.x % kLanes;
    const std::int64_t taken = head.indices[t];
    T* const z = head.output + t * head.outputs;
    T* const p = head.probabilities + t * head.outputs;
    T* const gradient = head.gradient + t * head.outputs;
    T largest = -math::Format<T>::kInfinity;
    for (std::int64_t j = lane; j < head.outputs; j += kLanes) {
        z[j] += bias[j];
        largest = math::maximum(largest, z[j]);
    }
    largest = lane_maximum<kLanes>(largest);
    T total(0), chosen(0);
    for (std::int64_t j = lane; j < head.outputs; j += kLanes) {
        total += p[j] = math::exp(z[j] - largest);
        if (j == taken) chosen = z[j] - largest;
    }
    total = lane_sum<kLanes>(total);
    chosen = lane_sum<kLanes>(chosen);
    for (std::int64_t j = lane; j < head.outputs; j += kLanes) {
        p[j] /= total;
        gradient[j] = (j == taken ? T(1) : T(0)) - p[j];
    }
    if (lane == 0) log_prob[t] = chosen - math::log(total);
}

template <typename T>
__global__ void curve_categorical_kernel(std::int64_t num_steps, const T* hessian, const T* fisher,
                                         T* weights) {
    const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (t >= num_steps) return;
    weights[t] = (fisher == nullptr ? T(0) : fisher[t]) - (hessian == nullptr ? T(0) : hessian[t]);
}

template <typename T>
__global__ void curve_gaussian_kernel(PolicyHead<T> head, const T* hessian, const T* fisher,
                                      HeadCurvature<T> curvature, Partials<T> squares) {
    const std::int64_t j = tile_column();
    const bool of_state = head.kind == Head::kGaussianState, global = head.kind == Head::kGaussianGlobal;
    T total(0);
    if (j < head.action_dim) {
        for_tile_rows(head.num_steps, [&](std::int64_t t) {
            const T h = hessian == nullptr ? T(0) : hessian[t], f = fisher == nullptr ? T(0) : fisher[t];
            const std::int64_t at = t * head.outputs + j;
            const auto log_std = of_state ? math::state_log_std(head.output[at + head.action_dim])
                                          : math::StateLogStd<T>{head.log_std[j], T(1), T(0)};
            const auto term = math::gaussian_term(head.raw_actions()[t * head.action_dim + j],
                                                  head.output[at], log_std.value);
            const T slope = log_std.slope;
            curvature.diagonal[at] = h * term.by_mean_mean + f * term.fisher_mean;
            const T square = h * (term.by_log_std_log_std * slope * slope + term.by_log_std * log_std.bend) +
                             f * T(2) * slope * slope;
            if (of_state) {
                curvature.diagonal[at + head.action_dim] = square;
                curvature.cross[at] = curvature.cross[at + head.action_dim] =
                    h * term.by_mean_log_std * slope;
            } else if (global) {
                curvature.cross[at] = h * term.by_mean_log_std;
                total += square;
            }
        });
    }
    total = tile_sum(total);
    if (global && threadIdx.y == 0 && j < head.action_dim) {
        squares.data[blockIdx.x * squares.stride + j] = total;
    }
}

template <int kLanes, typename T>
__global__ void along_kernel(PolicyHead<T> head, OutputTangent<T> tangent, T* along, T* means) {
    const std::int64_t t = lane_row<kLanes>();
    if (t >= head.num_steps) return;
    const int lane = threadIdx.x % kLanes;
    T product(0), mean(0);
    for (std::int64_t j = lane; j < head.outputs; j += kLanes) {
        const std::int64_t at = t * head.outputs + j;
        const T value = tangent.products[at] + tangent.bias[j];
        if (along != nullptr) {
            product += head.gradient[at] * value;
            if (head.log_std_gradient != nullptr) product += head.log_std_gradient[at] * tangent.log_std[j];
        }
        if (means != nullptr) mean += head.probabilities[at] * value;
    }
    product = lane_sum<kLanes>(product);
    mean = lane_sum<kLanes>(mean);
    if (lane > 0) return;
    if (along != nullptr) along[t] = product;
    if (means != nullptr) means[t] = mean;
}

template <typename T>
__global__ void cotangent_kernel(PolicyHead<T> head, bool curved, HeadCurvature<T> curvature,
                                 OutputTangent<T> tangent, const T* means, const T* steps, Matrix<T> out,
                                 Partials<T> sums, Partials<T> log_std_sums) {
    const std::int64_t j = tile_column();
    const bool global = head.kind == Head::kGaussianGlobal;
    T total(0), log_std_total(0);
    if (j < head.outputs) {
        const std::int64_t pair = pair_of(head, j);
        for_tile_rows(head.num_steps, [&](std::int64_t t) {
            const std::int64_t first = t * head.outputs;
            OutputCotangent<T> to{T(0), T(0)};
            if (curved) {
                const T here = tangent.products[first + j] + tangent.bias[j];
                const T there = tangent.products[first + pair] + tangent.bias[pair];
                to = curved_cotangent(head, curvature, t, j, here, there, means == nullptr ? T(0) : means[t],
                                      global ? tangent.log_std[j] : T(0));
            }
            if (steps != nullptr) {
                to.value += steps[t] * head.gradient[first + j];
                if (global) to.log_std += steps[t] * head.log_std_gradient[first + j];
            }
            out.data[t * out.stride + j] = to.value;
            total += to.value;
            log_std_total += to.log_std;
        });
    }
    if (sums.data == nullptr) return;  // for all threads alike
    total = tile_sum(total);
    log_std_total = tile_sum(log_std_total);
    if (threadIdx.y > 0 || j >= head.outputs) return;
    sums.data[blockIdx.x * sums.stride + j] = total;
    if (global) log_std_sums.data[blockIdx.x * log_std_sums.stride + j] = log_std_total;
}

// Calls function(kernel's number of lanes, grid).
template <typename Function>
void by_lanes(std::int64_t num_steps, std::int64_t outputs, const Function& function) {
    const auto blocks = [&](std::int64_t lanes) {
        return dim3(static_cast<unsigned>((num_steps * lanes + kThreads - 1) / kThreads));
    };
    if (outputs < kWide) {
        function(std::integral_constant<int, 1>(), blocks(1));
    } else {
        function(std::integral_constant<int, kWarp>(), blocks(kWarp));
    }
}

}  // namespace

template <typename T>
void start_head(const PolicyHead<T>& head, const T* bias, T* log_prob, cudaStream_t stream) {
    by_lanes(head.num_steps, head.outputs, [&](auto lanes, dim3 grid) {
        launch(head.is(Head::kCategorical) ? start_categorical_kernel<lanes.value, T>
                                           : start_gaussian_kernel<lanes.value, T>,
               grid, dim3(kThreads), 0, stream, head, bias, log_prob);
    });
}

template <typename T>
void curve_head(const PolicyHead<T>& head, const T* hessian, const T* fisher,
                const HeadCurvature<T>& curvature, T* scratch, cudaStream_t stream) {
    if (head.is(Head::kCategorical)) {
        const auto blocks = static_cast<unsigned>((head.num_steps + kThreads - 1) / kThreads);
        launch(curve_categorical_kernel<T>, dim3(blocks), dim3(kThreads), 0, stream, head.num_steps, hessian,
               fisher, curvature.weights);
        return;
    }
    const std::int64_t blocks = row_blocks(head.num_steps);
    const Partials<T> squares{scratch, head.action_dim};
    launch(curve_gaussian_kernel<T>, tile_grid(blocks, head.action_dim), tile_block(), 0, stream, head,
           hessian, fisher, curvature, squares);
    if (head.is(Head::kGaussianGlobal)) {
        add_partials(blocks, head.action_dim, squares, Shift<T>{}, curvature.log_std_square, stream);
    }
}

template <typename T>
void head_along(const PolicyHead<T>& head, const OutputTangent<T>& tangent, T* along, T* means,
                cudaStream_t stream) {
    by_lanes(head.num_steps, head.outputs, [&](auto lanes, dim3 grid) {
        launch(along_kernel<lanes.value, T>, grid, dim3(kThreads), 0, stream, head, tangent, along, means);
    });
}

template <typename T>
void head_cotangent(const PolicyHead<T>& head, const HeadCurvature<T>* curvature,
                    const OutputTangent<T>& tangent, const T* means, const T* steps, Matrix<T> out,
                    Partials<T> sums, Partials<T> log_std_sums, cudaStream_t stream) {
    launch(cotangent_kernel<T>, tile_grid(row_blocks(head.num_steps), head.outputs), tile_block(), 0, stream,
           head, curvature != nullptr, curvature == nullptr ? HeadCurvature<T>{} : *curvature, tangent, means,
           steps, out, sums, log_std_sums);
}

#define PARL_INSTANTIATE(T)                                                                                 \
    template void start_head<T>(const PolicyHead<T>&, const T*, T*, cudaStream_t);                          \
    template void curve_head<T>(const PolicyHead<T>&, const T*, const T*, const HeadCurvature<T>&, T*,      \
                                cudaStream_t);                                                              \
    template void head_along<T>(const PolicyHead<T>&, const OutputTangent<T>&, T*, T*, cudaStream_t);       \
    template void head_cotangent<T>(const PolicyHead<T>&, const HeadCurvature<T>*, const OutputTangent<T>&, \
                                    const T*, const T*, Matrix<T>, Partials<T>, Partials<T>, cudaStream_t);
PARL_INSTANTIATE(float)
PARL_INSTANTIATE(double)
#undef PARL_INSTANTIATE

}  // namespace parl::cuda
