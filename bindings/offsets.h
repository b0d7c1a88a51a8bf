// Where trajectories begin and end in a flat array of steps.
#pragma once

#include "cpu/scan.h"
#include "tensor_view.h"

namespace parl::bindings {

struct Offsets {
    const std::int64_t* numbers;
    std::int64_t count;  // trajectories

    std::int64_t end() const { return numbers[count]; }
};

// Offsets (N + 1,) from 0 that do not decrease.
inline Offsets view_offsets(py::handle tensor, const char* name) {
    const std::string text(name);
    const TensorView view = view_vector(tensor, name);
    if (view.dtype != DType::kInt64)
        throw py::type_error(text + " must be int64, got " + dtype_name(view.dtype));
    if (view.size < 1) throw py::value_error(text + " must have at least one element, got none");
    const auto* const numbers = view.as<std::int64_t>();
    if (numbers[0] != 0) throw py::value_error(text + " must start at 0, got " + std::to_string(numbers[0]));
    if (const std::int64_t n = cpu::first_decrease(numbers, view.size - 1)) {
        const std::string before = std::to_string(n - 1), here = std::to_string(n);
        throw py::value_error(text + " must not decrease, got offsets[" + here +
                              "] = " + std::to_string(numbers[n]) + " after offsets[" + before +
                              "] = " + std::to_string(numbers[n - 1]));
    }
    return {numbers, view.size - 1};
}

// The same for trajectories of `num_steps` steps together.
inline Offsets view_offsets(py::handle tensor, const char* name, std::int64_t num_steps) {
    const Offsets offsets = view_offsets(tensor, name);
    if (offsets.end() != num_steps) {
        throw py::value_error(std::string(name) + " must end at the number of steps, " +
                              std::to_string(num_steps) + ", got " + std::to_string(offsets.end()));
    }
    return offsets;
}

}  // namespace parl::bindings
