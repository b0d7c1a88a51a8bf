#include "cuda/head_cotangent.cuh"
#include "cuda/launch.h"
#include "cuda/mlp_fused.h"

namespace parl::cuda {
namespace {

using math::Activation;
using math::Head;

// A warp computes 4 rows of 64 columns, a thread 4 × 2 elements: from shared memory that is one load of four
// numbers, the same for all lanes, and eight of one for 32 multiply-adds.
constexpr int kRows = 4, kColumns = 2;
constexpr int kLanesPerRow = kWarp / kRows;  // where a row's sums are taken
constexpr int kMaxThreads = kMaxTileRows / kRows * kWarp;

template <typename T>
struct alignas(16) Four {
    T values[4];
};

template <typename T>
__device__ __forceinline__ Four<T> load_four(const T* from) {
    return *reinterpret_cast<const Four<T>*>(from);
}

template <typename T>
__device__ __forceinline__ T lanes_sum(T value, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
    return value;
}

template <typename A, bool kHessian, typename T>
class Block {
  public:
    __device__ Block(const FusedProduct<T>& product, const T* v, T* partial)
        : product_(product),
          layout_(product.layout),
          network_(product.network),
          shared_(dynamic_shared<T>()),
          v_(v),
          partial_(partial),
          lane_(static_cast<int>(threadIdx.x) % kWarp),
          warp_(static_cast<int>(threadIdx.x) / kWarp),
          warps_(static_cast<int>(blockDim.x) / kWarp) {}

    __device__ void load_weights() const {
        // Padding is read, by products with zeros.
        for (std::int64_t i = threadIdx.x; i < layout_.elements; i += blockDim.x) shared_[i] = T(0);
        __syncthreads();
        for (int l = 0; l < network_.num_layers; ++l) {
            const LayerShape& layer = network_.layers[l];
            for (int row = warp_; row < layer.outputs; row += warps_) {
                const int to = row * weight_stride(layer);
                const std::int64_t from = layer.weight + row * layer.inputs;
                for (int i = lane_; i < layer.inputs; i += kWarp) {
                    shared_[layout_.weights[l] + to + i] = product_.params[from + i];
                    shared_[layout_.weight_tangents[l] + to + i] = v_[from + i];
                }
            }
        }
    }

    // Steps first … first + layout.rows − 1, as far as there are any.
    __device__ void pass(std::int64_t first, bool accumulate, T* along) const {
        const int last = network_.num_layers - 1;
        __syncthreads();  // the tile before, or the weights
        load_tile(first);
        __syncthreads();
        for (int l = 0; l <= last; ++l) {
            forward(first, l);
            __syncthreads();
        }
        pass_head(first, along);
        __syncthreads();
        if (network_.free_log_std > 0) {
            add_columns(layout_.log_std, network_.free_log_std, partial_, accumulate);
        }
        for (int l = last; l >= 0; --l) {
            weight_gradient(l, accumulate);
            add_columns(layout_.deltas[l], network_.layers[l].outputs, partial_ + network_.layers[l].bias(),
                        accumulate);
            if (l == 0) break;
            backward(first, l);
            __syncthreads();
        }
    }

  private:
    __device__ static int weight_stride(const LayerShape& layer) { return padded(layer.inputs) + 1; }

    // Zeros where there is no step.
    __device__ void load(Matrix<const T> from, std::int64_t first, std::int64_t columns, int to) const {
        for (int row = warp_; row < layout_.rows; row += warps_) {
            const std::int64_t t = first + row;
            for (int j = lane_; j < columns; j += kWarp) {
                shared_[to + row * padded(columns) + j] =
                    t < product_.head.num_steps ? from.data[t * from.stride + j] : T(0);
            }
        }
    }

