// Views of torch tensors in the memory of a GPU, as tensor_view.h has them of tensors on the CPU.
#pragma once

#include <cuda_runtime.h>

#include "../tensor_view.h"
#include "cuda/launch.h"

namespace parl::bindings::cuda {

enum class DType { kFloat32, kFloat64, kBFloat16, kInt32, kInt64, kUInt8 };

inline const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::kFloat32:
            return "float32";
        case DType::kFloat64:
            return "float64";
        case DType::kBFloat16:
            return "bfloat16";
        case DType::kInt32:
            return "int32";
        case DType::kInt64:
            return "int64";
        case DType::kUInt8:
            return "uint8";
    }
    return "";
}

inline std::int64_t size_of(DType dtype) {
    if (dtype == DType::kFloat64 || dtype == DType::kInt64) return 8;
    if (dtype == DType::kBFloat16) return 2;
    return dtype == DType::kUInt8 ? 1 : 4;
}

// A dense tensor in the memory of a GPU, not owned: the caller holds the tensor while the view is in use.
struct DeviceTensor {
    void* data;
    std::int64_t size;
    DType dtype;
    int device;

    template <typename T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

// Further names of torch's; see TorchNames.
struct DeviceNames {
    PyObject* bfloat16;
    PyObject* int32;
    PyObject* uint8;
    PyObject* get_device = PyUnicode_InternFromString("get_device");
#if defined(PARL_CUDA_EMULATED)
    static constexpr const char* kWhere = "on the CPU";
    PyObject* is_here = PyUnicode_InternFromString("is_cpu");
#else
    static constexpr const char* kWhere = "on a CUDA device";
    PyObject* is_here = PyUnicode_InternFromString("is_cuda");
#endif

    DeviceNames() {
        const py::module_ torch = py::module_::import("torch");
        bfloat16 = py::object(torch.attr("bfloat16")).release().ptr();
        int32 = py::object(torch.attr("int32")).release().ptr();
        uint8 = py::object(torch.attr("uint8")).release().ptr();
    }
};

inline const DeviceNames& device_names() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<DeviceNames> names;
    return names.call_once_and_store_result([] { return DeviceNames(); }).get_stored();
}

// Reads `tensor`, the argument called `name`. TypeError on another type, a wrong dtype or device, ValueError on a
// wrong layout; the message names the argument, what came and what was expected.
inline DeviceTensor view_device(py::handle tensor, const char* name) {
    require_tensor(tensor, name);
    const TorchNames& torch = torch_names();
    const DeviceNames& names = device_names();
    const py::object dtype = attribute(tensor, torch.dtype);
    DeviceTensor view{};
    if (dtype.ptr() == torch.float32) {
        view.dtype = DType::kFloat32;
    } else if (dtype.ptr() == torch.float64) {
        view.dtype = DType::kFloat64;
    } else if (dtype.ptr() == names.bfloat16) {
        view.dtype = DType::kBFloat16;
    } else if (dtype.ptr() == names.int32) {
        view.dtype = DType::kInt32;
    } else if (dtype.ptr() == torch.int64) {
        view.dtype = DType::kInt64;
    } else if (dtype.ptr() == names.uint8) {
        view.dtype = DType::kUInt8;
    } else {
        throw py::type_error(std::string(name) +
                             " must be of dtype float32, float64, bfloat16, int32, int64 or uint8, got " +
                             std::string(py::str(dtype)));
    }
    if (attribute(tensor, names.is_here).ptr() != Py_True) {
        throw py::type_error(std::string(name) + " must be " + DeviceNames::kWhere + ", got a tensor on " +
                             std::string(py::str(tensor.attr("device"))));
    }
    if (call(tensor, torch.is_contiguous).ptr() != Py_True) {
        throw py::value_error(std::string(name) + " must be contiguous");
    }
    view.size = call(tensor, torch.numel).cast<std::int64_t>();
    view.data = PyLong_AsVoidPtr(call(tensor, torch.data_ptr).ptr());
    if (view.data == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    view.device = call(tensor, names.get_device).cast<int>();
    return view;
}

// Refuses what is not of `dtype`, of `size` elements and on the device of `like`, the argument called `like_name`.
inline void require(const DeviceTensor& view, const char* name, DType dtype, std::int64_t size,
                    const DeviceTensor& like, const char* like_name) {
    if (view.dtype != dtype) {
        throw py::type_error(std::string(name) + " must be of dtype " + dtype_name(dtype) + ", got " +
                             dtype_name(view.dtype));
    }
    if (view.size != size) {
        throw py::value_error(std::string(name) + " must have " + std::to_string(size) + " elements, got " +
                              std::to_string(view.size));
    }
    if (view.device != like.device) {
        throw py::value_error(std::string(name) + " must be on the device of " + like_name + ", cuda:" +
                              std::to_string(like.device) + ", got cuda:" + std::to_string(view.device));
    }
}

// The same, in the dtype and with as many elements as `like`.
inline void require_like(const DeviceTensor& view, const char* name, const DeviceTensor& like,
                         const char* like_name) {
    require(view, name, like.dtype, like.size, like, like_name);
}

// Refuses an `out` that shares memory with `in`, another argument.
inline void require_disjoint(const DeviceTensor& out, const char* out_name, const DeviceTensor& in,
                             const char* in_name) {
    if (out.size == 0 || in.size == 0) return;
    const auto out_begin = reinterpret_cast<std::uintptr_t>(out.data);
    const auto in_begin = reinterpret_cast<std::uintptr_t>(in.data);
    const auto out_bytes = static_cast<std::uintptr_t>(out.size * size_of(out.dtype));
    const auto in_bytes = static_cast<std::uintptr_t>(in.size * size_of(in.dtype));
    if (out_begin < in_begin + in_bytes && in_begin < out_begin + out_bytes) {
        throw py::value_error(std::string(out_name) + " must not share memory with " + in_name);
    }
}

// The stream of torch's `torch.cuda.Stream.cuda_stream`.
inline cudaStream_t stream_of(std::uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// Launches go to a device, or that of a tensor, as long as this lives; hold the GIL. torch changes devices, which
// comes back without making a context, of hundreds of megabytes, on a device that has none.
class OnDevice {
  public:
    explicit OnDevice(const DeviceTensor& view) : OnDevice(view.device) {}
    explicit OnDevice(int device) {
        if (device < 0) return;  // emulated
        int current = 0;
        parl::cuda::check(cudaGetDevice(&current), "the current device");
        if (current == device) return;
        py::object guard = py::module_::import("torch.cuda").attr("device")(device);
        guard.attr("__enter__")();
        guard_ = std::move(guard);
    }
    ~OnDevice() {
        if (!guard_) return;
        try {
            guard_.attr("__exit__")(py::none(), py::none(), py::none());
        } catch (py::error_already_set& error) {
            error.discard_as_unraisable("the end of a launch");
        }
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    py::object guard_;
};

}  // namespace parl::bindings::cuda
