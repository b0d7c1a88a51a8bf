#include "cpu/tangent_layers.h"

namespace parl::cpu::PARL_ISA {
namespace {

template <typename A, typename T>
PARL_INLINE Vec<T> slope_at(const Activated<T>& activated, std::int64_t i) {
    if constexpr (A::kFromValue) {
        return A::slope_from_value(Vec<T>::load(activated.hidden + i));
    } else {
        return Vec<T>::load(activated.slopes + i);
    }
}

// Calls function(first, rows) for parts of about kLayerRows rows.
template <typename Function>
PARL_INLINE void by_parts(std::int64_t rows, const Function& function) {
    const std::int64_t parts = (rows + kLayerRows - 1) / kLayerRows;
    for (std::int64_t i = 0; i < parts; ++i) {
        const std::int64_t first = rows * i / parts;
        function(first, rows * (i + 1) / parts - first);
    }
}

template <typename T>
PARL_INLINE void multiply_part(std::int64_t first, std::int64_t rows, std::int64_t columns,
                               const Product<T>* products, int count, T* out) {
    Product<T> part[2];
    for (int s = 0; s < count; ++s) {
        part[s] = products[s];
        part[s].left += first * part[s].left_stride;
    }
    multiply_packed(rows, columns, part, count, out, row_stride<T>(columns), false);
}

}  // namespace

template <typename T>
void forward_layer(std::int64_t rows, std::int64_t columns, const Product<T>* products, int count,
                   const T* bias, Activated<T> activated, const T* bend, T* tangent, T* bent) {
    using V = Vec<T>;
    const std::int64_t stride = row_stride<T>(columns);
    by_parts(rows, [&](std::int64_t first, std::int64_t part) {
        multiply_part(first, part, columns, products, count, tangent + first * stride);
        math::with_activation(activated.activation, [&](auto a) {
            using A = decltype(a);
            for (std::int64_t i = first * stride; i < (first + part) * stride; i += stride) {
                for (std::int64_t j = 0; j < columns; j += V::kWidth) {
                    const V z = V::load(tangent + i + j) + V::load(bias + j);
                    if (bend != nullptr) (V::load(bend + i + j) * z).store(bent + i + j);
                    (slope_at<A>(activated, i + j) * z).store(tangent + i + j);
                }
            }
        });
    });
}

template <typename T>
void backward_layer(std::int64_t rows, std::int64_t columns, const Product<T>* products, int count,
                    Activated<T> activated, bool add, T* delta, T* scratch) {
    using V = Vec<T>;
    const std::int64_t stride = row_stride<T>(columns);
    by_parts(rows, [&](std::int64_t first, std::int64_t part) {
        multiply_part(first, part, columns, products, count, scratch);
        math::with_activation(activated.activation, [&](auto a) {
            using A = decltype(a);
            for (std::int64_t i = 0; i < part; ++i) {
                const std::int64_t at = (first + i) * stride;
                for (std::int64_t j = 0; j < columns; j += V::kWidth) {
                    V value = slope_at<A>(activated, at + j) * V::load(scratch + i * stride + j);
                    if (add) value += V::load(delta + at + j);
                    value.store(delta + at + j);
                }
            }
        });
    });
}

template <typename T>
void output_layer(std::int64_t rows, std::int64_t columns, const Product<T>* products, int count,
                  const T* bias, T* out) {
    using V = Vec<T>;
    const std::int64_t stride = row_stride<T>(columns);
    multiply_packed(rows, columns, products, count, out, stride, false);
    for (std::int64_t i = 0; i < rows * stride; i += stride) {
        for (std::int64_t j = 0; j < columns; j += V::kWidth) {
            (V::load(out + i + j) + V::load(bias + j)).store(out + i + j);
        }
    }
}

template <typename T>
void activate(Activation activation, std::int64_t rows, std::int64_t columns, T* hidden, T* slopes,
              T* bends) {
    using V = Vec<T>;
    const std::int64_t stride = row_stride<T>(columns);
    math::with_activation(activation, [&](auto a) {
        using A = decltype(a);
        for (std::int64_t i = 0; i < rows * stride; i += stride) {
            for (std::int64_t j = i; j < i + columns; j += V::kWidth) {
                const V x = V::load(hidden + j);
                A::value(x).store(hidden + j);
                if constexpr (!A::kFromValue) {
                    A::slope(x).store(slopes + j);
                    A::bend(x).store(bends + j);
                }
            }
        }
    });
}

#define PARL_INSTANTIATE(T)                                                                                 \
    template void forward_layer<T>(std::int64_t, std::int64_t, const Product<T>*, int, const T*,            \
                                   Activated<T>, const T*, T*, T*);                                         \
    template void backward_layer<T>(std::int64_t, std::int64_t, const Product<T>*, int, Activated<T>, bool, \
                                    T*, T*);                                                                \
    template void output_layer<T>(std::int64_t, std::int64_t, const Product<T>*, int, const T*, T*);        \
    template void activate<T>(Activation, std::int64_t, std::int64_t, T*, T*, T*);
PARL_INSTANTIATE(float)
PARL_INSTANTIATE(double)
#undef PARL_INSTANTIATE

}  // namespace parl::cpu::PARL_ISA