    __device__ void load_tile(std::int64_t first) const {
        load({product_.observations, network_.layers[0].inputs}, first, network_.layers[0].inputs,
             layout_.inputs[0]);
        for (int l = 0; l < network_.num_layers; ++l) {
            const LayerShape& layer = network_.layers[l];
            if (l > 0) {
                const Matrix<T> a = product_.hidden[l - 1].activations();
                load({a.data, a.stride}, first, layer.inputs, layout_.inputs[l]);
            }
            if constexpr (kHessian) load(product_.kept[l], first, layer.outputs, layout_.kept[l]);
        }
    }

    // sums += left · right for this warp's rows of a tile and two columns. right is (inner, columns), or, if
    // kTransposed, (columns, inner).
    template <bool kTransposed>
    __device__ static void multiply(const T* left, int left_stride, const T* right, int right_stride,
                                    int inner, const int (&columns)[kColumns], T (&sums)[kRows][kColumns]) {
        for (int k = 0; k < inner; k += 4) {
            Four<T> lefts[kRows];
#pragma unroll
            for (int i = 0; i < kRows; ++i) lefts[i] = load_four(left + i * left_stride + k);
#pragma unroll
            for (int q = 0; q < 4; ++q) {
#pragma unroll
                for (int j = 0; j < kColumns; ++j) {
                    const T factor = right[kTransposed ? columns[j] * right_stride + k + q
                                                       : (k + q) * right_stride + columns[j]];
#pragma unroll
                    for (int i = 0; i < kRows; ++i) sums[i][j] += lefts[i].values[q] * factor;
                }
            }
        }
    }

    // Calls function(column, number of the column) for this lane's columns, from `from` on, that there are.
    template <typename Function>
    __device__ static void for_columns(const int (&columns)[kColumns], int from, std::int64_t count, int lane,
                                       const Function& function) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            if (from + lane + j * kWarp < count) function(columns[j], j);
        }
    }

