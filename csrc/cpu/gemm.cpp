// How this differs from a general matrix product, and why:
// 1. Left factors are not packed: a block's rows are few enough to be read where they lie.
// 2. Right factors of `multiply_packed` are packed by the caller, once for all the rows that meet them.
// 3. A sum of two products is one loop over both, so that it is written once.
// 4. There are kernels for every number of rows, and a block is cut evenly: 100 rows are 8 times 12 or 13,
//    not 7 times 14 and a remainder.
#include "cpu/gemm.h"

namespace parl::cpu::PARL_ISA {
namespace {

// Accumulators of kMaxRows × 2 vectors leave registers for two right vectors and a broadcast left element.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxRows = 14;
#else
constexpr int kMaxRows = 6;
#endif

template <int... kIndex>
struct Indices {};
template <int kCount, int... kIndex>
struct MakeIndices : MakeIndices<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex>
struct MakeIndices<0, kIndex...> {
    using type = Indices<kIndex...>;
};

// Row i of the left block is at base[i / 3] + (i % 3) · stride: few enough pointers for the general
// registers, and multiples that an address can hold.
constexpr int kBases = (kMaxRows + 2) / 3;

template <typename T, bool kTransposed, int kRows, int kVectors, int... kRow>
PARL_INLINE void kernel_rows(Indices<kRow...>, const Product<T>* products, int count, T* out,
                             std::int64_t out_stride, bool accumulate) {
    using V = Vec<T>;
    V sums[kRows][kVectors];
    const auto start = [&](int i) __attribute__((always_inline)) {
        for (int j = 0; j < kVectors; ++j) {
            sums[i][j] = accumulate ? V::load(out + i * out_stride + j * V::kWidth) : V(T(0));
        }
    };
    (start(kRow), ...);
    for (int s = 0; s < count; ++s) {
        const Product<T>& product = products[s];
        const T* right = product.right;
        const std::int64_t right_step = kTransposed ? product.right_stride : kPanelColumns<T>;
        if constexpr (kTransposed) {
            const T* left = product.left;
            for (std::int64_t k = product.depth; k > 0; --k) {
                V r[kVectors];
                r[0] = V::load(right);
                if constexpr (kVectors == 2) r[1] = V::load(right + V::kWidth);
                const auto add = [&](int i) __attribute__((always_inline)) {
                    const V l(left[i]);
                    sums[i][0] = sums[i][0] + l * r[0];
                    if constexpr (kVectors == 2) sums[i][1] = sums[i][1] + l * r[1];
                };
                (add(kRow), ...);
                right += right_step;
                left += product.left_stride;
            }
        } else {
            const std::int64_t stride = product.left_stride;
            const T* base[kBases];
            for (int b = 0; b < kBases; ++b) {
                base[b] = product.left + 3 * b * stride;
                asm("" : "+r"(base[b]));  // else one register for each row is computed, and spilled
            }
            for (std::int64_t k = product.depth; k > 0; --k) {
                V r[kVectors];
                r[0] = V::load(right);
                if constexpr (kVectors == 2) r[1] = V::load(right + V::kWidth);
                const auto add = [&](int i) __attribute__((always_inline)) {
                    const V l(base[i / 3][(i % 3) * stride]);
                    sums[i][0] = sums[i][0] + l * r[0];
                    if constexpr (kVectors == 2) sums[i][1] = sums[i][1] + l * r[1];
                };
                (add(kRow), ...);
                right += right_step;
                for (int b = 0; b < kBases; ++b) ++base[b];
            }
        }
    }
    const auto finish = [&](int i) __attribute__((always_inline)) {
        for (int j = 0; j < kVectors; ++j) sums[i][j].store(out + i * out_stride + j * V::kWidth);
    };
    (finish(kRow), ...);
}

template <typename T>
using Kernel = void (*)(const Product<T>*, int, T*, std::int64_t, bool);

template <typename T, bool kTransposed, int kRows, int kVectors>
void kernel(const Product<T>* products, int count, T* out, std::int64_t out_stride, bool accumulate) {
    kernel_rows<T, kTransposed, kRows, kVectors>(typename MakeIndices<kRows>::type{}, products, count, out,
                                                 out_stride, accumulate);
}

template <typename T, bool kTransposed, int kVectors>
struct Kernels {
    Kernel<T> of_rows[kMaxRows];

