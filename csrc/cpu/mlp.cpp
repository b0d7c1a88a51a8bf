#include "cpu/mlp.h"

namespace parl::cpu::PARL_ISA {
namespace {

template <typename T>
PARL_INLINE std::int64_t panels(std::int64_t columns) {
    return (columns + kPanelColumns<T> - 1) / kPanelColumns<T>;
}

// The weight gradient is summed as (outputs, inputs) or transposed, whichever has the longer rows: a kernel's
// columns are many, its rows are few.
template <typename T>
PARL_INLINE bool is_transposed(const Layer<T>& layer) {
    return layer.outputs > layer.inputs;
}

template <typename T>
void add_bias(std::int64_t rows, std::int64_t columns, const T* bias, T* out) {
    using V = Vec<T>;
    const std::int64_t stride = row_stride<T>(columns);
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < columns; j += V::kWidth) {
            (V::load(out + i * stride + j) + V::load(bias + j)).store(out + i * stride + j);
        }
    }
}

// Bias and activation in one pass, in place.
template <typename A, typename T>
void activate(A, std::int64_t rows, std::int64_t columns, const T* bias, T* out, T* slopes) {
    using V = Vec<T>;
    const std::int64_t stride = row_stride<T>(columns);
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < columns; j += V::kWidth) {
            const std::int64_t at = i * stride + j;
            const V x = V::load(out + at) + V::load(bias + j);
            A::value(x).store(out + at);
            if constexpr (!A::kFromValue) A::slope(x).store(slopes + at);
        }
    }
}

template <typename A, typename T>
void scale_by_slope(A, std::int64_t rows, std::int64_t columns, const T* hidden, const T* slopes, T* delta) {
    using V = Vec<T>;
    const std::int64_t stride = row_stride<T>(columns);
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < columns; j += V::kWidth) {
            const std::int64_t at = i * stride + j;
            V slope;
            if constexpr (A::kFromValue) {
                slope = A::slope_from_value(V::load(hidden + at));
            } else {
                slope = V::load(slopes + at);
            }
            (V::load(delta + at) * slope).store(delta + at);
        }
    }
}

}  // namespace

template <typename T>
std::int64_t layer_size(std::int64_t inputs, std::int64_t outputs) {
    return packed_size<T>(inputs, outputs) + packed_size<T>(outputs, inputs) + row_stride<T>(outputs);
}

template <typename T>
Layer<T> layer_at(T* memory, std::int64_t inputs, std::int64_t outputs) {
    T* const backward = memory + packed_size<T>(inputs, outputs);
    return {inputs, outputs, memory, backward, backward + packed_size<T>(outputs, inputs)};
}

template <typename T>
void pack_layer(const Layer<T>& layer, const T* weight, const T* bias, WeightLayout layout,
                bool with_backward, int part, int parts) {
    const bool out_in = layout == WeightLayout::kOutIn;
    const std::int64_t stride = out_in ? layer.inputs : layer.outputs;
    const std::int64_t forward = panels<T>(layer.outputs), backward = panels<T>(layer.inputs);
    pack(weight, stride, out_in, layer.inputs, layer.outputs, part * forward / parts,
         (part + 1) * forward / parts, layer.forward);
    if (with_backward) {
        pack(weight, stride, !out_in, layer.outputs, layer.inputs, part * backward / parts,
             (part + 1) * backward / parts, layer.backward);
    }
    if (part > 0) return;
    for (std::int64_t j = 0; j < row_stride<T>(layer.outputs); ++j) {
        layer.bias[j] = bias != nullptr && j < layer.outputs ? bias[j] : T(0);
    }
}

template <typename T>
std::int64_t gradient_size(std::int64_t inputs, std::int64_t outputs) {
    return outputs > inputs ? (inputs + 1) * row_stride<T>(outputs)
                            : outputs * row_stride<T>(inputs) + row_stride<T>(outputs);
}

template <typename T>
void gather_gradient(const Layer<T>& layer, const T* const* gradients, int count, WeightLayout layout,
                     T* weight, T* bias, int part, int parts) {
    const bool transposed = is_transposed(layer);
    const std::int64_t rows = transposed ? layer.inputs : layer.outputs;
    const std::int64_t columns = transposed ? layer.outputs : layer.inputs;
    const std::int64_t stride = row_stride<T>(columns);
    const bool as_is = transposed == (layout == WeightLayout::kInOut);
    // By blocks of rows, so that a transposing write fills whole cache lines.
    constexpr std::int64_t kBlock = 64 / static_cast<std::int64_t>(sizeof(T));
    const std::int64_t blocks = (rows + kBlock - 1) / kBlock;
    for (std::int64_t block = part * blocks / parts; block < (part + 1) * blocks / parts; ++block) {
        const std::int64_t first = block * kBlock, last = first + kBlock < rows ? first + kBlock : rows;
        if (as_is) {
            for (std::int64_t i = first; i < last; ++i) {
                T* const to = weight + i * columns;
                for (std::int64_t j = 0; j < columns; ++j) {
                    T sum = gradients[0][i * stride + j];
                    for (int p = 1; p < count; ++p) sum += gradients[p][i * stride + j];
                    to[j] = sum;
                }
            }
            continue;
        }
        for (std::int64_t j = 0; j < columns; ++j) {
            for (std::int64_t i = first; i < last; ++i) {
                T sum = gradients[0][i * stride + j];
                for (int p = 1; p < count; ++p) sum += gradients[p][i * stride + j];
                weight[j * rows + i] = sum;
            }
        }
    }
    if (part > 0 || bias == nullptr) return;
    for (std::int64_t j = 0; j < layer.outputs; ++j) {
        bias[j] = gradients[0][rows * stride + j];
        for (int p = 1; p < count; ++p) bias[j] += gradients[p][rows * stride + j];
    }
}

