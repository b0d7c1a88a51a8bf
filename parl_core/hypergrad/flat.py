"""Parameters travel as one flat vector: packing, unpacking, and gradients in that form."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")
_AUTOCAST_KINDS = [kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)]


def differentiating(function: Callable[P, R]) -> Callable[P, R]:
    """Let `function` differentiate whatever mode it is called in: no_grad and inference mode are lifted for its time."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)

    return wrapped


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Let `function` compute in the dtypes of its parameters and data, whatever autocast the caller is in.

    Short dtypes have too few digits for second derivatives, and for the inner products of a solve.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with contextlib.ExitStack() as stack:
            for kind in _AUTOCAST_KINDS:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def autocast_uncached() -> Iterator[None]:
    """Let autocast cast anew each time.

    Its cache, in the older of the torch versions supported, also hands out casts made under no_grad, which carry no gradient
    (pytorch/pytorch#158232).
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Derivatives and solves run in the dtypes they were given, whatever autocast the caller is in."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def refuse_once_differentiable(tensors: Sequence[Tensor], role: str) -> None:
    """Refuse gradients made by a once-differentiable function.

    torch raises only when a second derivative reaches such a function's error node, and on the way to the parameters none
    does: its part would silently be missing.
    """
    pending, seen = [t.grad_fn for t in tensors], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise TypeError(
                f"{role} goes through a once-differentiable function, so that second derivatives would silently miss it; "
                "parl_core.preflight names it"
            )
        seen.add(node)
        pending += [parent for parent, _ in node.next_functions]


def trainable_parameters(module: nn.Module, role: str) -> dict[str, nn.Parameter]:
    """The parameters of `module` that require a gradient, in the order of `named_parameters`.

    Raises:
        TypeError, ValueError: there is none, or they differ in dtype or device, or are not real floating-point numbers; any
            parameter, trainable or not, was made in inference mode.
    """
    for name, p in module.named_parameters():
        if p.is_inference():
            raise ValueError(
                f"{role} ({type(module).__name__}): '{name}' was made in inference mode, and autograd cannot save it for "
                "backward: build the module outside torch.inference_mode and load its state_dict there"
            )
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError(f"{role} ({type(module).__name__}) has no parameter that requires a gradient")
    check_uniform(params, role)
    return params


def check_uniform(params: dict[str, Tensor] | dict[str, nn.Parameter], role: str) -> None:
    """Refuse parameters that cannot share one flat real vector."""
    first_name, first = next(iter(params.items()))
    for name, tensor in params.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{role}: '{name}' must be a real floating-point tensor, got {tensor.dtype}")
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"{role}: all parameters must share dtype and device, but '{first_name}' is {first.dtype} on "
                f"{first.device} and '{name}' is {tensor.dtype} on {tensor.device}"
            )


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenate tensors of any shape into one flat vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor], *, name: str = "vector") -> list[Tensor]:
    """Cut a flat vector into views shaped as `like`."""
    sizes = [t.numel() for t in like]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"{name} must have shape (P,) = ({sum(sizes)},), got {tuple(vector.shape)}")
    return [piece.view(t.shape) for piece, t in zip(vector.split(sizes), like, strict=True)]


def assign(params: Sequence[Tensor], values: Tensor) -> None:
    """Write a flat vector into tensors, in place."""
    with torch.no_grad():
        for param, piece in zip(params, unflatten(values, params, name="values"), strict=True):
            param.copy_(piece)


def flat_grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    *,
    retain_graph: bool = False,
) -> Tensor:
    """Σ grad_outputs · ∂outputs/∂inputs as one flat vector; inputs that do not matter contribute zeros."""
    return flatten(gradients(outputs, inputs, grad_outputs, retain_graph=retain_graph))


def gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> list[Tensor]:
    """`torch.autograd.grad` that gives zeros where there is no dependence, also when no output has a graph."""
    pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(i) for i in inputs]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        list(inputs),
        [g for _, g in pairs],
        retain_graph=retain_graph or create_graph,
        create_graph=create_graph,
        allow_unused=True,
    )
    return [torch.zeros_like(i) if f is None else f for i, f in zip(inputs, found, strict=True)]
