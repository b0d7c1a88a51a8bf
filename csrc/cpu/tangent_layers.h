// One layer's step of a forward or backward pass of tangents, for a block of rows, on one thread.
#pragma once

#include "cpu/mlp.h"

namespace parl::cpu::PARL_ISA {

// Rows taken at once: what a matrix product has written is worked on while it is in the first cache.
inline constexpr std::int64_t kLayerRows = 28;

// What is known of the layer's activations (rows, outputs).
template <typename T>
struct Activated {
    Activation activation;
    const T* hidden;
    const T* slopes;  // unless they follow from `hidden`
};

// tangent = φ'·(Σ_s products + bias). With `bend`, bent = bend·(Σ_s products + bias) as well. `columns` are
// the layer's outputs.
template <typename T>
void forward_layer(std::int64_t rows, std::int64_t columns, const Product<T>* products, int count,
                   const T* bias, Activated<T> activated, const T* bend, T* tangent, T* bent);

// delta = φ'·Σ_s products (+ delta, if `add`), `columns` being the outputs of the layer below.
// scratch: kLayerRows rows.
template <typename T>
void backward_layer(std::int64_t rows, std::int64_t columns, const Product<T>* products, int count,
                    Activated<T> activated, bool add, T* delta, T* scratch);

// out = Σ_s products + bias.
template <typename T>
void output_layer(std::int64_t rows, std::int64_t columns, const Product<T>* products, int count,
                  const T* bias, T* out);

// hidden = φ(hidden), in place; slopes = φ' and bends = φ'' unless they follow from φ.
template <typename T>
void activate(Activation activation, std::int64_t rows, std::int64_t columns, T* hidden, T* slopes, T* bends);

}  // namespace parl::cpu::PARL_ISA
