"""First-order linear recurrences along trajectories, the primitive of all scans.

    forwards    y_h = x_h + c_{h−1} · y_{h−1}
    backwards   y_h = x_h + c_h · y_{h+1}

c_h links steps h and h+1 in either direction, so that the two are each other's transpose: derivatives of a
recurrence, in forward and in reverse mode, are recurrences again. c is a number (a discount) or one for every step;
that of a trajectory's last step links it to nothing and is not used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..offsets import remember_offsets
from .accelerators import BFLOAT_TO_DOUBLE, HALF_TO_DOUBLE, cuda_devices, triton_devices
from .function_rules import saved_primals
from .registry import Kernel, Op, kernel_in
from .segments import (
    ON_CPU,
    SINGLE_AND_DOUBLE,
    as_offsets,
    check_hidden_offsets,
    check_steps,
    from_time_major,
    is_differentiated,
    is_legacy_batched,
    is_traced,
    neighbour,
    plain,
    plain_offsets,
    time_major,
    unwrapped,
    vmapped_offsets,
)


def linear_recurrence(
    values: Tensor,
    coefficients: Tensor,
    offsets: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y_h = x_h + c_{h−1} · y_{h−1} along every trajectory, or x_h + c_h · y_{h+1} if `reverse`.

    c_h links step h with step h+1; the last of a trajectory is not used. Differentiable in `values` and
    `coefficients`, at any order. Blelloch, Prefix sums and their applications (1990), section 1.4.

    Args:
        values: (T,), floating point, the trajectories one after another; or (N, H), one in each row.
        coefficients: in the shape, in the dtype and on the device of `values`.
        offsets: (N+1,), int64, on the device of `values`; trajectory n is values[offsets[n]:offsets[n+1]] and may
            be empty. None: the rows, or a single trajectory.
        reverse: from the last step to the first.
        backend: see `available_backends()`; None: the innermost `with backend(…)`, or else the device's best.

    Returns:
        In the shape, in the dtype and on the device of `values`.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape or device, or offsets that do not cover the values.
        BackendError: the backend asked for cannot be used here.
    """
    check_steps(offsets, values=values, coefficients=coefficients)
    return recurrence(values, coefficients, offsets, reverse=reverse, backend=backend)


def recurrence(
    values: Tensor, coefficients: Tensor | float, offsets: Tensor | None, *, reverse: bool, backend: str | None
) -> Tensor:
    """The recurrence of arguments that are checked, but for what `offsets` hold."""
    if torch.compiler.is_compiling():
        return _call_op(values, coefficients, offsets, reverse, backend)
    return _differentiable(values, coefficients, offsets, reverse, _op_of(coefficients).select(values, backend))


def reference(values: Tensor, coefficients: Tensor | float, offsets: Tensor | None, reverse: bool) -> Tensor:
    """The specification, on any device: pad to (horizon, N), loop over time, and take the steps back out."""
    offsets = as_offsets(values, offsets)
    x = time_major(values, offsets)
    c = time_major(coefficients, offsets) if isinstance(coefficients, Tensor) else torch.full_like(x, coefficients)
    horizon, number = x.shape
    carry, rows = x.new_zeros(number), []
    for h in reversed(range(horizon)) if reverse else range(horizon):
        link = c[h] if reverse else c[h - 1]
        linked = h + 1 < offsets.diff() if reverse else torch.full((number,), h > 0, device=x.device)
        carry = x[h] + torch.where(linked, link * carry, 0)
        rows.append(carry)
    if not rows:
        return values.clone()
    return from_time_major(torch.stack(rows[::-1] if reverse else rows), offsets, values)


def _load_cpp(name: str) -> Callable[[], Kernel]:
    def load() -> Kernel:
        native = getattr(importlib.import_module("parl_core._native"), name)

        def cpp(values: Tensor, coefficients: Tensor | float, offsets: Tensor | None, reverse: bool) -> Tensor:
            out = torch.empty_like(values)
            native(values, coefficients, offsets, out, reverse, torch.get_num_threads())
            return out

        return cpp

    return load


