// Multi-layer perceptrons on blocks of rows, on one thread, for use inside another kernel's loop over rows.
//
// A network is an array of `Layer`s with an activation between them and none after the last. Several members,
// as of an ensemble, are several arrays. Nothing here allocates: the caller gives all memory, and decides
// what passes through the network at once; some 100 rows stay in the caches while they go through the layers.
//
//     // for each layer l, in a memory of layer_size<T>(inputs, outputs) elements:
//     layers[l] = layer_at(memory, inputs, outputs);
//     // whenever the parameters have changed:
//     pack_layer(layers[l], weight, bias, WeightLayout::kOutIn);
//     // for each block of rows:
//     mlp_forward(layers, 2, activation, rows, x, hidden, slopes, out);
//     mlp_backward(layers, 2, activation, rows, x, hidden, slopes, deltas, gradients, accumulate,
//                  input_gradient);
//     // at the end:
//     gather_gradient(layers[l], &gradients[l], 1, WeightLayout::kOutIn, weight_gradient, bias_gradient);
//
// Every matrix (rows, columns) has its rows row_stride<T>(columns) elements apart (gemm.h), also x, whose
// padding must be zero; what is computed has zeros there, or slopes and activations of zero. (Where an
// element of x is infinite or NaN, padding may become NaN; no column that is read depends on it.)
#pragma once

#include "cpu/gemm.h"
#include "math/activations.h"

namespace parl::cpu::PARL_ISA {

using math::Activation;

// How the parameters given and the gradients returned are laid out: as torch.nn.Linear's (outputs, inputs),
// or as those of batched layers, (inputs, outputs). Without padding.
enum class WeightLayout { kOutIn, kInOut };

template <typename T>
struct Layer {
    std::int64_t inputs;
    std::int64_t outputs;
    T* forward;   // packed (inputs, outputs)
    T* backward;  // packed (outputs, inputs)
    T* bias;      // (row_stride(outputs),)
};

// Elements of memory that a layer takes.
template <typename T>
std::int64_t layer_size(std::int64_t inputs, std::int64_t outputs);

template <typename T>
Layer<T> layer_at(T* memory, std::int64_t inputs, std::int64_t outputs);

// Copies the parameters into the layer; a null bias is zero. With `parts` threads each does one `part`, to be
// followed by a barrier. Without `with_backward`, gradients of the layer's input cannot be taken.
template <typename T>
void pack_layer(const Layer<T>& layer, const T* weight, const T* bias, WeightLayout layout,
                bool with_backward = true, int part = 0, int parts = 1);

// Elements of memory for the sum of a layer's parameter gradients, which are kept in a form of their own.
template <typename T>
std::int64_t gradient_size(std::int64_t inputs, std::int64_t outputs);

// The sum of `count` such gradients, written as `layout` says; `bias` may be null. `part` and `parts` as in
// pack_layer.
template <typename T>
void gather_gradient(const Layer<T>& layer, const T* const* gradients, int count, WeightLayout layout,
                     T* weight, T* bias, int part = 0, int parts = 1);

// gradient = or += delta_1ᵀ · input_1 (+ delta_2ᵀ · input_2 unless null) for the weight, the column sums of
// delta_1 for the bias. delta (rows, outputs), input (rows, inputs).
template <typename T>
void layer_gradient(const Layer<T>& layer, std::int64_t rows, const T* delta_1, const T* input_1,
                    const T* delta_2, const T* input_2, T* gradient, bool accumulate);

// total (columns,), padded, = or += the sum of the rows of `matrix`.
template <typename T>
void sum_rows(std::int64_t rows, std::int64_t columns, const T* matrix, T* total, bool accumulate);

// x (rows, inputs of the first layer) -> out (rows, outputs of the last). hidden[l] (rows, outputs of l) gets
// what layer l hands on, for all l but the last. slopes[l], of the same shape, gets the activation's
// derivative, where needs_slopes(activation); otherwise slopes may be null.
template <typename T>
void mlp_forward(const Layer<T>* layers, int num_layers, Activation activation, std::int64_t rows, const T* x,
                 T* const* hidden, T* const* slopes, T* out);

// Whether the derivative of the activation must be kept beside its value.
bool needs_slopes(Activation activation);

// Backwards from deltas[num_layers − 1] (rows, outputs of the last), the gradient of the output. deltas[l]
// gets the gradient of layer l's output before the activation. gradients[l], unless `gradients` is null, gets
// or is added the gradient of layer l's parameters; input_gradient (rows, inputs of the first), unless null,
// that of x.
template <typename T>
void mlp_backward(const Layer<T>* layers, int num_layers, Activation activation, std::int64_t rows,
                  const T* x, const T* const* hidden, const T* const* slopes, T* const* deltas,
                  T* const* gradients, bool accumulate, T* input_gradient);

}  // namespace parl::cpu::PARL_ISA