template <typename T>
void sum_rows(std::int64_t rows, std::int64_t columns, const T* matrix, T* total, bool accumulate) {
    using V = Vec<T>;
    const std::int64_t stride = row_stride<T>(columns);
    for (std::int64_t j = 0; j < columns; j += V::kWidth) {
        V sums[4] = {accumulate ? V::load(total + j) : V(T(0)), V(T(0)), V(T(0)), V(T(0))};
        std::int64_t i = 0;
        for (; i + 4 <= rows; i += 4) {
            for (int k = 0; k < 4; ++k) sums[k] += V::load(matrix + (i + k) * stride + j);
        }
        for (; i < rows; ++i) sums[0] += V::load(matrix + i * stride + j);
        ((sums[0] + sums[1]) + (sums[2] + sums[3])).store(total + j);
    }
}

template <typename T>
void layer_gradient(const Layer<T>& layer, std::int64_t rows, const T* delta_1, const T* input_1,
                    const T* delta_2, const T* input_2, T* gradient, bool accumulate) {
    const std::int64_t out_stride = row_stride<T>(layer.outputs), in_stride = row_stride<T>(layer.inputs);
    const int count = delta_2 == nullptr ? 1 : 2;
    if (is_transposed(layer)) {
        const Product<T> products[2] = {{input_1, in_stride, delta_1, out_stride, rows},
                                        {input_2, in_stride, delta_2, out_stride, rows}};
        multiply_transposed(layer.inputs, layer.outputs, products, count, gradient, out_stride, accumulate);
        gradient += layer.inputs * out_stride;
    } else {
        const Product<T> products[2] = {{delta_1, out_stride, input_1, in_stride, rows},
                                        {delta_2, out_stride, input_2, in_stride, rows}};
        multiply_transposed(layer.outputs, layer.inputs, products, count, gradient, in_stride, accumulate);
        gradient += layer.outputs * in_stride;
    }
    sum_rows(rows, layer.outputs, delta_1, gradient, accumulate);
}

bool needs_slopes(Activation activation) {
    bool needed = false;
    math::with_activation(activation, [&](auto a) { needed = !decltype(a)::kFromValue; });
    return needed;
}

template <typename T>
void mlp_forward(const Layer<T>* layers, int num_layers, Activation activation, std::int64_t rows, const T* x,
                 T* const* hidden, T* const* slopes, T* out) {
    const T* from = x;
    for (int l = 0; l < num_layers; ++l) {
        const Layer<T>& layer = layers[l];
        const bool is_last = l == num_layers - 1;
        T* const to = is_last ? out : hidden[l];
        const Product<T> product{from, row_stride<T>(layer.inputs), layer.forward, 0, layer.inputs};
        multiply_packed(rows, layer.outputs, &product, 1, to, row_stride<T>(layer.outputs), false);
        if (is_last) {
            add_bias(rows, layer.outputs, layer.bias, to);
        } else {
            math::with_activation(activation, [&](auto a) {
                activate(a, rows, layer.outputs, layer.bias, to, slopes == nullptr ? nullptr : slopes[l]);
            });
        }
        from = to;
    }
}

template <typename T>
void mlp_backward(const Layer<T>* layers, int num_layers, Activation activation, std::int64_t rows,
                  const T* x, const T* const* hidden, const T* const* slopes, T* const* deltas,
                  T* const* gradients, bool accumulate, T* input_gradient) {
    for (int l = num_layers - 1; l >= 0; --l) {
        const Layer<T>& layer = layers[l];
        const T* const input = l == 0 ? x : hidden[l - 1];
        if (gradients != nullptr) {
            layer_gradient<T>(layer, rows, deltas[l], input, nullptr, nullptr, gradients[l], accumulate);
        }
        T* const to = l == 0 ? input_gradient : deltas[l - 1];
        if (to == nullptr) continue;
        const Product<T> product{deltas[l], row_stride<T>(layer.outputs), layer.backward, 0, layer.outputs};
        multiply_packed(rows, layer.inputs, &product, 1, to, row_stride<T>(layer.inputs), false);
        if (l == 0) continue;
        math::with_activation(activation, [&](auto a) {
            scale_by_slope(a, rows, layer.inputs, input, slopes == nullptr ? nullptr : slopes[l - 1], to);
        });
    }
}

#define PARL_INSTANTIATE(T)                                                                                  \
    template std::int64_t layer_size<T>(std::int64_t, std::int64_t);                                         \
    template Layer<T> layer_at<T>(T*, std::int64_t, std::int64_t);                                           \
    template void pack_layer<T>(const Layer<T>&, const T*, const T*, WeightLayout, bool, int, int);          \
    template std::int64_t gradient_size<T>(std::int64_t, std::int64_t);                                      \
    template void gather_gradient<T>(const Layer<T>&, const T* const*, int, WeightLayout, T*, T*, int, int); \
    template void layer_gradient<T>(const Layer<T>&, std::int64_t, const T*, const T*, const T*, const T*,   \
                                    T*, bool);                                                               \
    template void sum_rows<T>(std::int64_t, std::int64_t, const T*, T*, bool);                               \
    template void mlp_forward<T>(const Layer<T>*, int, Activation, std::int64_t, const T*, T* const*,        \
                                 T* const*, T*);                                                             \
    template void mlp_backward<T>(const Layer<T>*, int, Activation, std::int64_t, const T*, const T* const*, \
                                  const T* const*, T* const*, T* const*, bool, T*);
PARL_INSTANTIATE(float)
PARL_INSTANTIATE(double)
#undef PARL_INSTANTIATE

}  // namespace parl::cpu::PARL_ISA
