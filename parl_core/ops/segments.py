"""What the ops over trajectories share: checks of their arguments, neighbouring steps, padding for the references.

Steps come as a flat tensor (T,) with `offsets` (N+1,), or without them in rows of the last dimension: (N, H) are N
trajectories of H steps, (T,) is a single one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from ..offsets import check_offset_values

ON_CPU = frozenset({"cpu"})
SINGLE_AND_DOUBLE = frozenset({torch.float32, torch.float64})


def check_steps(offsets: Tensor | None, **steps: Tensor) -> None:
    """Refuse what are not floating-point tensors of one shape, dtype and device, fit for `offsets`.

    The contents of `offsets` are read later: here a transformation may hide them.
    """
    (first_name, first), *others = steps.items()
    if not isinstance(first, Tensor):
        raise TypeError(f"{first_name} must be a Tensor, got {type(first).__name__}")
    if not first.is_floating_point():
        raise TypeError(f"{first_name} must be of a floating-point dtype, got {first.dtype}")
    if first.dim() not in (1, 2):
        raise ValueError(f"{first_name} must be of shape (T,) or (N, H), got {tuple(first.shape)}")
    for name, other in others:
        check_like(name, other, first_name, first)
        if other.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape of {first_name}, {tuple(first.shape)}, got {tuple(other.shape)}"
            )
    if offsets is None:
        return
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets must be a Tensor or None, got {type(offsets).__name__}")
    if first.dim() == 2:
        raise ValueError(f"offsets must be None where {first_name} is of shape (N, H): its rows are the trajectories")
    if offsets.dtype != torch.int64:
        raise TypeError(f"offsets must be of dtype torch.int64, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"offsets must be of shape (N+1,), got {tuple(offsets.shape)}")
    if offsets.device != first.device:
        raise ValueError(f"offsets must be on the device of {first_name}, {first.device}, got {offsets.device}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse `tensor` unless it is one of the dtype and on the device of `other`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}")


def check_bootstrap(bootstrap: Tensor | None, rewards: Tensor, offsets: Tensor | None) -> None:
    """Refuse a bootstrap that is not one number for each trajectory, or None."""
    if bootstrap is None:
        return
    check_like("bootstrap", bootstrap, "rewards", rewards)
    number = offsets.shape[0] - 1 if offsets is not None else rewards.shape[0] if rewards.dim() == 2 else 1
    if bootstrap.shape != (number,):
        raise ValueError(
            f"bootstrap must be of shape (N,) = ({number},), one for each trajectory, got {tuple(bootstrap.shape)}"
        )


def check_fraction(name: str, value: float) -> float:
    """`value` as a float; refuse what is not a number in [0, 1]."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a Tensor: nothing is differentiated in it")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return float(value)


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd or a transformation of torch.func follows any of `tensors`."""
    grad_enabled, dual = torch.is_grad_enabled(), forward_ad._current_level >= 0
    for tensor in tensors:
        if tensor is not None and (
            (grad_enabled and tensor.requires_grad)
            # Saved for a pullback, tensors come back wrapped even after their transformation has ended.
            or _functorch.is_functorch_wrapped_tensor(tensor)
            or (dual and forward_ad.unpack_dual(tensor).tangent is not None)
        ):
            return True
    return False


def is_traced(tensor: Tensor) -> bool:
    """Whether there are shapes and no numbers: torch.compile is at work, or `tensor` is a fake one."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)


def is_legacy_batched(tensor: Tensor) -> bool:
    """Whether `tensor` is a batch under autograd's own vmap, that of `is_grads_batched=True`: it has no memory to read."""
    return _functorch.is_legacy_batchedtensor(tensor)


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transformation of torch.func, or autograd's own vmap, hides the memory of `tensor`."""
    return _functorch.is_functorch_wrapped_tensor(tensor) or is_legacy_batched(tensor)


def plain(tensor: Tensor) -> Tensor:
    """`tensor` as kernels read it: without its graph, contiguous, its sign resolved."""
    return _readable(tensor).contiguous()


def plain_rows(tensor: Tensor) -> Tensor:
    """`plain`, except that the rows of a matrix may be apart."""
    tensor = _readable(tensor)
    return tensor if tensor.dim() == 2 and tensor.stride(1) == 1 else tensor.contiguous()


