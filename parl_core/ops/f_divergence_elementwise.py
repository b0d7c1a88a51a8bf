"""The summands of f-divergence estimates and their derivatives, element by element, on every backend.

The derivatives of order 0, 1 and 2 are kernels; the third, and what follows, are made of the formulas of the second.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual

from .accelerators import HALF_TO_DOUBLE, triton_devices
from .f_divergence_terms import Term, jet
from .function_rules import saved_primals
from .registry import Kernel, Op, kernel_in
from .segments import ON_CPU, SINGLE_AND_DOUBLE, is_traced, plain


def reference_terms(log_ratio: Tensor, term: Term, order: int) -> Tensor:
    """The specification of the elementwise derivatives of order 0, 1 and 2, in double precision."""
    return jet(term, log_ratio.double())[order].to(log_ratio.dtype)


def _load_cpp() -> Kernel:
    native = importlib.import_module("parl_core._native").divergence_terms

    def cpp(log_ratio: Tensor, term: Term, order: int) -> Tensor:
        out = torch.empty_like(log_ratio)
        native(log_ratio, out, *term, order, torch.get_num_threads())
        return out

    return cpp


TERMS = Op("f_divergence, elementwise", reference_terms)
TERMS.register("cpp", _load_cpp, device_types=ON_CPU, dtypes=SINGLE_AND_DOUBLE)
TERMS.register(
    "triton",
    kernel_in("parl_core.kernels.triton_divergence", "divergence_terms"),
    device_types=triton_devices(),
    dtypes=HALF_TO_DOUBLE,
)


def terms(log_ratio: Tensor, term: Term, order: int, backend: str | None) -> Tensor:
    """The derivative of `order` 0, 1 or 2 of the summand at every log-ratio, differentiable at any order."""
    differentiated = torch.is_grad_enabled() and log_ratio.requires_grad
    if differentiated or torch.compiler.is_compiling() or is_transformed(log_ratio):
        if torch.compiler.is_compiling():
            return _terms_op(log_ratio, *term, order, backend)
        return _Terms.apply(log_ratio, term, order, backend)
    return _run_terms(log_ratio, term, order, backend)


def _run_terms(log_ratio: Tensor, term: Term, order: int, backend: str | None) -> Tensor:
    if is_traced(log_ratio):
        return _terms_op(log_ratio, *term, order, backend)
    flat = plain(log_ratio).reshape(-1)
    return TERMS.kernel(TERMS.select(flat, backend))(flat, term, order).reshape(log_ratio.shape)


def _third(log_ratio: Tensor, term: Term) -> Tensor:
    """The third derivative, by the formulas of the second; differentiable at any order."""
    pullback = torch.func.vjp(lambda r: jet(term, r)[2], log_ratio)[1]
    return pullback(torch.ones_like(log_ratio))[0]


def _next(ctx: Any, log_ratio: Tensor) -> Tensor:
    """The derivative after that of a node of the graph."""
    return terms(log_ratio, ctx.term, ctx.order + 1, ctx.backend) if ctx.order < 2 else _third(log_ratio, ctx.term)


class _Terms(torch.autograd.Function):
    """A derivative of the summand; its own derivative is the next one."""

    @staticmethod
    def forward(log_ratio: Tensor, term: Term, order: int, backend: str | None) -> Tensor:
        return _run_terms(log_ratio, term, order, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        log_ratio, ctx.term, ctx.order, ctx.backend = inputs
        ctx.save_for_backward(log_ratio)
        ctx.save_for_forward(log_ratio)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        (log_ratio,) = ctx.saved_tensors
        return cotangent * _next(ctx, log_ratio), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        with saved_primals(ctx) as (log_ratio,):
            return tangent * _next(ctx, log_ratio)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], log_ratio: Tensor, term: Term, order: int, backend: str | None
    ) -> tuple[Tensor, int | None]:
        return terms(log_ratio, term, order, backend), in_dims[0]


# Under torch.compile the derivatives are opaque nodes, see `recurrence`.
@torch.library.custom_op(
    "parl_core::f_divergence_terms",
    mutates_args=(),
    schema=(
        "(Tensor log_ratio, str function, bool flipped, bool over_ratio, float alpha, int order, str? backend) -> Tensor"
    ),
)
def _terms_op(
    log_ratio: Tensor,
    function: str,
    flipped: bool,
    over_ratio: bool,
    alpha: float,
    order: int,
    backend: str | None,
) -> Tensor:
    return _run_terms(log_ratio, Term(function, flipped, over_ratio, alpha), order, backend)


@_terms_op.register_fake
def _(log_ratio: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(log_ratio, memory_format=torch.contiguous_format)


def _setup_op_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    log_ratio, *term, ctx.order, ctx.backend = inputs
    ctx.term = Term(*term)
    ctx.save_for_backward(log_ratio)


def _op_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    (log_ratio,) = ctx.saved_tensors
    if ctx.order == 2:
        return cotangent * _third(log_ratio, ctx.term), *(None,) * 6
    return cotangent * _terms_op(log_ratio, *ctx.term, ctx.order + 1, ctx.backend), *(None,) * 6


_terms_op.register_autograd(_op_backward, setup_context=_setup_op_context)


def is_transformed(*tensors: Tensor | None) -> bool:
    return any(
        is_functorch_wrapped_tensor(tensor) or unpack_dual(tensor).tangent is not None
        for tensor in tensors
        if tensor is not None
    )
