"""Where the GPU backends come from and what they can run on.

Triton's kernels come with Triton, those in CUDA C++ with the extension; graphs are of torch's own kernels.

Kernels can be run without a GPU, slowly and for tests alone: Triton has an interpreter (TRITON_INTERPRET=1), and the CUDA
sources also compile for the host, with threads and launches emulated (PARL_CUDA_EMULATED names that build's file).
Then they take tensors on the CPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

HALF_AND_SINGLE = frozenset({torch.float16, torch.bfloat16, torch.float32})
HALF_TO_DOUBLE = HALF_AND_SINGLE | {torch.float64}
BFLOAT_TO_DOUBLE = HALF_TO_DOUBLE - {torch.float16}


def interpreted() -> bool:
    """Whether Triton's kernels are interpreted, on tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def emulated() -> bool:
    """Whether the CUDA kernels are those compiled for the host, on tensors on the CPU."""
    return bool(os.environ.get("PARL_CUDA_EMULATED"))


def triton_devices() -> frozenset[str]:
    """The device types whose tensors Triton's kernels take here."""
    return frozenset({"cpu" if interpreted() else "cuda"})


def cuda_devices() -> frozenset[str]:
    """The device types whose tensors the CUDA kernels take here."""
    return frozenset({"cpu" if emulated() else "cuda"})


@functools.cache
def why_no_triton() -> str | None:
    """Why Triton's kernels cannot be used here, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; builds of torch for CUDA bring it along"
    return None if interpreted() else _why_no_gpu()


@functools.cache
def why_no_cuda() -> str | None:
    """Why the CUDA kernels cannot be used here, or None if they can."""
    try:
        library = cuda_library()
    except ImportError as error:
        return str(error)
    if emulated():
        return library.why_not(-1) or None
    return _why_no_gpu() or library.why_not(_device_in_use()) or None


def why_no_graph() -> str | None:
    """Why torch's own kernels cannot be recorded as a CUDA graph here, or None if they can."""
    return _why_no_gpu()


@functools.cache
def cuda_library() -> Any:
    """The module of the CUDA kernels.

    Raises:
        ImportError: the extension is not built, or was built without them.
    """
    if emulated():
        spec = importlib.util.spec_from_file_location("_emulated", os.environ["PARL_CUDA_EMULATED"])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.cuda
    native = importlib.import_module("parl_core._native")
    if not hasattr(native, "cuda"):
        raise ImportError(
            "the extension was built without CUDA kernels, for want of an nvcc that works; install the CUDA toolkit, 11.8 "
            "or later, then parl-core again, with `pip install -v` to see what CMake says of it"
        )
    return native.cuda


def cuda_stream(tensor: torch.Tensor) -> int:
    """The stream that the CUDA kernels are to run on, torch's current one on the device of `tensor`."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _device_in_use() -> int:
    """The first that torch has memory on, or else the current one: to ask a device makes a context there."""
    in_use = (device for device in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(device))
    return next(in_use, torch.cuda.current_device())


def _why_no_gpu() -> str | None:
    if torch.version.cuda is None:
        return "this build of torch knows no CUDA"
    return None if torch.cuda.is_available() else "no NVIDIA GPU is visible"
