"""No look at a number from the host: what would wait on an accelerator, shown on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Of these the host waits for the device, to have a number or a shape that hangs on numbers.
_WAITING_OPS = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}
# On the CPU these look at the memory itself, by no operation.
_WAITING_METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}


class HostReadError(AssertionError):
    """The host asked for a number."""


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        shaped_by_data = packet is aten.repeat_interleave and kwargs.get("output_size") is None
        indexed_by_mask = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if packet in _WAITING_OPS or shaped_by_data or indexed_by_mask:
            raise HostReadError(f"{func} was called")
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITING_METHODS:
            raise HostReadError(f"{func} was called")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Within this context an operation whose result the host would have to wait for raises HostReadError."""
    with _Methods(), _Operations():
        yield
