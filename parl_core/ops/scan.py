"""Segmented discounted scans: discounted returns and prefix sums over ragged trajectories.

Both are one linear map of the values x (T,), restarted in every trajectory [offsets[n], offsets[n+1]):

    forwards    y_h = x_h + discount · y_{h−1}         prefix sums, with discount 1
    backwards   y_h = x_h + discount · y_{h+1}         discounted returns

The two directions are each other's transpose, so the derivatives of a scan, in forward and in reverse mode,
are scans again. Kernels have the signature of `reference` below, which is the specification.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual

from ..trajectories import check_offset_values
from .registry import Kernel, Op


def discounted_returns(
    rewards: Tensor, discount: float, offsets: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Discounted return from every step to the end of its trajectory: G_h = Σ_{k≥h} discount^{k−h} r_k.

    Sutton & Barto, Reinforcement Learning (2018), equation 3.8. Differentiable in `rewards`, at any order.

    Args:
        rewards: (T,), floating point; the trajectories one after another.
        discount: in [0, 1]; a number, not differentiated.
        offsets: (N+1,), int64, on the device of `rewards`; trajectory n is rewards[offsets[n]:offsets[n+1]]
            and may be empty. None: a single trajectory.
        backend: see `available_backends()`; None: the innermost `with backend(…)`, or else the device's best.

    Returns:
        (T,), in the dtype and on the device of `rewards`.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device or discount, or offsets that do not cover the rewards.
        BackendError: the backend asked for cannot be used here.
    """
    return _scan("rewards", rewards, _check_discount(discount), offsets, reverse=True, backend=backend)


