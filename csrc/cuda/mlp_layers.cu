#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/mlp_layers.h"
#include "cuda/row_tiles.cuh"

namespace parl::cuda {
namespace {

using math::Activation;

constexpr std::int64_t kThreads = 256;

unsigned blocks_of(std::int64_t size) { return static_cast<unsigned>((size + kThreads - 1) / kThreads); }

template <typename A, typename T>
__device__ __forceinline__ T slope_at(const HiddenLayer<T>& layer, std::int64_t row, std::int64_t column) {
    if constexpr (A::kFromValue) {
        return A::slope_from_value(layer.values[row * 2 * layer.width + column]);
    } else {
        return layer.slopes[row * layer.width + column];
    }
}

template <typename A, typename T>
__global__ void activate_kernel(std::int64_t rows, HiddenLayer<T> layer, const T* bias) {
    const std::int64_t column = tile_column();
    if (column >= layer.width) return;
    const T shift = bias[column];
    for_tile_rows(rows, [&](std::int64_t row) {
        T& value = layer.values[row * 2 * layer.width + column];
        const T x = value + shift;
        value = A::value(x);
        if constexpr (!A::kFromValue) {
            layer.slopes[row * layer.width + column] = A::slope(x);
            layer.bends[row * layer.width + column] = A::bend(x);
        }
    });
}

template <typename A, bool kBend, typename T>
__global__ void tangent_kernel(std::int64_t rows, HiddenLayer<T> layer, const T* bias, const T* bends,
                               Matrix<T> bent) {
    const std::int64_t column = tile_column();
    if (column >= layer.width) return;
    const T shift = bias[column];
    for_tile_rows(rows, [&](std::int64_t row) {
        T& tangent = layer.values[(row * 2 + 1) * layer.width + column];
        const T z = tangent + shift;
        if constexpr (kBend) bent.data[row * bent.stride + column] = bends[row * layer.width + column] * z;
        tangent = slope_at<A>(layer, row, column) * z;
    });
}

template <typename A, bool kAdd, typename T>
__global__ void backward_kernel(std::int64_t rows, HiddenLayer<T> layer, const T* products, Matrix<T> delta,
                                Partials<T> sums) {
    const std::int64_t column = tile_column();
    T total(0);
    if (column < layer.width) {
        for_tile_rows(rows, [&](std::int64_t row) {
            T& to = delta.data[row * delta.stride + column];
            T value = slope_at<A>(layer, row, column) * products[row * layer.width + column];
            if constexpr (kAdd) value += to;
            to = value;
            total += value;
        });
    }
    total = tile_sum(total);
    if (threadIdx.y == 0 && column < layer.width) sums.data[blockIdx.x * sums.stride + column] = total;
}

template <typename A, typename T>
__global__ void bend_kernel(std::int64_t rows, HiddenLayer<T> layer, const T* products, Matrix<T> delta,
                            T* bends) {
    const std::int64_t column = tile_column();
    if (column >= layer.width) return;
    for_tile_rows(rows, [&](std::int64_t row) {
        const std::int64_t at = row * layer.width + column;
        const T g = products[at];
        if constexpr (A::kFromValue) {
            const T value = layer.values[row * 2 * layer.width + column];
            const T scaled = A::slope_from_value(value) * g;
            bends[at] = A::ratio_from_value(value) * scaled;
            delta.data[row * delta.stride + column] = scaled;
        } else {
            bends[at] = layer.bends[at] * g;
            delta.data[row * delta.stride + column] = layer.slopes[at] * g;
        }
    });
}

template <typename T>
__global__ void pack_kernel(Network network, const T* params, bool tangents, bool with_backward,
                            PackedWeights<T> packed, T scale, T* scaled) {
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= network.num_params) return;
    const T value = params[i];
    if (scaled != nullptr) scaled[i] = scale * value;
    int l = network.num_layers - 1;
    while (l > 0 && i < network.layers[l].weight) --l;
    const LayerShape& layer = network.layers[l];
    if (l == 0 || i >= layer.bias()) return;
    const std::int64_t at = i - layer.weight, row = at / layer.inputs, column = at % layer.inputs;
    packed.forward[l][(2 * row + (tangents ? 0 : 1)) * layer.inputs + column] = value;
    if (with_backward) packed.backward[l][(tangents ? layer.inputs * layer.outputs : 0) + at] = value;
}

// For the first warp, the sum of a column of the blocks' sums; all threads call it.
template <typename T>
__device__ __forceinline__ T total_of(std::int64_t blocks, std::int64_t columns, Partials<const T> sums,
                                      std::int64_t column) {
    T total(0);
    if (column < columns) {
        for (std::int64_t block = threadIdx.y; block < blocks; block += kTileWarps) {
            total += sums.data[block * sums.stride + column];
        }
    }
    return tile_sum(total);
}

template <typename T>
__global__ void add_partials_kernel(std::int64_t blocks, std::int64_t columns, Partials<T> sums,
                                    Shift<T> shift, T* out) {
    const std::int64_t column = tile_column();
    const T total = total_of<T>(blocks, columns, {sums.data, sums.stride}, column);
    if (threadIdx.y == 0 && column < columns) out[column] = total + shift.at(column);
}

template <typename T>
__global__ void finish_kernel(Network network, std::int64_t blocks, const T* sums, Shift<T> shift, T* out) {
    const std::int64_t column = tile_column();
    const Partials<const T> partials{sums, network.num_columns};
    const T total = total_of<T>(blocks, network.num_columns, partials, column);
    if (threadIdx.y > 0 || column >= network.num_columns) return;
    const std::int64_t free = column - (network.num_columns - network.free_log_std);
    int l = network.num_layers - 1;
    while (l > 0 && column < network.layers[l].column) --l;
    const std::int64_t at = free >= 0 ? free : network.layers[l].bias() + column - network.layers[l].column;
    out[at] = total + shift.at(at);
}

template <typename T>
__global__ void scale_kernel(std::int64_t size, const T* v, T scale, T* out) {
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < size) out[i] = v == nullptr ? T(0) : scale * v[i];
}

}  // namespace

