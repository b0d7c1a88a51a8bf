// In place of cuBLAS: its calls that csrc/cuda/blas.cpp makes, with the refusals that its documentation promises, by
// plain loops over column-major matrices on the host.
#include <cstddef>
#include <cstdint>

namespace {

constexpr int kSuccess = 0, kNotInitialized = 1, kInvalidValue = 7;
int handle = 0, math_mode = -1, products = 0;
bool has_stream = false, has_workspace = false;

template <typename T>
int gemm(const void* of, int transpose_a, int transpose_b, std::int64_t m, std::int64_t n, std::int64_t k,
         const T* alpha, const T* a, std::int64_t lda, const T* b, std::int64_t ldb, const T* beta, T* c,
         std::int64_t ldc) {
    if (of != &handle || !has_stream || !has_workspace) return kNotInitialized;
    if (lda < (transpose_a ? k : m) || ldb < (transpose_b ? n : k) || ldc < m) return kInvalidValue;
    ++products;
    for (std::int64_t j = 0; j < n; ++j) {
        for (std::int64_t i = 0; i < m; ++i) {
            T sum(0);
            for (std::int64_t l = 0; l < k; ++l) {
                sum += (transpose_a ? a[l + i * lda] : a[i + l * lda]) *
                       (transpose_b ? b[j + l * ldb] : b[l + j * ldb]);
            }
            T& to = c[i + j * ldc];
            to = *beta == T(0) ? *alpha * sum : *alpha * sum + *beta * to;
        }
    }
    return kSuccess;
}

}  // namespace

extern "C" {

int parl_products() { return products; }
int parl_math_mode() { return math_mode; }

int cublasCreate_v2(void** made) {
    *made = &handle;
    return kSuccess;
}

int cublasSetStream_v2(void*, void*) {
    has_stream = true;
    has_workspace = false;
    return kSuccess;
}

int cublasSetWorkspace_v2(void*, void* workspace, std::size_t bytes) {
    has_workspace = workspace != nullptr && bytes > 0;
    return kSuccess;
}

int cublasSetMathMode(void*, int mode) {
    math_mode = mode;
    return kSuccess;
}

int cublasSgemm_v2_64(void* of, int transpose_a, int transpose_b, std::int64_t m, std::int64_t n,
                      std::int64_t k, const float* alpha, const float* a, std::int64_t lda, const float* b,
                      std::int64_t ldb, const float* beta, float* c, std::int64_t ldc) {
    return gemm(of, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

int cublasDgemm_v2_64(void* of, int transpose_a, int transpose_b, std::int64_t m, std::int64_t n,
                      std::int64_t k, const double* alpha, const double* a, std::int64_t lda, const double* b,
                      std::int64_t ldb, const double* beta, double* c, std::int64_t ldc) {
    return gemm(of, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
}