def _load_numba(name: str) -> Callable[[], Kernel]:
    def load() -> Kernel:
        kernel: Callable[..., None] = getattr(importlib.import_module("parl_core.kernels.numba_scan"), name)

        def numba(values: Tensor, coefficients: Tensor | float, offsets: Tensor | None, reverse: bool) -> Tensor:
            out = torch.empty_like(values)
            offsets = as_offsets(values, offsets)
            c = coefficients.view(-1).numpy() if isinstance(coefficients, Tensor) else coefficients
            kernel(values.view(-1).numpy(), c, offsets.numpy(), out.view(-1).numpy(), reverse, torch.get_num_threads())
            return out

        return numba

    return load


_DISCOUNTED = Op("discounted_returns, prefix_sum", reference)
_WEIGHTED = Op("linear_recurrence", reference)
for _op, _name in ((_DISCOUNTED, "discounted_scan"), (_WEIGHTED, "linear_recurrence")):
    _op.register("numba", _load_numba(_name), device_types=ON_CPU, dtypes=SINGLE_AND_DOUBLE)
    _op.register("cpp", _load_cpp(_name), device_types=ON_CPU, dtypes=SINGLE_AND_DOUBLE)
    _op.register(
        "triton",
        kernel_in("parl_core.kernels.triton_scan", "recurrence"),
        device_types=triton_devices(),
        dtypes=HALF_TO_DOUBLE,
    )
    _op.register(
        "cuda",
        kernel_in("parl_core.ops.cuda_scans", "recurrence"),
        device_types=cuda_devices(),
        dtypes=BFLOAT_TO_DOUBLE,
    )


def _op_of(coefficients: Tensor | float) -> Op:
    return _WEIGHTED if isinstance(coefficients, Tensor) else _DISCOUNTED


def _differentiable(
    values: Tensor, coefficients: Tensor | float, offsets: Tensor | None, reverse: bool, backend: str
) -> Tensor:
    if is_differentiated(values, coefficients if isinstance(coefficients, Tensor) else None, offsets):
        return _Recurrence.apply(values, coefficients, offsets, reverse, backend)
    # Nobody differentiates: spare the bookkeeping of autograd, which takes longer than a short scan.
    return _run(values, coefficients, offsets, reverse, backend)


def _run(values: Tensor, coefficients: Tensor | float, offsets: Tensor | None, reverse: bool, backend: str) -> Tensor:
    if is_legacy_batched(values) or (isinstance(coefficients, Tensor) and is_legacy_batched(coefficients)):
        return reference(values, coefficients, offsets, reverse)
    if is_traced(values):
        return _call_op(values, coefficients, offsets, reverse, backend)
    if isinstance(coefficients, Tensor):
        coefficients = plain(coefficients)
    offsets = plain_offsets(offsets, values, backend)
    return _op_of(coefficients).kernel(backend)(plain(values), coefficients, offsets, reverse)


def _gradient_of_links(
    adjoint: Tensor, output: Tensor, coefficients: Tensor, offsets: Tensor | None, reverse: bool
) -> Tensor:
    """∂L/∂c_h: the adjoint of the step that c_h leads to, times the output of the one it comes from."""
    if reverse:
        return adjoint * neighbour(output, offsets, reverse=True)
    return neighbour(adjoint, offsets, reverse=True) * output