def prefix_sum(values: Tensor, offsets: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Inclusive running sum, restarted in every trajectory: y_h = Σ_{j≤h} x_j.

    Differentiable in `values`, at any order.

    Args:
        values: (T,), floating point; the trajectories one after another.
        offsets: (N+1,), int64, on the device of `values`; trajectory n is values[offsets[n]:offsets[n+1]]
            and may be empty. None: a single trajectory.
        backend: see `available_backends()`; None: the innermost `with backend(…)`, or else the device's best.

    Returns:
        (T,), in the dtype and on the device of `values`.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape or device, or offsets that do not cover the values.
        BackendError: the backend asked for cannot be used here.
    """
    return _scan("values", values, 1.0, offsets, reverse=False, backend=backend)


def reference(values: Tensor, offsets: Tensor, discount: float, reverse: bool) -> Tensor:
    """The specification, on any device: pad to (horizon, N), loop over time, and take the steps back out."""
    lengths = offsets.diff()  # (N,)
    num_trajectories = len(lengths)
    horizon = int(lengths.max()) if num_trajectories else 0
    trajectory = torch.arange(num_trajectories, device=values.device).repeat_interleave(lengths)  # (T,)
    time = torch.arange(len(values), device=values.device) - offsets[trajectory]  # (T,)

    # Half precision is summed in single precision.
    dtype = values.dtype if values.dtype == torch.float64 else torch.float32
    padded = torch.zeros(horizon, num_trajectories, dtype=dtype, device=values.device)
    padded[time, trajectory] = values.to(dtype)
    carry = torch.zeros(num_trajectories, dtype=dtype, device=values.device)
    for h in reversed(range(horizon)) if reverse else range(horizon):
        carry = padded[h] + discount * carry
        padded[h] = carry
    return padded[time, trajectory].to(values.dtype)


def _load_cpp() -> Kernel:
    scan = importlib.import_module("parl_core._native").scan

    def cpp(values: Tensor, offsets: Tensor, discount: float, reverse: bool) -> Tensor:
        out = torch.empty_like(values)
        scan(values, offsets, out, discount, reverse, torch.get_num_threads())
        return out

    return cpp


def _load_numba() -> Kernel:
    scan: Callable[..., None] = importlib.import_module("parl_core.kernels.numba_scan").scan

    def numba(values: Tensor, offsets: Tensor, discount: float, reverse: bool) -> Tensor:
        out = torch.empty_like(values)
        scan(values.numpy(), offsets.numpy(), out.numpy(), discount, reverse, torch.get_num_threads())
        return out

    return numba


_OP = Op("discounted_returns, prefix_sum", reference)
_NATIVE: dict[str, Any] = {
    "device_types": frozenset({"cpu"}),
    "dtypes": frozenset({torch.float32, torch.float64}),
}
_OP.register("numba", _load_numba, **_NATIVE)
_OP.register("cpp", _load_cpp, **_NATIVE)


def _scan(
    name: str, values: Tensor, discount: float, offsets: Tensor | None, *, reverse: bool, backend: str | None
) -> Tensor:
    _check_tensors(name, values, offsets)
    if torch.compiler.is_compiling():
        return _scan_op(values, offsets, discount, reverse, backend)
    return _differentiable(values, offsets, discount, reverse, _OP.select(values, backend))


def _differentiable(values: Tensor, offsets: Tensor | None, discount: float, reverse: bool, backend: str) -> Tensor:
    if (
        (values.requires_grad and torch.is_grad_enabled())
        or is_functorch_wrapped_tensor(values)
        # Saved for a pullback, offsets come back wrapped even after their transformation has ended.
        or (offsets is not None and is_functorch_wrapped_tensor(offsets))
        or unpack_dual(values).tangent is not None
    ):
        return _Scan.apply(values, offsets, discount, reverse, backend)
    # Nobody differentiates: spare the bookkeeping of autograd, which takes longer than a short scan.
    return _run(values, offsets, discount, reverse, backend)


def _run(values: Tensor, offsets: Tensor | None, discount: float, reverse: bool, backend: str) -> Tensor:
    """Check the contents of `offsets`, which no transformation hides here, and call the kernel."""
    values = values.detach().contiguous().resolve_neg()
    if offsets is None:
        offsets = torch.tensor([0, len(values)], device=values.device)
    else:
        offsets = offsets.contiguous()
        check_offset_values(offsets, len(values))
    return _OP.kernel(backend)(values, offsets, discount, reverse)


class _Scan(torch.autograd.Function):
    """The scan under autograd and torch.func. Its derivatives call it again: closed at any order."""

    @staticmethod
    def forward(values: Tensor, offsets: Tensor | None, discount: float, reverse: bool, backend: str) -> Tensor:
        return _run(values, offsets, discount, reverse, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, offsets, ctx.discount, ctx.reverse, ctx.backend = inputs
        ctx.save_for_backward(offsets)
        ctx.save_for_forward(offsets)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        return (
            _differentiable(gradient, offsets, ctx.discount, not ctx.reverse, ctx.backend),
            *(None,) * 4,
        )

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (offsets,) = ctx.saved_tensors
        return _differentiable(tangent, offsets, ctx.discount, ctx.reverse, ctx.backend)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        values: Tensor,
        offsets: Tensor | None,
        discount: float,
        reverse: bool,
        backend: str,
    ) -> tuple[Tensor, int]:
        """A batch of B scans is one scan of B·N trajectories."""
        if in_dims[1] is not None:
            raise ValueError("offsets must be the same for all of a vmap (in_dims None), got a batch of them")
        assert in_dims[0] is not None
        values = values.movedim(in_dims[0], 0)  # (B, T)
        batch, steps = values.shape
        starts = torch.arange(batch, device=values.device).unsqueeze(1) * steps  # (B, 1)
        inner = starts if offsets is None else offsets[:-1] + starts  # (B, N)
        tiled = torch.cat([inner.reshape(-1), inner.new_tensor([batch * steps])])
        scanned = _differentiable(values.reshape(-1), tiled, discount, reverse, backend)
        return scanned.reshape(batch, steps), 0


# Under torch.compile the scan is one opaque node: Dynamo does not trace autograd Functions that define `jvp`.
# The backend is chosen when the node runs, so that a context around the compiled call is honoured.
@torch.library.custom_op(
    "parl_core::scan",
    mutates_args=(),
    schema="(Tensor values, Tensor? offsets, float discount, bool reverse, str? backend) -> Tensor",
)
def _scan_op(values: Tensor, offsets: Tensor | None, discount: float, reverse: bool, backend: str | None) -> Tensor:
    return _run(values, offsets, discount, reverse, _OP.select(values, backend))


@_scan_op.register_fake
def _(values: Tensor, offsets: Tensor | None, discount: float, reverse: bool, backend: str | None) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _setup_op_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, offsets, ctx.discount, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(offsets)


def _op_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    return _scan_op(gradient, offsets, ctx.discount, not ctx.reverse, ctx.backend), *(None,) * 4


_scan_op.register_autograd(_op_backward, setup_context=_setup_op_context)


def _check_discount(discount: float) -> float:
    if isinstance(discount, Tensor):
        raise TypeError("discount must be a number, got a Tensor: the scan is not differentiated in it")
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount must lie in [0, 1], got {discount}")
    return float(discount)


def _check_tensors(name: str, values: Tensor, offsets: Tensor | None) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(values).__name__}")
    if not values.is_floating_point():
        raise TypeError(f"{name} must be of a floating-point dtype, got {values.dtype}")
    if values.dim() != 1:
        raise ValueError(f"{name} must be of shape (T,), got {tuple(values.shape)}")
    if offsets is None:
        return
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets must be a Tensor or None, got {type(offsets).__name__}")
    if offsets.dtype != torch.int64:
        raise TypeError(f"offsets must be of dtype torch.int64, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"offsets must be of shape (N+1,), got {tuple(offsets.shape)}")
    if offsets.device != values.device:
        raise ValueError(f"offsets must be on the device of {name}, {values.device}, got {offsets.device}")