    // This lane's columns from `from` on; beyond the last one that one, which is read and not written.
    struct Columns {
        int at[kColumns];
    };
    __device__ Columns columns_from(int from, std::int64_t count) const {
        Columns columns;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            const int column = from + lane_ + j * kWarp, last = static_cast<int>(count) - 1;
            columns.at[j] = column < last ? column : last;
        }
        return columns;
    }

    // The tangents of layer l's output, of its activation where one follows.
    __device__ void forward(std::int64_t first, int l) const {
        const LayerShape& layer = network_.layers[l];
        const bool is_last = l == network_.num_layers - 1;
        const int inner = padded(layer.inputs), out_stride = padded(layer.outputs);
        const int row = warp_ * kRows;
        for (int from = 0; from < layer.outputs; from += kColumns * kWarp) {
            const Columns columns = columns_from(from, layer.outputs);
            T sums[kRows][kColumns] = {};
            multiply<true>(shared_ + layout_.inputs[l] + row * inner, inner,
                           shared_ + layout_.weight_tangents[l], weight_stride(layer), inner, columns.at,
                           sums);
            if (l > 0) {
                multiply<true>(shared_ + layout_.input_tangents[l] + row * inner, inner,
                               shared_ + layout_.weights[l], weight_stride(layer), inner, columns.at, sums);
            }
            for_columns(columns.at, from, layer.outputs, lane_, [&](int column, int j) {
                const T bias = v_[layer.bias() + column];
                for (int i = 0; i < kRows; ++i) {
                    const T z = sums[i][j] + bias;
                    const int at = (row + i) * out_stride + column;
                    if (is_last) {
                        shared_[layout_.output_tangents + at] = z;
                        continue;
                    }
                    const std::int64_t t = first + row + i;
                    if constexpr (kHessian) {
                        const bool is_step = t < product_.head.num_steps;
                        shared_[layout_.deltas[l] + at] =
                            is_step ? product_.bends[l][t * layer.outputs + column] * z : T(0);
                    }
                    shared_[layout_.input_tangents[l + 1] + at] = slope(l, row + i, t, column) * z;
                }
            });
        }
    }

    // φ′ of hidden layer l.
    __device__ T slope(int l, int row, std::int64_t t, int column) const {
        const HiddenLayer<T>& layer = product_.hidden[l];
        if constexpr (A::kFromValue) {
            return A::slope_from_value(shared_[layout_.inputs[l + 1] + row * padded(layer.width) + column]);
        } else {
            return t < product_.head.num_steps ? layer.slopes[t * layer.width + column] : T(0);
        }
    }

    // The output's cotangents; eight lanes to a row.
    __device__ void pass_head(std::int64_t first, T* along) const {
        const PolicyHead<T>& head = product_.head;
        const int row = static_cast<int>(threadIdx.x) / kLanesPerRow, lane = lane_ % kLanesPerRow;
        const int outputs = static_cast<int>(head.outputs), stride = padded(outputs);
        const std::int64_t t = first + row;
        const bool is_step = t < head.num_steps;
        const T* const tangent = shared_ + layout_.output_tangents + row * stride;
        T mean(0), product(0);
        for (int j = lane; is_step && j < outputs; j += kLanesPerRow) {
            const std::int64_t at = t * outputs + j;
            if (head.probabilities != nullptr) mean += head.probabilities[at] * tangent[j];
            if (along == nullptr) continue;
            product += head.gradient[at] * tangent[j];
            if (head.log_std_gradient != nullptr) product += head.log_std_gradient[at] * v_[j];
        }
        mean = lanes_sum(mean, kLanesPerRow);
        product = lanes_sum(product, kLanesPerRow);
        if (is_step && along != nullptr && lane == 0) along[t] = product;
        for (int j = lane; j < outputs; j += kLanesPerRow) {
            OutputCotangent<T> to{T(0), T(0)};
            if (is_step && product_.curved) {
                to = curved_cotangent(head, product_.curvature, t, j, tangent[j], tangent[pair_of(head, j)],
                                      mean, network_.free_log_std > 0 ? v_[j] : T(0));
            }
            shared_[layout_.deltas[network_.num_layers - 1] + row * stride + j] = to.value;
            if (network_.free_log_std > 0) shared_[layout_.log_std + row * stride + j] = to.log_std;
        }
    }

    __device__ void add(std::int64_t at, T value, bool accumulate) const {
        partial_[at] = accumulate ? partial_[at] + value : value;
    }

    // The gradient of layer l's weight over the tile: warps take four of its rows each.
    __device__ void weight_gradient(int l, bool accumulate) const {
        const LayerShape& layer = network_.layers[l];
        const int delta_stride = padded(layer.outputs), stride = padded(layer.inputs);
        for (int output = warp_ * kRows; output < layer.outputs; output += warps_ * kRows) {
            for (int from = 0; from < layer.inputs; from += kColumns * kWarp) {
                const Columns columns = columns_from(from, layer.inputs);
                T sums[kRows][kColumns] = {};
#pragma unroll 4
                for (int row = 0; row < layout_.rows; ++row) {
                    const int delta_at = row * delta_stride + output, at = row * stride;
                    const Four<T> delta = load_four(shared_ + layout_.deltas[l] + delta_at);
#pragma unroll
                    for (int j = 0; j < kColumns; ++j) {
                        const T input = shared_[layout_.inputs[l] + at + columns.at[j]];
#pragma unroll
                        for (int i = 0; i < kRows; ++i) sums[i][j] += delta.values[i] * input;
                    }
                    if (!kHessian || l == 0) continue;
                    const Four<T> kept = load_four(shared_ + layout_.kept[l] + delta_at);
#pragma unroll
                    for (int j = 0; j < kColumns; ++j) {
                        const T tangent = shared_[layout_.input_tangents[l] + at + columns.at[j]];
#pragma unroll
                        for (int i = 0; i < kRows; ++i) sums[i][j] += kept.values[i] * tangent;
                    }
                }
                for_columns(columns.at, from, layer.inputs, lane_, [&](int column, int j) {
                    for (int i = 0; i < kRows && output + i < layer.outputs; ++i) {
                        add(layer.weight + (output + i) * layer.inputs + column, sums[i][j], accumulate);
                    }
                });
            }
        }
    }

    // to (columns,) = or += the column sums of a tile's matrix: warps take a column each.
    __device__ void add_columns(int matrix, std::int64_t columns, T* to, bool accumulate) const {
        for (int column = warp_; column < columns; column += warps_) {
            T sum(0);
            for (int row = lane_; row < layout_.rows; row += kWarp) {
                sum += shared_[matrix + row * padded(columns) + column];
            }
            sum = lanes_sum(sum, kWarp);
            if (lane_ == 0) to[column] = accumulate ? to[column] + sum : sum;
        }
    }

    // The tangents of the cotangents of layer l − 1's output.
    __device__ void backward(std::int64_t first, int l) const {
        const LayerShape& layer = network_.layers[l];
        const int inner = padded(layer.outputs), out_stride = padded(layer.inputs), row = warp_ * kRows;
        for (int from = 0; from < layer.inputs; from += kColumns * kWarp) {
            const Columns columns = columns_from(from, layer.inputs);
            T sums[kRows][kColumns] = {};
            multiply<false>(shared_ + layout_.deltas[l] + row * inner, inner, shared_ + layout_.weights[l],
                            weight_stride(layer), inner, columns.at, sums);
            if constexpr (kHessian) {
                multiply<false>(shared_ + layout_.kept[l] + row * inner, inner,
                                shared_ + layout_.weight_tangents[l], weight_stride(layer), inner, columns.at,
                                sums);
            }
            for_columns(columns.at, from, layer.inputs, lane_, [&](int column, int j) {
                for (int i = 0; i < kRows; ++i) {
                    T& delta = shared_[layout_.deltas[l - 1] + (row + i) * out_stride + column];
                    const T value = slope(l - 1, row + i, first + row + i, column) * sums[i][j];
                    delta = kHessian ? delta + value : value;
                }
            });
        }
    }

    const FusedProduct<T>& product_;
    const FusedLayout& layout_;
    const Network& network_;
    T* const shared_;
    const T* const v_;
    T* const partial_;
    const int lane_, warp_, warps_;
};

