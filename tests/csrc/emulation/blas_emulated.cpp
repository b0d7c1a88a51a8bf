// cuda/blas.h by plain loops on the host. Without `accumulate`, what was in the output is never read, as
// cuBLAS promises for β = 0.
#include "cuda/blas.h"

namespace parl::cuda {

void load_blas(const std::string&) {}

std::int64_t Blas::workspace_bytes() { return 0; }

Blas::Blas(cudaStream_t, void*, bool) : handle_(nullptr) {}

template <typename T>
void Blas::product(std::int64_t rows, std::int64_t columns, std::int64_t inner, Matrix<const T> left,
                   bool transpose_left, Matrix<const T> right, bool transpose_right, Matrix<T> out,
                   bool accumulate) const {
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < columns; ++j) {
            T sum(0);
            for (std::int64_t k = 0; k < inner; ++k) {
                const T a = left.data[transpose_left ? k * left.stride + i : i * left.stride + k];
                const T b = right.data[transpose_right ? j * right.stride + k : k * right.stride + j];
                sum += a * b;
            }
            T& to = out.data[i * out.stride + j];
            to = accumulate ? to + sum : sum;
        }
    }
}

template void Blas::product(std::int64_t, std::int64_t, std::int64_t, Matrix<const float>, bool,
                            Matrix<const float>, bool, Matrix<float>, bool) const;
template void Blas::product(std::int64_t, std::int64_t, std::int64_t, Matrix<const double>, bool,
                            Matrix<const double>, bool, Matrix<double>, bool) const;

}  // namespace parl::cuda
