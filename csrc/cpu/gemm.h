// Sums of matrix products for blocks of rows, on one thread: what the layers of a network are made of.
//
// Matrices are row-major. Where a matrix is written, or read as the right factor of `multiply_transposed`,
// its rows lie `row_stride(columns)` apart: whole vectors, the padding of which may be read and written, and
// is zero where the factors' is and the left factor is finite. So no kernel needs a mask. Columns never mix:
// a NaN in the padding reaches no column that is read.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace parl::cpu::PARL_ISA {

// Two vectors wide: the columns that a kernel computes at once.
template <typename T>
inline constexpr std::int64_t kPanelColumns = 2 * Vec<T>::kWidth;

// Elements from one row to the next: whole vectors, and not a multiple of 512 bytes, of which rows would
// share few of the cache's sets.
template <typename T>
PARL_INLINE std::int64_t row_stride(std::int64_t columns) {
    constexpr std::int64_t kWidth = Vec<T>::kWidth;
    const std::int64_t whole = (columns + kWidth - 1) / kWidth * kWidth;
    return whole % (512 / static_cast<std::int64_t>(sizeof(T))) == 0 ? whole + kWidth : whole;
}

// One term of a sum of products, `depth` being the dimension summed over.
template <typename T>
struct Product {
    const T* left;
    std::int64_t left_stride;
    const T* right;
    std::int64_t right_stride;
    std::int64_t depth;
};

// Elements that `pack` writes for a matrix (depth, columns): panels of kPanelColumns columns, padded by
// zeros, each with its rows one after another.
template <typename T>
PARL_INLINE std::int64_t packed_size(std::int64_t depth, std::int64_t columns) {
    return (columns + kPanelColumns<T> - 1) / kPanelColumns<T> * kPanelColumns<T> * depth;
}

// Packs panels first_panel … last_panel − 1 of `source` (depth, columns), or, if `transposed`, of the
// transpose of `source` (columns, depth), whose rows lie `stride` apart.
template <typename T>
void pack(const T* source, std::int64_t stride, bool transposed, std::int64_t depth, std::int64_t columns,
          std::int64_t first_panel, std::int64_t last_panel, T* packed);

// out (rows, columns) = Σ_s left_s (rows, depth_s) · right_s (depth_s, columns), right_s packed; its
// right_stride is not read. `count` is 1 or 2. With `accumulate` the sum is added to `out`.
template <typename T>
void multiply_packed(std::int64_t rows, std::int64_t columns, const Product<T>* products, int count, T* out,
                     std::int64_t out_stride, bool accumulate);

// out (rows, columns) = Σ_s left_sᵀ · right_s, with left_s (depth_s, rows) and right_s (depth_s, columns).
template <typename T>
void multiply_transposed(std::int64_t rows, std::int64_t columns, const Product<T>* products, int count,
                         T* out, std::int64_t out_stride, bool accumulate);

}  // namespace parl::cpu::PARL_ISA