template <typename A, bool kHessian, typename T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    fused_kernel(const __grid_constant__ FusedProduct<T> product, const T* v, T* along, T* partials) {
    const Block<A, kHessian, T> block(product, v, partials + blockIdx.x * product.network.num_params);
    const std::int64_t rows = product.layout.rows;
    const std::int64_t tiles = (product.head.num_steps + rows - 1) / rows;
    const std::int64_t begin = tiles * blockIdx.x / gridDim.x, end = tiles * (blockIdx.x + 1) / gridDim.x;
    block.load_weights();
    for (std::int64_t tile = begin; tile < end; ++tile) block.pass(tile * rows, tile > begin, along);
}

}  // namespace

template <typename T>
void fused_product(const FusedProduct<T>& product, const T* v, const Shift<T>& shift, T* along, T* partials,
                   T* out, cudaStream_t stream) {
    const std::int64_t blocks = product.layout.blocks;
    const bool has_hessian = product.bends[0] != nullptr || product.kept[0].data != nullptr;
    math::with_activation(product.network.activation, [&](auto a) {
        using A = decltype(a);
        launch(has_hessian ? fused_kernel<A, true, T> : fused_kernel<A, false, T>,
               dim3(static_cast<unsigned>(blocks)),
               dim3(static_cast<unsigned>(product.layout.rows / kRows * kWarp)),
               static_cast<std::size_t>(product.layout.elements) * sizeof(T), stream, product, v, along,
               partials);
    });
    const std::int64_t size = product.network.num_params;
    add_partials(blocks, size, Partials<T>{partials, size}, shift, out, stream);
}

#define PARL_INSTANTIATE(T)                                                                       \
    template void fused_product<T>(const FusedProduct<T>&, const T*, const Shift<T>&, T*, T*, T*, \
                                   cudaStream_t);
PARL_INSTANTIATE(float)
PARL_INSTANTIATE(double)
#undef PARL_INSTANTIATE

}  // namespace parl::cuda
