// What lies between two matrix products of a multi-layer perceptron's passes, one launch each, and the layout
// of parameters and activations.
//
// Activations and tangents stand side by side: [a | ȧ] is one matrix (steps, 2·width), so that AḂ + ȦB is one
// matrix product with twice the inner dimension,
//     ż = [a | ȧ] · [Ẇ | W]ᵀ,   ġ = [δ̇ | δ] · [W ; Ẇ],   and the weight's gradient δ̇ᵀa + δᵀȧ,
// where the same two matrices are read as (2·steps, width), whose rows take turns. Column sums of δ̇, the
// biases' gradients, come with the launch that makes it: each block of rows leaves a sum of its own, which the
// last launch adds up in order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/blas.h"
#include "math/activations.h"

namespace parl::cuda {

inline constexpr int kMaxLayers = 16;

struct LayerShape {
    std::int64_t inputs, outputs;
    std::int64_t
        weight;  // where its weight (outputs, inputs) stands in (P,), followed by its bias (outputs,)
    std::int64_t column;  // where its biases' sums stand among those of all layers

    PARL_INLINE std::int64_t bias() const { return weight + inputs * outputs; }
};

// Passed to kernels by value.
struct Network {
    math::Activation activation;
    int num_layers;
    std::int64_t free_log_std;  // numbers in front of the first weight
    std::int64_t num_params;
    std::int64_t num_columns;  // of all layers' outputs, and then the free log_std
    LayerShape layers[kMaxLayers];

    const LayerShape& last() const { return layers[num_layers - 1]; }
};

// From widths (num_layers + 1,). Throws std::invalid_argument on more than kMaxLayers.
Network network_of(const std::int64_t* widths, int num_layers, math::Activation activation,
                   std::int64_t free_log_std);

// Whether φ′ and φ″ must be kept beside φ.
bool keeps_slopes(math::Activation activation);

// What is kept of a hidden layer, of all steps.
template <typename T>
struct HiddenLayer {
    std::int64_t width;
    T* values;  // (steps, 2·width): activations, and beside them their tangents
    // (steps, width): φ′ and φ″, null where they follow from φ.
    T* slopes;
    T* bends;

    PARL_INLINE Matrix<T> activations() const { return {values, 2 * width}; }
    PARL_INLINE Matrix<T> tangents() const { return {values + width, 2 * width}; }
};

// By layer from the second on, where a product of tangents and values reads [Ẇ | W] and [W ; Ẇ].
template <typename T>
struct PackedWeights {
    T* forward[kMaxLayers];   // (outputs, 2·inputs)
    T* backward[kMaxLayers];  // (2·outputs, inputs)
};

// The parts of (P,) weights into the places of W, or of Ẇ, of both packings, or of `forward` alone. Unless
// `scaled` is null it becomes scale·params.
template <typename T>
void pack_weights(const Network& network, const T* params, bool tangents, bool with_backward,
                  const PackedWeights<T>& packed, T scale, T* scaled, cudaStream_t stream);

// Blocks that rows are shared out to, each with a sum of its own.
std::int64_t row_blocks(std::int64_t rows);

// Where such sums stand: (row_blocks(rows), stride), those of a matrix from `data` on; null for none.
template <typename T>
using Partials = Matrix<T>;

// layer.activations(), which hold x·Wᵀ, become φ(x·Wᵀ + bias); slopes and bends as they are kept.
template <typename T>
void activate(math::Activation activation, std::int64_t rows, const HiddenLayer<T>& layer, const T* bias,
              cudaStream_t stream);

// layer.tangents(), which hold products p, become φ′·(p + bias). Unless `bends` is null,
// bent = bends·(p + bias).
template <typename T>
void tangent_layer(math::Activation activation, std::int64_t rows, const HiddenLayer<T>& layer, const T* bias,
                   const T* bends, Matrix<T> bent, cudaStream_t stream);

// delta = φ′·products, or, if `add`, += that; its column sums. products (rows, width).
template <typename T>
void backward_layer(math::Activation activation, std::int64_t rows, const HiddenLayer<T>& layer,
                    const T* products, bool add, Matrix<T> delta, Partials<T> sums, cudaStream_t stream);

// delta = φ′·products and bends (rows, width) = φ″·products.
template <typename T>
void bend_layer(math::Activation activation, std::int64_t rows, const HiddenLayer<T>& layer,
                const T* products, Matrix<T> delta, T* bends, cudaStream_t stream);

// What is added to a gradient: scale·v, and squares·v (num_squares,) for its first numbers. v may be null where
// both vanish.
template <typename T>
struct Shift {
    const T* v;
    T scale;
    const T* squares;
    std::int64_t num_squares;

    PARL_INLINE T at(std::int64_t i) const {
        T shift(0);
        if (i < num_squares) shift += squares[i] * v[i];
        if (scale != T(0)) shift += scale * v[i];
        return shift;
    }
};

// out (columns,) = the sums of `blocks` blocks' column sums, plus the shift.
template <typename T>
void add_partials(std::int64_t blocks, std::int64_t columns, Partials<T> sums, const Shift<T>& shift, T* out,
                  cudaStream_t stream);

// The biases and the free log_std of out (P,) from the column sums of all layers, (row_blocks(rows),
// num_columns), plus the shift.
template <typename T>
void finish_gradient(const Network& network, std::int64_t rows, const T* sums, const Shift<T>& shift, T* out,
                     cudaStream_t stream);

// out = scale·v, or zero where v is null: what is left without steps.
template <typename T>
void scale_vector(std::int64_t size, const T* v, T scale, T* out, cudaStream_t stream);

}  // namespace parl::cuda