    template <int... kRow>
    static constexpr Kernels make(Indices<kRow...>) {
        return {{&kernel<T, kTransposed, kRow + 1, kVectors>...}};
    }
};
template <typename T, bool kTransposed, int kVectors>
constexpr Kernels<T, kTransposed, kVectors> kKernels =
    Kernels<T, kTransposed, kVectors>::make(typename MakeIndices<kMaxRows>::type{});

template <typename T, bool kTransposed>
PARL_INLINE void multiply(std::int64_t rows, std::int64_t columns, const Product<T>* products, int count,
                          T* out, std::int64_t out_stride, bool accumulate) {
    constexpr std::int64_t kWidth = Vec<T>::kWidth;
    const std::int64_t blocks = (rows + kMaxRows - 1) / kMaxRows;
    for (std::int64_t column = 0; column < columns; column += kPanelColumns<T>) {
        const auto& kernels = columns - column > kWidth ? kKernels<T, kTransposed, 2>.of_rows
                                                        : kKernels<T, kTransposed, 1>.of_rows;
        for (std::int64_t block = 0; block < blocks; ++block) {
            const std::int64_t first = block * rows / blocks, last = (block + 1) * rows / blocks;
            Product<T> here[2];
            for (int s = 0; s < count; ++s) {
                here[s] = products[s];
                here[s].left += kTransposed ? first : first * here[s].left_stride;
                here[s].right += kTransposed ? column : column * here[s].depth;
            }
            kernels[last - first - 1](here, count, out + first * out_stride + column, out_stride, accumulate);
        }
    }
}

}  // namespace

template <typename T>
void pack(const T* source, std::int64_t stride, bool transposed, std::int64_t depth, std::int64_t columns,
          std::int64_t first_panel, std::int64_t last_panel, T* packed) {
    constexpr std::int64_t kColumns = kPanelColumns<T>;
    constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
    for (std::int64_t panel = first_panel; panel < last_panel; ++panel) {
        const std::int64_t first = panel * kColumns;
        const std::int64_t count = columns - first < kColumns ? columns - first : kColumns;
        T* to = packed + first * depth;
        if (count < kColumns) {
            for (std::int64_t i = 0; i < depth * kColumns; ++i) to[i] = T(0);
        }
        if (!transposed) {
            for (std::int64_t k = 0; k < depth; ++k) {
                for (std::int64_t j = 0; j < count; ++j)
                    to[k * kColumns + j] = source[k * stride + first + j];
            }
            continue;
        }
        // A cache line of every row at a time.
        for (std::int64_t k0 = 0; k0 < depth; k0 += kLine) {
            const std::int64_t k1 = depth - k0 < kLine ? depth : k0 + kLine;
            for (std::int64_t j = 0; j < count; ++j) {
                for (std::int64_t k = k0; k < k1; ++k)
                    to[k * kColumns + j] = source[(first + j) * stride + k];
            }
        }
    }
}

template <typename T>
void multiply_packed(std::int64_t rows, std::int64_t columns, const Product<T>* products, int count, T* out,
                     std::int64_t out_stride, bool accumulate) {
    multiply<T, false>(rows, columns, products, count, out, out_stride, accumulate);
}

template <typename T>
void multiply_transposed(std::int64_t rows, std::int64_t columns, const Product<T>* products, int count,
                         T* out, std::int64_t out_stride, bool accumulate) {
    multiply<T, true>(rows, columns, products, count, out, out_stride, accumulate);
}

#define PARL_INSTANTIATE(T)                                                                                \
    template void pack<T>(const T*, std::int64_t, bool, std::int64_t, std::int64_t, std::int64_t,          \
                          std::int64_t, T*);                                                               \
    template void multiply_packed<T>(std::int64_t, std::int64_t, const Product<T>*, int, T*, std::int64_t, \
                                     bool);                                                                \
    template void multiply_transposed<T>(std::int64_t, std::int64_t, const Product<T>*, int, T*,           \
                                         std::int64_t, bool);
PARL_INSTANTIATE(float)
PARL_INSTANTIATE(double)
#undef PARL_INSTANTIATE

}  // namespace parl::cpu::PARL_ISA