def _readable(tensor: Tensor) -> Tensor:
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    # Forward mode stands in for tangents of zero with tensors that have no memory, and `contiguous` gives them none.
    return tensor.clone() if tensor._is_zerotensor() else tensor


def plain_offsets(offsets: Tensor | None, steps: Tensor, backend: str) -> Tensor | None:
    """`offsets` as kernels read them, their contents checked; backend `cpp` does that itself, in one pass."""
    if offsets is None:
        return None
    if backend != "cpp":
        check_offset_values(offsets, steps.shape[0])
    return offsets.contiguous()


def check_hidden_offsets(offsets: Tensor | None, steps: Tensor) -> None:
    """Check the contents of `offsets` from within transformations, before they are used as indices."""
    if offsets is None or torch.compiler.is_compiling():
        return
    check_offset_values(unwrapped(offsets), steps.shape[-1])


def unwrapped(offsets: Tensor) -> Tensor:
    """The tensor itself, out of the transformations of torch.func."""
    while _functorch.is_functorch_wrapped_tensor(offsets):
        if _functorch.is_batchedtensor(offsets):
            raise vmapped_offsets()
        offsets = _functorch.get_unwrapped(offsets)
    return offsets


def vmapped_offsets() -> ValueError:
    """The error of offsets that differ over a batch."""
    return ValueError("offsets must be the same for all of a vmap (in_dims None), got a batch of them")


def as_offsets(steps: Tensor, offsets: Tensor | None) -> Tensor:
    """`offsets` (N+1,) of `steps`; without them those of its rows."""
    if offsets is not None:
        return offsets
    rows = steps.shape[0] if steps.dim() == 2 else 1
    return torch.arange(rows + 1, device=steps.device) * steps.shape[-1]


def dtype_of_sums(tensor: Tensor) -> torch.dtype:
    """What sums over `tensor` are made in: its own dtype, or single precision for half."""
    return torch.promote_types(tensor.dtype, torch.float32)


def neighbour(steps: Tensor, offsets: Tensor | None, *, reverse: bool, edge: Tensor | None = None) -> Tensor:
    """The value at the step after (`reverse`) or before, and `edge` (N,), default 0, where there is none.

    Made of torch's own operations, so that it is differentiated and vectorised by torch.
    """
    horizon = steps.shape[-1]
    if horizon == 0:
        return steps
    if offsets is None:
        column = steps.new_zeros(steps.shape[:-1]) if edge is None else edge.reshape(steps.shape[:-1])
        parts = [steps[..., 1:], column.unsqueeze(-1)] if reverse else [column.unsqueeze(-1), steps[..., :-1]]
        return torch.cat(parts, -1)
    number = torch.arange(horizon, device=steps.device)
    # Of empty trajectories at the same place, the last one's successor is found: the one that holds the step.
    trajectory = torch.searchsorted(offsets, number, right=True) - 1  # (T,)
    border = offsets.index_select(0, trajectory + 1 if reverse else trajectory)
    alone = number + 1 == border if reverse else number == border
    filling = steps.new_zeros(()) if edge is None else edge.index_select(0, trajectory)
    return torch.where(alone, filling, steps.roll(-1 if reverse else 1))


def time_major(steps: Tensor, offsets: Tensor) -> Tensor:
    """Steps as (horizon, N), zero after a trajectory's end; half precision becomes single."""
    lengths = offsets.diff()
    horizon = int(lengths.max()) if len(lengths) else 0
    time = torch.arange(horizon, device=steps.device).unsqueeze(1)
    place = (offsets[:-1] + time).clamp(max=steps.numel() - 1)
    # Nothing is written in place, since autograd's own vmap could not follow.
    return torch.where(time < lengths, steps.reshape(-1).to(dtype_of_sums(steps))[place], 0)


def from_time_major(padded: Tensor, offsets: Tensor, like: Tensor) -> Tensor:
    """The steps in `padded` (horizon, N), in the shape and dtype of `like`."""
    return padded[_places(offsets, like.numel())].to(like.dtype).reshape(like.shape)


def _places(offsets: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Of every step, its time within its trajectory and the trajectory's number."""
    number = torch.arange(len(offsets) - 1, device=offsets.device)
    trajectory = number.repeat_interleave(offsets.diff(), output_size=num_steps)
    time = torch.arange(num_steps, device=offsets.device) - offsets[trajectory]
    return time, trajectory
