// A linearization on a GPU and the operators made from it, as Python holds them.
#pragma once

#include <memory>
#include <vector>

#include "cuda/mlp_linearization.h"
#include "device_tensor.h"

namespace parl::bindings::cuda {

// With the tensors whose memory it reads and computes in.
template <typename T>
struct SharedLinearization {
    std::vector<py::object> tensors;
    DeviceTensor params;
    std::unique_ptr<parl::cuda::MlpLinearization<T>> native;
};

template <typename T>
struct BoundLinearization {
    std::shared_ptr<SharedLinearization<T>> shared;
};

// v ↦ A v. Hold the GIL while native->apply is called: the launches of one product must not mix with those of
// another one of the same linearization.
template <typename T>
struct BoundOperator {
    std::shared_ptr<SharedLinearization<T>> shared;
    py::object memory;
    std::unique_ptr<parl::cuda::MlpCurvature<T>> native;
};

}  // namespace parl::bindings::cuda
