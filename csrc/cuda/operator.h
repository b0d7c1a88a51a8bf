// A linear operator v ↦ A v on vectors in device memory, as solvers call it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace parl::cuda {

template <typename T>
struct Operator {
    virtual ~Operator() = default;
    virtual std::int64_t size() const = 0;
    // v (size,) -> out (size,), which may not overlap v. Only launches, on `stream`: nothing is allocated and
    // the host does not wait, so that it can be captured in a CUDA graph. Two products of one operator, or of
    // two operators of one linearization, compute in the same memory: they belong on one stream.
    virtual void apply(const T* v, T* out, cudaStream_t stream) = 0;
};

}  // namespace parl::cuda
