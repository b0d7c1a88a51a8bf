#include "cpu/neighbours.h"

#include <pybind11/numpy.h>

#include <string>

#include "tensor_view.h"

namespace parl::bindings {
namespace {

using Array = py::array_t<float, py::array::c_style>;

void find_neighbours(const Array& states, std::int64_t num, std::int64_t row, Array& nearest, bool mutual) {
    constexpr std::int64_t lanes = cpu::kStatesInBlock;
    if (states.ndim() != 3 || states.shape(2) != lanes) {
        throw py::value_error("states must be of shape (blocks, dim, " + std::to_string(lanes) + "), got " +
                              std::string(py::str(states.attr("shape"))));
    }
    const std::int64_t capacity = states.shape(0) * lanes;
    if (nearest.ndim() != 2 || nearest.shape(0) < 1 || nearest.shape(1) != capacity) {
        throw py::value_error("nearest must be of shape (k, " + std::to_string(capacity) + "), got " +
                              std::string(py::str(nearest.attr("shape"))));
    }
    if (row < 0 || row >= num || num > capacity) {
        throw py::value_error("row must be below num and num at most " + std::to_string(capacity) + ", got " +
                              std::to_string(row) + " and " + std::to_string(num));
    }
    const cpu::Neighbours all{states.data(),   nearest.mutable_data(), num,
                              states.shape(1), nearest.shape(0),       capacity};
    PARL_DISPATCH(find_neighbours(all, row, mutual));
}

}  // namespace

void bind_neighbours(py::module_& module) {
    module.def(
        "find_neighbours", &find_neighbours, py::arg("states").noconvert(), py::arg("num"), py::arg("row"),
        py::arg("nearest").noconvert(), py::arg("mutual"),
        "Squared distances of the state in `row` of states (blocks, dim, 16), float32, to its k nearest of "
        "the first `num`, into its column of nearest (k, 16·blocks), ascending; with `mutual` also into "
        "theirs.");
}

}  // namespace parl::bindings
