// A linearization and the operators made from it, as Python holds them.
#pragma once

#include <memory>
#include <mutex>
#include <utility>

#include "cpu/linearization.h"

namespace parl::bindings {

// A linearization and its operators compute in the same memory, one at a time.
template <typename T>
struct SharedLinearization {
    std::unique_ptr<cpu::Linearization<T>> native;
    std::mutex mutex;
};

template <typename T>
struct BoundLinearization {
    std::shared_ptr<SharedLinearization<T>> shared;
};

// v ↦ A v. Hold shared->mutex, and not the GIL, while native->apply is called.
template <typename T>
struct BoundCurvature {
    std::shared_ptr<SharedLinearization<T>> shared;
    std::unique_ptr<cpu::Curvature<T>> native;
};

}  // namespace parl::bindings
