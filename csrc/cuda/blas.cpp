#include "cuda/blas.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

namespace parl::cuda {
namespace {

// What is needed of cuBLAS's interface, of version 12 and later.
using Handle = void*;
using Status = int;
constexpr Status kSuccess = 0;
constexpr int kNotTransposed = 0, kTransposed = 1;
constexpr int kDefaultMath = 0, kTf32Math = 3;

template <typename T>
using Gemm = Status (*)(Handle, int, int, std::int64_t, std::int64_t, std::int64_t, const T*, const T*,
                        std::int64_t, const T*, std::int64_t, const T*, T*, std::int64_t);

struct Library {
    Status (*create)(Handle*);
    Status (*set_stream)(Handle, cudaStream_t);
    Status (*set_workspace)(Handle, void*, std::size_t);
    Status (*set_math_mode)(Handle, int);
    Gemm<float> sgemm;
    Gemm<double> dgemm;
};

template <typename Function>
void find(void* library, const char* name, Function& function) {
    void* const symbol = dlsym(library, name);
    if (symbol == nullptr) throw std::runtime_error(std::string("cuBLAS has no ") + name);
    function = reinterpret_cast<Function>(symbol);
}

Library load(const std::string& cuda_version) {
    const std::string name = "libcublas.so." + cuda_version.substr(0, cuda_version.find('.'));
    // The one in the process, whatever path it came by, before any that the loader would find.
    void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    if (library == nullptr) library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        throw std::runtime_error("cuBLAS was not found: " + name +
                                 "; builds of torch for CUDA bring it along");
    }
    Library found{};
    find(library, "cublasCreate_v2", found.create);
    find(library, "cublasSetStream_v2", found.set_stream);
    find(library, "cublasSetWorkspace_v2", found.set_workspace);
    find(library, "cublasSetMathMode", found.set_math_mode);
    find(library, "cublasSgemm_v2_64", found.sgemm);
    find(library, "cublasDgemm_v2_64", found.dgemm);
    return found;
}

std::optional<Library> loaded;

const Library& library() {
    if (!loaded) throw std::runtime_error("cuBLAS is not loaded: load_blas comes first");
    return *loaded;
}

void check(Status status, const char* what) {
    if (status != kSuccess) {
        throw std::runtime_error(std::string("cuBLAS: ") + what + " failed with status " +
                                 std::to_string(status));
    }
}

// Never destroyed: when a thread ends with the process, cuBLAS may be gone already.
Handle handle_of_device() {
    thread_local std::map<int, Handle> handles;
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) throw std::runtime_error("no CUDA device is current");
    Handle& handle = handles[device];
    if (handle == nullptr) check(library().create(&handle), "cublasCreate");
    return handle;
}

const Gemm<float>& gemm(const Library& found, float) { return found.sgemm; }
const Gemm<double>& gemm(const Library& found, double) { return found.dgemm; }

}  // namespace

void load_blas(const std::string& cuda_version) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> guard(one_at_a_time);
    if (!loaded) loaded = load(cuda_version);
}

std::int64_t Blas::workspace_bytes() { return std::int64_t{32} << 20; }

Blas::Blas(cudaStream_t stream, void* workspace, bool allow_tf32) : handle_(handle_of_device()) {
    // In this order: setting the stream takes a workspace away.
    check(library().set_stream(handle_, stream), "cublasSetStream");
    check(library().set_workspace(handle_, workspace, static_cast<std::size_t>(workspace_bytes())),
          "cublasSetWorkspace");
    check(library().set_math_mode(handle_, allow_tf32 ? kTf32Math : kDefaultMath), "cublasSetMathMode");
}

template <typename T>
void Blas::product(std::int64_t rows, std::int64_t columns, std::int64_t inner, Matrix<const T> left,
                   bool transpose_left, Matrix<const T> right, bool transpose_right, Matrix<T> out,
                   bool accumulate) const {
    const T one(1), beta(accumulate ? T(1) : T(0));
    // cuBLAS is column-major: row-major matrices are their transposes, and (A·B)ᵀ = Bᵀ·Aᵀ.
    const Status status =
        gemm(library(), T())(handle_, transpose_right ? kTransposed : kNotTransposed,
                             transpose_left ? kTransposed : kNotTransposed, columns, rows, inner, &one,
                             right.data, right.stride, left.data, left.stride, &beta, out.data, out.stride);
    check(status, sizeof(T) == 4 ? "cublasSgemm" : "cublasDgemm");
}

template void Blas::product(std::int64_t, std::int64_t, std::int64_t, Matrix<const float>, bool,
                            Matrix<const float>, bool, Matrix<float>, bool) const;
template void Blas::product(std::int64_t, std::int64_t, std::int64_t, Matrix<const double>, bool,
                            Matrix<const double>, bool, Matrix<double>, bool) const;

}  // namespace parl::cuda