Network network_of(const std::int64_t* widths, int num_layers, Activation activation,
                   std::int64_t free_log_std) {
    if (num_layers > kMaxLayers) {
        throw std::invalid_argument("a network must have at most " + std::to_string(kMaxLayers) +
                                    " layers, got " + std::to_string(num_layers));
    }
    Network network{};
    network.activation = activation;
    network.num_layers = num_layers;
    network.free_log_std = free_log_std;
    network.num_params = free_log_std;
    for (int l = 0; l < num_layers; ++l) {
        network.layers[l] = {widths[l], widths[l + 1], network.num_params, network.num_columns};
        network.num_params += (widths[l] + 1) * widths[l + 1];
        network.num_columns += widths[l + 1];
    }
    network.num_columns += free_log_std;
    return network;
}

bool keeps_slopes(Activation activation) {
    bool kept = false;
    math::with_activation(activation, [&](auto a) { kept = !decltype(a)::kFromValue; });
    return kept;
}

// Two blocks of 256 threads to each of an H200's 132 multiprocessors, times the tiles of 32 columns; fewer
// where a block would have less than 32 rows.
std::int64_t row_blocks(std::int64_t rows) { return std::min<std::int64_t>((rows + 31) / 32, 264); }

template <typename T>
void pack_weights(const Network& network, const T* params, bool tangents, bool with_backward,
                  const PackedWeights<T>& packed, T scale, T* scaled, cudaStream_t stream) {
    launch(pack_kernel<T>, dim3(blocks_of(network.num_params)), dim3(kThreads), 0, stream, network, params,
           tangents, with_backward, packed, scale, scaled);
}

template <typename T>
void activate(Activation activation, std::int64_t rows, const HiddenLayer<T>& layer, const T* bias,
              cudaStream_t stream) {
    math::with_activation(activation, [&](auto a) {
        launch(activate_kernel<decltype(a), T>, tile_grid(row_blocks(rows), layer.width), tile_block(), 0,
               stream, rows, layer, bias);
    });
}

