// Views of torch tensors, read through Python attributes: the extension links no torch, so one binary serves
// every version of it.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace parl::bindings {

namespace py = pybind11;

enum class DType { kFloat32, kFloat64, kInt64 };

template <typename T>
constexpr DType kDTypeOf = sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64;

inline const char* dtype_name(DType dtype) {
    if (dtype == DType::kInt64) return "int64";
    return dtype == DType::kFloat32 ? "float32" : "float64";
}

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

// torch's type of tensors and dtype objects, and attribute names interned once: each attribute then costs a
// dictionary look-up. Never freed, since it lives as long as the interpreter.
struct TorchNames {
    PyTypeObject* tensor;
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
        tensor = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("Tensor")).release().ptr());
        float32 = py::object(torch.attr("float32")).release().ptr();
        float64 = py::object(torch.attr("float64")).release().ptr();
        int64 = py::object(torch.attr("int64")).release().ptr();
    }
};

inline const TorchNames& torch_names() {
    // Not a plain static: importing torch may let go of the GIL, and who then got it would wait for this
    // thread.
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<TorchNames> names;
    return names.call_once_and_store_result([] { return TorchNames(); }).get_stored();
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

inline void require_tensor(py::handle object, const char* name) {
    if (!PyObject_TypeCheck(object.ptr(), torch_names().tensor)) {
        throw py::type_error(std::string(name) + " must be a Tensor, got " + Py_TYPE(object.ptr())->tp_name);
    }
}

// Reads `tensor`, the argument called `name`. TypeError on another type, a wrong dtype or device, ValueError
// on a wrong layout; the message names the argument, what came and what was expected.
inline TensorView view_contiguous(py::handle tensor, const char* name) {
    require_tensor(tensor, name);
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

inline void require_floating(const TensorView& view, const char* name) {
    if (view.dtype == DType::kInt64) {
        throw py::type_error(std::string(name) + " must be float32 or float64, got int64");
    }
}

// Refuses a tensor of another shape.
inline void require_shape(py::handle tensor, const char* name, std::initializer_list<std::int64_t> expected) {
    const py::tuple shape(attribute(tensor, torch_names().shape));
    bool is_right = shape.size() == expected.size();
    std::string text;
    std::size_t k = 0;
    for (const std::int64_t size : expected) {
        if (is_right) is_right = shape[k++].cast<std::int64_t>() == size;
        text += (text.empty() ? "" : ", ") + std::to_string(size);
    }
    if (is_right) return;
    if (expected.size() == 1) text += ",";
    throw py::value_error(std::string(name) + " must be of shape (" + text + "), got " +
                          std::string(py::str(shape)));
}

// Refuses an `out` that shares memory with `in`, another argument.
inline void require_disjoint(const TensorView& out, const char* out_name, const TensorView& in,
                             const char* in_name) {
    const auto bytes = [](const TensorView& view) {
        return static_cast<std::uintptr_t>(view.size) * (view.dtype == DType::kFloat32 ? 4 : 8);
    };
    if (out.size == 0 || in.size == 0) return;
    const auto out_begin = reinterpret_cast<std::uintptr_t>(out.data);
    const auto in_begin = reinterpret_cast<std::uintptr_t>(in.data);
    if (out_begin < in_begin + bytes(in) && in_begin < out_begin + bytes(out)) {
        throw py::value_error(std::string(out_name) + " must not share memory with " + in_name);
    }
}

// Far more than a machine has; what OpenMP cannot start ends the process.
constexpr int kMaxThreads = 1024;

inline void check_threads(int num_threads) {
    if (num_threads < 1 || num_threads > kMaxThreads) {
        throw py::value_error("num_threads must be 1 to " + std::to_string(kMaxThreads) + ", got " +
                              std::to_string(num_threads));
    }
}

// Refuses a view that is not of `dtype` or has not `size` elements.
inline void require(const TensorView& view, DType dtype, std::int64_t size, const char* name) {
    if (view.dtype != dtype) {
        throw py::type_error(std::string(name) + " must be of dtype " + dtype_name(dtype) + ", got " +
                             dtype_name(view.dtype));
    }
    if (view.size != size) {
        throw py::value_error(std::string(name) + " must have " + std::to_string(size) + " elements, got " +
                              std::to_string(view.size));
    }
}

}  // namespace parl::bindings
