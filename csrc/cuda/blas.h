// Matrix products by cuBLAS, which is looked for at run time, first of all the one that torch has loaded: the
// extension links none. All matrices are row-major; strides are elements from one row to the next.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

namespace parl::cuda {

// Looks for the cuBLAS of a version of CUDA, torch's own, since two of them may be in one process: "13.0". Comes before
// all products, and does nothing once one is loaded. Throws std::runtime_error where there is none.
void load_blas(const std::string& cuda_version);

template <typename T>
struct Matrix {
    T* data;
    std::int64_t stride;
};

// Products on one stream. Made anew for every sequence of them, which costs three calls of cuBLAS and nothing
// on the device; the handle behind it belongs to the thread and the current device and is made once, which
// must not happen during the capture of a graph.
class Blas {
  public:
    // Bytes of device memory that products are given to work in, as NVIDIA recommends for Hopper. What cuBLAS
    // takes by itself could not be captured in a graph.
    static std::int64_t workspace_bytes();

    // `allow_tf32`: products of float may round their factors to TF32's 10 bits.
    // Throws std::runtime_error where cuBLAS is not loaded or fails.
    Blas(cudaStream_t stream, void* workspace, bool allow_tf32);

    // out (rows, columns) = left (rows, inner) · right (inner, columns), or, if `accumulate`, += that.
    template <typename T>
    void multiply(std::int64_t rows, std::int64_t columns, std::int64_t inner, Matrix<const T> left,
                  Matrix<const T> right, Matrix<T> out, bool accumulate = false) const {
        product(rows, columns, inner, left, false, right, false, out, accumulate);
    }

    // The same with right's transpose: right (columns, inner).
    template <typename T>
    void multiply_by_transposed(std::int64_t rows, std::int64_t columns, std::int64_t inner,
                                Matrix<const T> left, Matrix<const T> right, Matrix<T> out) const {
        product(rows, columns, inner, left, false, right, true, out, false);
    }

    // The same with left's transpose: left (inner, rows).
    template <typename T>
    void multiply_transposed(std::int64_t rows, std::int64_t columns, std::int64_t inner,
                             Matrix<const T> left, Matrix<const T> right, Matrix<T> out,
                             bool accumulate) const {
        product(rows, columns, inner, left, true, right, false, out, accumulate);
    }

  private:
    template <typename T>
    void product(std::int64_t rows, std::int64_t columns, std::int64_t inner, Matrix<const T> left,
                 bool transpose_left, Matrix<const T> right, bool transpose_right, Matrix<T> out,
                 bool accumulate) const;

    void* handle_;
};

}  // namespace parl::cuda
