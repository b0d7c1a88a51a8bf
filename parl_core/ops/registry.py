"""Which backend computes an op: one registry for all of them.

The choice is, in this order: the op's `backend` argument; the innermost `with backend("…")`; the device's
best. A backend asked for by name that is unavailable, or that does not support the dtype or device at hand,
raises with the reason. Only the automatic choice moves on to the next best.

An argument speaks of one op, a context of all that run in it: ops that have no implementation at all in the context's
backend choose by themselves, as if there were no context. As an argument such a backend raises.

On a GPU the best depends on the size; `choice` has the table.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ParlError, unknown_name
from .accelerators import why_no_cuda, why_no_graph, why_no_triton
from .choice import gpu_order

Kernel = Callable[..., Any]


class BackendError(ParlError, RuntimeError):
    """A backend asked for by name cannot be used; the message says why."""


def _why_no_numba() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed; install it with: pip install 'parl-core[numba]'"
    return None


@functools.cache
def _why_no_cpp() -> str | None:
    try:
        importlib.import_module("parl_core._native")
    except ModuleNotFoundError:
        return (
            "the extension parl_core._native is not built; install a C++17 compiler and the Python headers, "
            "then install parl-core again"
        )
    except ImportError as error:
        return f"the extension parl_core._native cannot be loaded ({error}); install parl-core again"
    return None


# Each backend with a function that tells why it cannot be used on this machine, or None if it can.
_WHY_UNAVAILABLE: dict[str, Callable[[], str | None]] = {
    "reference": lambda: None,
    "numba": _why_no_numba,
    "cpp": _why_no_cpp,
    "triton": why_no_triton,
    "cuda": why_no_cuda,
    "graph": why_no_graph,
}
# Best first; for CUDA tensors see `choice`. `reference` closes every list: it supports everything.
_BEST = {"cpu": ("cpp", "numba", "reference")}

_requested: ContextVar[str | None] = ContextVar("parl_core_backend", default=None)


def kernel_in(module: str, name: str) -> Callable[[], Kernel]:
    """What `Op.register` takes as `load`, of the kernel `name` in `module`."""

    def load() -> Kernel:
        kernel: Kernel = getattr(importlib.import_module(module), name)
        return kernel

    return load


def backend_names() -> tuple[str, ...]:
    """All known backends, available or not."""
    return tuple(_WHY_UNAVAILABLE)


def available_backends() -> tuple[str, ...]:
    """The backends that can be used on this machine."""
    return tuple(name for name, why_not in _WHY_UNAVAILABLE.items() if why_not() is None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within this context every op that is implemented in backend `name` uses it, unless its own argument says otherwise.

    Where an op is implemented in it, but not for the dtype, device or policy at hand, the op raises BackendError.
    It holds for the current thread or asynchronous task, and for the derivatives of what is computed in it.

    Raises:
        UnknownNameError: no such backend.
        BackendError: it cannot be used on this machine.
    """
    _require_available(name)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> str | None:
    """The backend of the innermost `with backend("…")`, if there is one."""
    return _requested.get()


def _require_available(name: str) -> None:
    if name not in _WHY_UNAVAILABLE:
        raise unknown_name("backend", name, _WHY_UNAVAILABLE)
    if reason := _WHY_UNAVAILABLE[name]():
        raise BackendError(f"backend '{name}' is unavailable: {reason}.")


@dataclass(frozen=True)
class _Implementation:
    load: Callable[[], Kernel]
    device_types: frozenset[str] | None
    dtypes: frozenset[torch.dtype] | None


class Op:
    """An op and its implementations, one per backend, all with the signature of the reference."""

    def __init__(self, name: str, reference: Kernel) -> None:
        self.name = name
        self._implementations: dict[str, _Implementation] = {}
        self._kernels: dict[str, Kernel] = {}
        self.register("reference", lambda: reference)
        _OPS[name] = self

    def register(
        self,
        backend: str,
        load: Callable[[], Kernel],
        *,
        device_types: frozenset[str] | None = None,
        dtypes: frozenset[torch.dtype] | None = None,
    ) -> None:
        """Add an implementation: `load` imports and returns its kernel at first use; None means any."""
        self._implementations[backend] = _Implementation(load, device_types, dtypes)

    def why_not(self, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
        """Why `backend` cannot compute this op on such tensors, or None if it can."""
        if reason := _WHY_UNAVAILABLE[backend]():
            return reason
        implementation = self._implementations.get(backend)
        if implementation is None:
            return f"it does not implement {self.name}"
        if implementation.device_types is not None and device_type not in implementation.device_types:
            return f"it runs on {' or '.join(sorted(implementation.device_types))}, not on {device_type}"
        if implementation.dtypes is not None and dtype not in implementation.dtypes:
            supported = " or ".join(sorted(str(supported) for supported in implementation.dtypes))
            return f"it computes in {supported}, not in {dtype}"
        try:
            self.kernel(backend)
        except Exception as error:  # whatever importing third-party code may raise
            return f"its kernel cannot be loaded ({type(error).__name__}: {error})"
        return None

    def requested(self, argument: str | None) -> str | None:
        """What was asked for: the argument, or the context's backend if this op is implemented in it, or else None."""
        if argument is not None:
            return argument
        context = requested_backend()
        return context if context in self._implementations else None

    def select(self, tensor: torch.Tensor, argument: str | None) -> str:
        """The name of the backend that computes this op on tensors like `tensor`.

        Raises:
            UnknownNameError: there is no backend `argument`.
            BackendError: the backend asked for, by argument or by context, cannot compute it.
        """
        requested = self.requested(argument)
        device_type, dtype = tensor.device.type, tensor.dtype
        if requested is not None:
            if requested not in _WHY_UNAVAILABLE:
                raise unknown_name("backend", requested, _WHY_UNAVAILABLE)
            if reason := self.why_not(requested, device_type, dtype):
                raise BackendError(f"{self.name}: backend '{requested}' cannot be used: {reason}.")
            return requested
        order = (
            gpu_order(self.name, tensor.numel()) if device_type == "cuda" else _BEST.get(device_type, ("reference",))
        )
        for name in order:
            if self.why_not(name, device_type, dtype) is None:
                return name
        raise BackendError(f"{self.name}: no backend supports {dtype} on {device_type}.")

    def kernel(self, backend: str) -> Kernel:
        """The implementation of `backend`, loaded at first use."""
        kernel = self._kernels.get(backend)
        if kernel is None:
            kernel = self._kernels[backend] = self._implementations[backend].load()
        return kernel


_OPS: dict[str, Op] = {}


def support_table(device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, dict[str, str | None]]:
    """`{op: {backend: reason}}`: why a backend cannot compute an op on such tensors, None where it can.

    Loads every kernel, so that what it promises holds.
    """
    return {
        name: {backend: op.why_not(backend, device_type, dtype) for backend in _WHY_UNAVAILABLE}
        for name, op in _OPS.items()
    }