class _Recurrence(torch.autograd.Function):
    """The recurrence under autograd and torch.func. Its derivatives call it again: closed at any order."""

    @staticmethod
    def forward(
        values: Tensor, coefficients: Tensor | float, offsets: Tensor | None, reverse: bool, backend: str
    ) -> Tensor:
        return _run(values, coefficients, offsets, reverse, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, coefficients, offsets, ctx.reverse, ctx.backend = inputs
        weighted = isinstance(coefficients, Tensor)
        ctx.discount = None if weighted else coefficients
        saved = (offsets, coefficients, output) if weighted else (offsets, None, None)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        offsets, coefficients, output = ctx.saved_tensors
        links = ctx.discount if coefficients is None else coefficients
        adjoint = _differentiable(gradient, links, offsets, not ctx.reverse, ctx.backend)
        of_links = None
        if coefficients is not None and ctx.needs_input_grad[1]:
            of_links = _gradient_of_links(adjoint, output, coefficients, offsets, ctx.reverse)
        return adjoint, of_links, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, link_tangent: Tensor | None, *_: None) -> Tensor:
        with saved_primals(ctx) as (offsets, coefficients, output):
            links = ctx.discount if coefficients is None else coefficients
            if link_tangent is not None:
                if ctx.reverse:
                    moved = link_tangent * neighbour(output, offsets, reverse=True)
                else:
                    moved = neighbour(link_tangent * output, offsets, reverse=False)
                tangent = moved if tangent is None else tangent + moved
            assert tangent is not None
            return _differentiable(tangent, links, offsets, ctx.reverse, ctx.backend)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        values: Tensor,
        coefficients: Tensor | float,
        offsets: Tensor | None,
        reverse: bool,
        backend: str,
    ) -> tuple[Tensor, int]:
        """A batch of B recurrences is one over B times as many trajectories."""
        if in_dims[2] is not None:
            raise vmapped_offsets()
        batch = info.batch_size

        def batched(tensor: Tensor, dim: int | None) -> Tensor:
            return tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        values = batched(values, in_dims[0])
        shape, steps = values.shape, values.shape[-1]
        if isinstance(coefficients, Tensor):
            coefficients = batched(coefficients, in_dims[1])
        if offsets is not None:
            check_hidden_offsets(offsets, values)
            starts = torch.arange(batch, device=values.device).unsqueeze(1) * steps  # (B, 1)
            inner = (offsets[:-1] + starts).reshape(-1)  # (B·N,)
            offsets = torch.cat([inner, inner.new_full((1,), batch * steps)])
            remember_offsets(unwrapped(offsets), batch * steps)
        rows = (-1,) if offsets is not None else (values.numel() // max(steps, 1), steps)
        if isinstance(coefficients, Tensor):
            coefficients = coefficients.reshape(rows)
        return _differentiable(values.reshape(rows), coefficients, offsets, reverse, backend).reshape(shape), 0


# Under torch.compile the recurrence is one opaque node: Dynamo does not trace autograd Functions that define `jvp`.
# The backend is chosen when the node runs, so that a context around the compiled call is honoured.
@torch.library.custom_op(
    "parl_core::recurrence",
    mutates_args=(),
    schema="(Tensor values, Tensor? coefficients, float discount, Tensor? offsets, bool reverse, str? backend) -> Tensor",
)
def _recurrence_op(
    values: Tensor,
    coefficients: Tensor | None,
    discount: float,
    offsets: Tensor | None,
    reverse: bool,
    backend: str | None,
) -> Tensor:
    links = discount if coefficients is None else coefficients
    return _run(values, links, offsets, reverse, _op_of(links).select(values, backend))


@_recurrence_op.register_fake
def _(
    values: Tensor,
    coefficients: Tensor | None,
    discount: float,
    offsets: Tensor | None,
    reverse: bool,
    backend: str | None,
) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _call_op(
    values: Tensor, coefficients: Tensor | float, offsets: Tensor | None, reverse: bool, backend: str | None
) -> Tensor:
    if isinstance(coefficients, Tensor):
        return _recurrence_op(values, coefficients, 0.0, offsets, reverse, backend)
    return _recurrence_op(values, None, coefficients, offsets, reverse, backend)


def _setup_op_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, coefficients, ctx.discount, offsets, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(offsets, coefficients, None if coefficients is None else output)


def _op_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    offsets, coefficients, output = ctx.saved_tensors
    links = ctx.discount if coefficients is None else coefficients
    adjoint = _call_op(gradient, links, offsets, not ctx.reverse, ctx.backend)
    of_links = None
    if coefficients is not None:
        of_links = _gradient_of_links(adjoint, output, coefficients, offsets, ctx.reverse)
    return adjoint, of_links, *(None,) * 4


_recurrence_op.register_autograd(_op_backward, setup_context=_setup_op_context)
