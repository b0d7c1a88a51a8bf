// A linearization on a GPU and the operators made from it, as Python holds them.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <utility>
#include <vector>

#include "cuda/mlp_linearization.h"
#include "cuda/operator.h"

namespace parl::bindings::cuda {

namespace py = pybind11;

// With the tensors whose memory it reads and computes in.
template <typename T>
struct SharedLinearization {
    std::unique_ptr<parl::cuda::MlpLinearization<T>> native;
    std::vector<py::object> tensors;
};

template <typename T>
struct BoundLinearization {
    std::shared_ptr<SharedLinearization<T>> shared;
};

// v ↦ A v.
template <typename T>
struct BoundOperator {
    std::shared_ptr<SharedLinearization<T>> shared;
    std::vector<py::object> tensors;
    std::unique_ptr<parl::cuda::MlpCurvature<T>> native;  // a parl::cuda::Operator<T>
};

}  // namespace parl::bindings::cuda
