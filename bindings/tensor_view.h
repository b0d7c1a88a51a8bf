// Views of torch tensors, read through Python attributes: the extension links no torch, so one binary serves
// every version of it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace parl::bindings {

namespace py = pybind11;

enum class DType { kFloat32, kFloat64, kInt64 };

// A dense tensor in host memory, not owned: the caller holds the tensor while the view is in use.
struct TensorView {
    void* data;
    std::int64_t size;
    DType dtype;

    template <typename T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

// torch's dtype objects, and attribute names interned once: each attribute then costs a dictionary look-up.
// Never freed, since it lives as long as the interpreter.
struct TorchNames {
    PyObject* float32;
    PyObject* float64;
    PyObject* int64;
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
    PyObject* dim = PyUnicode_InternFromString("dim");
    PyObject* numel = PyUnicode_InternFromString("numel");
    PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* stride = PyUnicode_InternFromString("stride");
    PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");

    TorchNames() {
        const py::module_ torch = py::module_::import("torch");
        float32 = py::object(torch.attr("float32")).release().ptr();
        float64 = py::object(torch.attr("float64")).release().ptr();
        int64 = py::object(torch.attr("int64")).release().ptr();
    }
};

inline const TorchNames& torch_names() {
    static const TorchNames* names = new TorchNames();
    return *names;
}

inline py::object checked(PyObject* object) {
    if (object == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(object);
}

inline py::object attribute(py::handle tensor, PyObject* name) {
    return checked(PyObject_GetAttr(tensor.ptr(), name));
}

inline py::object call(py::handle tensor, PyObject* name) {
    return checked(PyObject_CallMethodNoArgs(tensor.ptr(), name));
}

// Reads `tensor`, the argument called `name`. TypeError on a wrong dtype or device, ValueError on a wrong
// layout; the message names the argument, what came and what was expected.
inline TensorView view_contiguous(py::handle tensor, const char* name) {
    const TorchNames& torch = torch_names();
    const py::object dtype = attribute(tensor, torch.dtype);
    TensorView view{};
    if (dtype.ptr() == torch.float32) {
        view.dtype = DType::kFloat32;
    } else if (dtype.ptr() == torch.float64) {
        view.dtype = DType::kFloat64;
    } else if (dtype.ptr() == torch.int64) {
        view.dtype = DType::kInt64;
    } else {
        throw py::type_error(std::string(name) + " must be of dtype float32, float64 or int64, got " +
                             std::string(py::str(dtype)));
    }
    if (attribute(tensor, torch.is_cpu).ptr() != Py_True) {
        throw py::type_error(std::string(name) + " must be on the CPU, got a tensor on " +
                             std::string(py::str(tensor.attr("device"))));
    }
    if (call(tensor, torch.is_contiguous).ptr() != Py_True) {
        throw py::value_error(std::string(name) + " must be contiguous");
    }
    view.size = call(tensor, torch.numel).cast<std::int64_t>();
    view.data = PyLong_AsVoidPtr(call(tensor, torch.data_ptr).ptr());
    if (view.data == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return view;
}

// The same of a tensor with one dimension.
inline TensorView view_vector(py::handle tensor, const char* name) {
    const TensorView view = view_contiguous(tensor, name);
    const auto dim = call(tensor, torch_names().dim).cast<std::int64_t>();
    if (dim != 1) {
        throw py::value_error(std::string(name) + " must have one dimension, got " + std::to_string(dim));
    }
    return view;
}

// Refuses a view that is not of `dtype` or has not `size` elements.
inline void require(const TensorView& view, DType dtype, std::int64_t size, const char* name) {
    if (view.dtype != dtype) {
        const char* const names[] = {"float32", "float64", "int64"};
        throw py::type_error(std::string(name) + " must be of dtype " + names[static_cast<int>(dtype)] +
                             ", got " + names[static_cast<int>(view.dtype)]);
    }
    if (view.size != size) {
        throw py::value_error(std::string(name) + " must have " + std::to_string(size) + " elements, got " +
                              std::to_string(view.size));
    }
}

}  // namespace parl::bindings
