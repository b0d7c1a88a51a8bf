"""What would make the host wait for a device, counted where there is none."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READING_OPS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.nonzero,
    torch.ops.aten.unique_dim,
    torch.ops.aten._unique2,
}


class HostReads:
    """The reads within the context, by name: reading ops, also below Python, and `tolist`, which on the CPU is none."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._modes = (_Dispatched(self.names), _Called(self.names))

    def __enter__(self) -> HostReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    @property
    def count(self) -> int:
        return len(self.names)


class _Dispatched(TorchDispatchMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in _READING_OPS:
            self._names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.tolist, Tensor.numpy):
            self._names.append(func.__name__)
        return func(*args, **(kwargs or {}))
