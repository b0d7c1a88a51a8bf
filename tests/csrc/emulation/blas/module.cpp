// csrc/cuda/blas.cpp by itself, for tests against the stand-in for cuBLAS beside this.
#include <pybind11/pybind11.h>

#include <string>

#include "cuda/blas.h"

namespace {

namespace cuda = parl::cuda;

// An address and a stride.
template <typename T>
cuda::Matrix<T> matrix(const std::pair<std::uintptr_t, std::int64_t>& at) {
    return {reinterpret_cast<T*>(at.first), at.second};
}

template <typename T>
void multiply(const std::string& transposed, std::int64_t rows, std::int64_t columns, std::int64_t inner,
              std::pair<std::uintptr_t, std::int64_t> left, std::pair<std::uintptr_t, std::int64_t> right,
              std::pair<std::uintptr_t, std::int64_t> out, bool accumulate, bool allow_tf32) {
    char workspace = 0;
    const cuda::Blas blas(nullptr, &workspace, allow_tf32);
    const auto a = matrix<const T>(left), b = matrix<const T>(right);
    if (transposed == "left") {
        blas.multiply_transposed(rows, columns, inner, a, b, matrix<T>(out), accumulate);
    } else if (transposed == "right") {
        blas.multiply_by_transposed(rows, columns, inner, a, b, matrix<T>(out));
    } else {
        blas.multiply(rows, columns, inner, a, b, matrix<T>(out), accumulate);
    }
}

}  // namespace

PYBIND11_MODULE(_blas, module) {
    module.def("load_blas", &cuda::load_blas);
    module.def("multiply_float32", &multiply<float>);
    module.def("multiply_float64", &multiply<double>);
}
