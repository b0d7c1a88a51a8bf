"""The autograd graph of a call, with the path of the submodule that made each node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Node = torch.autograd.graph.Node


@contextmanager
def watched(module: nn.Module, places: dict[Node, str]) -> Iterator[None]:
    """While open, each submodule's call marks the nodes that it makes with its path."""
    stack = [""]

    def enter(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            mark((args, kwargs), stack[-1], places)
            stack.append(path)

        return hook

    def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        mark(output, stack.pop(), places)

    handles = []
    for path, submodule in module.named_modules():
        handles.append(submodule.register_forward_pre_hook(enter(path), with_kwargs=True, prepend=True))
        handles.append(submodule.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mark(outputs: Any, place: str, places: dict[Node, str]) -> None:
    """Give `place` to every node behind `outputs` that has none yet."""
    pending = [t.grad_fn for t in tree_leaves(outputs) if isinstance(t, Tensor)]
    while pending:
        node = pending.pop()
        if node is not None and node not in places:
            places[node] = place
            pending += [parent for parent, _ in node.next_functions]


def operation(node: Node) -> str:
    """The forward operation: "Tanh" for TanhBackward0."""
    return node.name().partition("Backward")[0]


def function_of(node: Node) -> type[torch.autograd.Function] | None:
    """The Python Function that made the node, if one did."""
    return getattr(node, "_forward_cls", None)


def custom_functions(graph: dict[Node, str]) -> dict[str, str]:
    """Names and places of the Python Functions."""
    return {cls.__qualname__: where for node, where in graph.items() if (cls := function_of(node)) is not None}
