"""CUDA graphs played on the CPU: what torch computes is taped with its places in memory, and played again from there.

As with a graph, what comes from Python is fixed when it is taped, and taping itself computes nothing: whatever it changed is
put back, and what it made is poisoned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TapeRecorder:
    """In place of `graphed_sac.Recorder`."""

    recordings = 0

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def run(self, body: Callable[[], None]) -> None:
        body()

    def record(self, body: Callable[[], None], generator: torch.Generator) -> Callable[[], None]:
        type(self).recordings += 1
        state = generator.get_state()
        with Tape() as tape:
            body()
        tape.undo()
        generator.set_state(state)
        return tape.play


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # by address: what was there already, and its copy
        self._made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            place = tensor.untyped_storage().data_ptr()
            if place not in self._made and place not in self._before:
                self._before[place] = tensor, tensor.clone()
        out = func(*args, **kwargs)
        if func.namespace == "aten":
            outputs = _tensors(out)
            for tensor in outputs:
                place = tensor.untyped_storage().data_ptr()
                if place not in self._before:
                    self._made.setdefault(place, tensor)
            self._calls.append((func, args, kwargs, outputs))
        return out

    @torch.no_grad()
    def undo(self) -> None:
        for tensor, copy in self._before.values():
            tensor.copy_(copy)
        for tensor in self._made.values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)

    @torch.no_grad()
    def play(self) -> None:
        for func, args, kwargs, outputs in self._calls:
            for place, result in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
                if place.data_ptr() != result.data_ptr():
                    place.copy_(result)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