template <typename T>
void tangent_layer(Activation activation, std::int64_t rows, const HiddenLayer<T>& layer, const T* bias,
                   const T* bends, Matrix<T> bent, cudaStream_t stream) {
    math::with_activation(activation, [&](auto a) {
        using A = decltype(a);
        launch(bends == nullptr ? tangent_kernel<A, false, T> : tangent_kernel<A, true, T>,
               tile_grid(row_blocks(rows), layer.width), tile_block(), 0, stream, rows, layer, bias, bends,
               bent);
    });
}

template <typename T>
void backward_layer(Activation activation, std::int64_t rows, const HiddenLayer<T>& layer, const T* products,
                    bool add, Matrix<T> delta, Partials<T> sums, cudaStream_t stream) {
    math::with_activation(activation, [&](auto a) {
        using A = decltype(a);
        launch(add ? backward_kernel<A, true, T> : backward_kernel<A, false, T>,
               tile_grid(row_blocks(rows), layer.width), tile_block(), 0, stream, rows, layer, products,
               delta, sums);
    });
}

template <typename T>
void bend_layer(Activation activation, std::int64_t rows, const HiddenLayer<T>& layer, const T* products,
                Matrix<T> delta, T* bends, cudaStream_t stream) {
    math::with_activation(activation, [&](auto a) {
        launch(bend_kernel<decltype(a), T>, tile_grid(row_blocks(rows), layer.width), tile_block(), 0, stream,
               rows, layer, products, delta, bends);
    });
}

template <typename T>
void add_partials(std::int64_t blocks, std::int64_t columns, Partials<T> sums, const Shift<T>& shift, T* out,
                  cudaStream_t stream) {
    launch(add_partials_kernel<T>, tile_grid(1, columns), tile_block(), 0, stream, blocks, columns, sums,
           shift, out);
}

template <typename T>
void finish_gradient(const Network& network, std::int64_t rows, const T* sums, const Shift<T>& shift, T* out,
                     cudaStream_t stream) {
    launch(finish_kernel<T>, tile_grid(1, network.num_columns), tile_block(), 0, stream, network,
           row_blocks(rows), sums, shift, out);
}

template <typename T>
void scale_vector(std::int64_t size, const T* v, T scale, T* out, cudaStream_t stream) {
    if (size == 0) return;
    launch(scale_kernel<T>, dim3(blocks_of(size)), dim3(kThreads), 0, stream, size, v, scale, out);
}

#define PARL_INSTANTIATE(T)                                                                               \
    template void pack_weights<T>(const Network&, const T*, bool, bool, const PackedWeights<T>&, T, T*,   \
                                  cudaStream_t);                                                          \
    template void activate<T>(Activation, std::int64_t, const HiddenLayer<T>&, const T*, cudaStream_t);   \
    template void tangent_layer<T>(Activation, std::int64_t, const HiddenLayer<T>&, const T*, const T*,   \
                                   Matrix<T>, cudaStream_t);                                              \
    template void backward_layer<T>(Activation, std::int64_t, const HiddenLayer<T>&, const T*, bool,      \
                                    Matrix<T>, Partials<T>, cudaStream_t);                                \
    template void bend_layer<T>(Activation, std::int64_t, const HiddenLayer<T>&, const T*, Matrix<T>, T*, \
                                cudaStream_t);                                                            \
    template void add_partials<T>(std::int64_t, std::int64_t, Partials<T>, const Shift<T>&, T*,           \
                                  cudaStream_t);                                                          \
    template void finish_gradient<T>(const Network&, std::int64_t, const T*, const Shift<T>&, T*,         \
                                     cudaStream_t);                                                       \
    template void scale_vector<T>(std::int64_t, const T*, T, T*, cudaStream_t);
PARL_INSTANTIATE(float)
PARL_INSTANTIATE(double)
#undef PARL_INSTANTIATE

}  // namespace parl::cuda
