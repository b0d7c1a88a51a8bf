"""What the rules of the ops' autograd Functions share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad


@contextmanager
def saved_primals(ctx: Any) -> Iterator[tuple[Any, ...]]:
    """For a `jvp` rule: the tensors that were saved, without their tangents, to compute with in forward mode.

    torch runs these rules with forward mode off, since what was saved carries the tangents that are being pushed. But off
    it is for the outer levels of nested transformations, too, and their tangents would be lost without a word. Without
    the tangents of its own level a rule can have forward mode on, and is followed by those beyond.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield tuple(
            forward_ad.unpack_dual(tensor).primal if tensor is not None and tensor.is_floating_point() else tensor
            for tensor in ctx.saved_tensors
        )


def over_batch(
    part: Callable[..., Any], batch: int, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[Any, Any]:
    """The `vmap` rule of a part in which every step, the first dimension of all tensors, is by itself.

    A batch of B is that of B times as many steps.
    """
    batched = [
        argument
        if not isinstance(argument, Tensor)
        else argument.expand(batch, *argument.shape)
        if dim is None
        else argument.movedim(dim, 0)
        for argument, dim in zip(arguments, in_dims, strict=True)
    ]
    steps = next(argument.shape[1] for argument in batched if isinstance(argument, Tensor))

    def apart(out: Tensor) -> Tensor:
        return out.reshape(batch, steps, *out.shape[1:])

    result = part(*(argument.flatten(0, 1) if isinstance(argument, Tensor) else argument for argument in batched))
    if isinstance(result, Tensor):
        return apart(result), 0
    return tuple(map(apart, result)), (0,) * len(result)
