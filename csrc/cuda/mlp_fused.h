// A whole product with the curvature of a small network in two launches, where launches would take longer than
// the arithmetic: all layers' W and Ẇ lie in a block's shared memory, and tiles of rows go through them forwards
// and backwards. Each block adds up the parameters' gradient over its tiles; the second launch adds the blocks'.
//
// Of 24-64-64-12 units in single precision W and Ẇ take 52 KB and a tile of 64 rows 147 KB of an H200's 227 KB;
// 8000 steps are 125 tiles for its 132 multiprocessors. A step's 32 000 multiply-adds read some 450 numbers from
// memory, so arithmetic, fed from shared memory, is what takes the time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/mlp_layers.h"
#include "cuda/policy_head.h"

namespace parl::cuda {

inline constexpr int kMaxTileRows = 64;

// Where a block's matrices stand in its shared memory, in elements; by layer. Matrices of tiles have rows of
// padded(columns) elements.
struct FusedLayout {
    int rows = 0;  // of a tile, a multiple of 4; 0 where the network does not fit
    std::int64_t elements;
    std::int64_t blocks;              // each with a gradient of its own
    int weights[kMaxLayers];          // (padded(outputs), padded(inputs) + 1): W
    int weight_tangents[kMaxLayers];  // Ẇ
    int inputs[kMaxLayers];           // (rows, inputs): what the layer sees
    int input_tangents[kMaxLayers];
    int deltas[kMaxLayers];  // (rows, outputs): tangents of the cotangents
    int kept[kMaxLayers];    // (rows, outputs): the cotangents, of Hessian products
    int output_tangents;     // (rows, outputs of the last)
    int log_std;             // (rows, outputs of the last): of a free log_std
};

// Four elements at a time are read.
PARL_INLINE int padded(std::int64_t columns) { return static_cast<int>((columns + 3) / 4 * 4); }

// For the current device.
template <typename T>
FusedLayout fused_layout(const Network& network, std::int64_t num_steps, bool has_hessian);

// Passed to the kernel by value; device memory.
template <typename T>
struct FusedProduct {
    Network network;
    FusedLayout layout;
    PolicyHead<T> head;
    bool curved;
    HeadCurvature<T> curvature;
    const T* params;        // (P,)
    const T* observations;  // (steps, inputs)
    HiddenLayer<T> hidden[kMaxLayers];
    // Of Hessian products, else null: the cotangents of each layer's output, and what the activations' second
    // derivatives make of them (steps, width).
    Matrix<const T> kept[kMaxLayers];
    const T* bends[kMaxLayers];
};

// out (P,) = the curvature times v (P,), plus the shift; along (steps,), unless null, gets J v. partials
// (layout.blocks, P).
template <typename T>
void fused_product(const FusedProduct<T>& product, const T* v, const Shift<T>& shift, T* along, T* partials,
                   T* out, cudaStream_t stream);

}  // namespace parl::cuda
