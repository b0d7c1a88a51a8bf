"""Log-densities of diagonal Gaussians, squashed by tanh or not; differentiable at any order.

With mean μ and log standard deviation ℓ in each of da dimensions, z = (u − μ) e^{−ℓ} and a tangent (t, s) of (μ, ℓ):

    value      Σ −½ (z² + log 2π) − ℓ
    gradient   (z e^{−ℓ}, z² − 1)
    along      Σ z e^{−ℓ} t + (z² − 1) s
    Hessian    (−e^{−ℓ} (e^{−ℓ} t + 2 z s), −2 z (e^{−ℓ} t + z s))

u is the action, or atanh of a squashed one, whose density then has Σ log(1 − tanh² u) taken off (Haarnoja et al. 2018, "Soft
Actor-Critic Algorithms and Applications", appendix C). Kernels compute these four, each in one pass; the third order and
beyond are derivatives of the Hessian's formula in plain torch. Actions that are differentiated are unsquashed by torch, and
enter through u − μ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .accelerators import HALF_TO_DOUBLE, triton_devices
from .function_rules import over_batch, saved_primals
from .registry import Op, kernel_in
from .segments import is_differentiated, is_legacy_batched, is_traced, plain_rows


def gaussian_log_prob(
    actions: Tensor, mean: Tensor, log_std: Tensor, *, squash: bool = False, backend: str | None = None
) -> Tensor:
    """Log-density of every step's action, differentiable in all three tensors at any order.

    Args:
        actions: (T, da), floating point; squashed ones lie in [−1, 1], and on the boundary are moved inside by one
            rounding unit.
        mean: (T, da), before squashing.
        log_std: (T, da), or (da,) for all steps.
        squash: actions are tanh(u), u Gaussian.
        backend: see `available_backends()`; None: the innermost `with backend(…)`, or else the device's best.

    Returns:
        (T,), natural logarithms in the dtype that the arguments promote to, in which all is computed.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape or device.
        BackendError: the backend asked for cannot be used here.
    """
    _check(actions, mean, log_std)
    dtype = functools.reduce(torch.promote_types, (actions.dtype, mean.dtype, log_std.dtype))
    actions, mean, log_std = actions.to(dtype), mean.to(dtype), log_std.to(dtype)
    compiling = is_traced(mean)
    if compiling and mean.device.type not in _KERNEL_DEVICES:
        return reference(actions, mean, log_std, squash)
    chosen = None if compiling else _VALUE.select(mean, backend)
    if chosen == "reference":
        return reference(actions, mean, log_std, squash)
    value: Callable[..., Tensor] = _value if chosen is not None else _value_op
    chosen = chosen or backend
    if not (actions.requires_grad if compiling else is_differentiated(actions)):
        return _by_rows(value, actions, mean, log_std, squash, chosen)
    unsquashed = unsquash(actions, mean, squash)
    log_prob = _by_rows(value, None, mean - unsquashed, log_std, False, chosen)
    return log_prob - log_tanh_slope(unsquashed).sum(-1) if squash else log_prob


def _check(actions: Tensor, mean: Tensor, log_std: Tensor) -> None:
    for name, tensor in (("mean", mean), ("actions", actions), ("log_std", log_std)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")
        if tensor.device != mean.device:
            raise ValueError(f"{name} must be on the device of mean, {mean.device}, got {tensor.device}")
    if actions.shape != mean.shape:
        raise ValueError(f"actions must have shape (T, da) = {tuple(mean.shape)}, got {tuple(actions.shape)}")
    if log_std.shape not in (mean.shape, mean.shape[-1:]):
        raise ValueError(f"log_std must have shape (T, da) = {tuple(mean.shape)} or (da,), got {tuple(log_std.shape)}")


def log_tanh_slope(unsquashed: Tensor) -> Tensor:
    """log(1 − tanh(u)²), without the cancellation at large |u|."""
    return 2.0 * (math.log(2.0) - unsquashed - F.softplus(-2.0 * unsquashed))


def reference(actions: Tensor | None, mean: Tensor, log_std: Tensor, squash: bool) -> Tensor:
    """The specification of the value, on any device: (…, da) -> (…). Without actions u is 0."""
    unsquashed = unsquash(actions, mean, squash)
    standard = (unsquashed - mean) * torch.exp(-log_std)
    value = (-0.5 * (standard * standard + math.log(2 * math.pi)) - log_std).sum(-1)
    return value - log_tanh_slope(unsquashed).sum(-1) if squash and actions is not None else value


def reference_gradient(
    actions: Tensor | None, mean: Tensor, log_std: Tensor, squash: bool, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights (T,) -> what they pull back to the means and the log standard deviations, (T, da) each."""
    standard, inverse = _standard(actions, mean, log_std, squash)
    weights = weights.unsqueeze(-1)
    return weights * standard * inverse, weights * (standard * standard - 1.0)


def reference_along(
    actions: Tensor | None, mean: Tensor, log_std: Tensor, squash: bool, of_mean: Tensor, of_log_std: Tensor
) -> Tensor:
    """Tangents (T, da) of the means and of the log standard deviations -> that of the value (T,)."""
    standard, inverse = _standard(actions, mean, log_std, squash)
    return (standard * inverse * of_mean + (standard * standard - 1.0) * of_log_std).sum(-1)


def reference_second_order(
    actions: Tensor | None,
    mean: Tensor,
    log_std: Tensor,
    squash: bool,
    of_mean: Tensor,
    of_log_std: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference_along`, and what the Hessian, times weights (T,), makes of the tangents: (T,), (T, da), (T, da)."""
    standard, inverse = _standard(actions, mean, log_std, squash)
    scaled, weights = inverse * of_mean, weights.unsqueeze(-1)
    along = (standard * scaled + (standard * standard - 1.0) * of_log_std).sum(-1)
    by_mean = -weights * inverse * (scaled + 2.0 * standard * of_log_std)
    return along, by_mean, -2.0 * weights * standard * (scaled + standard * of_log_std)


def _standard(actions: Tensor | None, mean: Tensor, log_std: Tensor, squash: bool) -> tuple[Tensor, Tensor]:
    """z and e^{−ℓ}."""
    inverse = torch.exp(-log_std)
    return (unsquash(actions, mean, squash) - mean) * inverse, inverse


def unsquash(actions: Tensor | None, mean: Tensor, squash: bool) -> Tensor:
    """u: the actions, 0 where there are none, or atanh of squashed ones, on the boundary of those just inside."""
    if actions is None:
        return torch.zeros_like(mean)
    if not squash:
        return actions
    edge = 1.0 - torch.finfo(mean.dtype).eps
    return torch.atanh(actions.clamp(-edge, edge))


_VALUE = Op("gaussian_log_prob", reference)
_GRADIENT = Op("gaussian_log_prob, gradient", reference_gradient)
_ALONG = Op("gaussian_log_prob, along a tangent", reference_along)
_SECOND = Op("gaussian_log_prob, second order", reference_second_order)
for _op, _name in (
    (_VALUE, "log_prob"),
    (_GRADIENT, "gradient"),
    (_ALONG, "along"),
    (_SECOND, "second_order"),
):
    _op.register(
        "triton",
        kernel_in("parl_core.kernels.triton_gaussian", _name),
        device_types=triton_devices(),
        dtypes=HALF_TO_DOUBLE,
    )
_KERNEL_DEVICES = triton_devices()


def _by_rows(
    function: Callable[..., Tensor], actions: Tensor | None, mean: Tensor, log_std: Tensor, *rest: Any
) -> Tensor:
    """`function` of (T, da) tensors, for any number of leading dimensions."""
    size = mean.shape[-1]
    steps = mean.shape[:-1].numel()

    def rows(tensor: Tensor) -> Tensor:
        return tensor.expand(mean.shape).reshape(steps, size)

    value = function(None if actions is None else rows(actions), rows(mean), rows(log_std), *rest)
    return value.reshape(mean.shape[:-1])


def _run(op: Op, backend: str, tensors: tuple[Tensor | None, ...], squash: bool) -> Any:
    """The kernel on tensors that are followed by nobody: actions, means, log standard deviations, and what else it takes."""
    if any(tensor is not None and is_legacy_batched(tensor) for tensor in tensors):
        backend = "reference"
    actions, mean, log_std, *rest = (None if tensor is None else plain_rows(tensor) for tensor in tensors)
    return op.kernel(backend)(actions, mean, log_std, squash, *rest)


def _value(actions: Tensor | None, mean: Tensor, log_std: Tensor, squash: bool, backend: str) -> Tensor:
    if is_differentiated(actions, mean, log_std):
        return _Value.apply(actions, mean, log_std, squash, backend)
    return _run(_VALUE, backend, (actions, mean, log_std), squash)


def _gradient(
    actions: Tensor | None, mean: Tensor, log_std: Tensor, weights: Tensor, squash: bool, backend: str
) -> tuple[Tensor, Tensor]:
    if is_differentiated(actions, mean, log_std, weights):
        return _Gradient.apply(actions, mean, log_std, weights, squash, backend)
    return _run(_GRADIENT, backend, (actions, mean, log_std, weights), squash)


def _along(tensors: Any, tangents: tuple[Tensor, Tensor], squash: bool, backend: str) -> Tensor:
    if is_differentiated(*tensors, *tangents):
        actions, mean, log_std = tensors
        return reference_along(actions, mean, log_std, squash, *tangents)
    return _run(_ALONG, backend, (*tensors, *tangents), squash)


def _second_order(
    tensors: Any,
    tangents: tuple[Tensor, Tensor],
    weights: Tensor,
    squash: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`along`, and the Hessian's product; without a backend, and where it is differentiated further, by torch."""
    if backend is None or is_differentiated(*tensors, *tangents, weights):
        actions, mean, log_std = tensors
        return reference_second_order(actions, mean, log_std, squash, *tangents, weights)
    return _run(_SECOND, backend, (*tensors, *tangents, weights), squash)


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(actions: Tensor | None, mean: Tensor, log_std: Tensor, squash: bool, backend: str) -> Tensor:
        return _run(_VALUE, backend, (actions, mean, log_std), squash)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.squash, ctx.backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        actions, mean, log_std = ctx.saved_tensors
        pulled = _gradient(actions, mean, log_std, cotangent, ctx.squash, ctx.backend)
        return None, *pulled, None, None

    @staticmethod
    def jvp(ctx: Any, _: None, of_mean: Tensor | None, of_log_std: Tensor | None, *__: None) -> Tensor:
        tangents = _filled(of_mean, of_log_std)
        with saved_primals(ctx) as saved:
            return _along(saved, tangents, ctx.squash, ctx.backend)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return over_batch(_value, info.batch_size, in_dims, arguments)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(
        actions: Tensor | None, mean: Tensor, log_std: Tensor, weights: Tensor, squash: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        return _run(_GRADIENT, backend, (actions, mean, log_std, weights), squash)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.squash, ctx.backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, to_mean: Tensor, to_log_std: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, weights = ctx.saved_tensors
        cotangents = (to_mean, to_log_std)
        if not any(ctx.needs_input_grad[1:3]):
            return None, None, None, _along(tuple(tensors), cotangents, ctx.squash, ctx.backend), None, None
        pulled = _second_order(tuple(tensors), cotangents, weights, ctx.squash, ctx.backend)
        by_weights, by_mean, by_log_std = pulled
        return None, by_mean, by_log_std, by_weights, None, None

    @staticmethod
    def jvp(
        ctx: Any, _: None, of_mean: Tensor | None, of_log_std: Tensor | None, moved: Tensor | None, *__: None
    ) -> tuple[Tensor, Tensor]:
        parts = []
        with saved_primals(ctx) as (actions, mean, log_std, weights):
            if of_mean is not None or of_log_std is not None:
                tangents = _filled(of_mean, of_log_std)
                parts.append(_second_order((actions, mean, log_std), tangents, weights, ctx.squash, ctx.backend)[1:])
            if moved is not None:
                parts.append(_gradient(actions, mean, log_std, moved, ctx.squash, ctx.backend))
            by_mean, by_log_std = zip(*parts, strict=True)
            return sum(by_mean[1:], by_mean[0]), sum(by_log_std[1:], by_log_std[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return over_batch(_gradient, info.batch_size, in_dims, arguments)


def _filled(of_mean: Tensor | None, of_log_std: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zeros for the tangent that is missing."""
    if of_mean is None:
        assert of_log_std is not None
        return torch.zeros_like(of_log_std), of_log_std
    return of_mean, torch.zeros_like(of_mean) if of_log_std is None else of_log_std


# Under torch.compile both are opaque nodes, see `recurrence`; what lies beyond is made of torch's own operations.
@torch.library.custom_op(
    "parl_core::gaussian_log_prob",
    mutates_args=(),
    schema="(Tensor? actions, Tensor mean, Tensor log_std, bool squash, str? backend) -> Tensor",
)
def _value_op(actions: Tensor | None, mean: Tensor, log_std: Tensor, squash: bool, backend: str | None) -> Tensor:
    return _run(_VALUE, _VALUE.select(mean, backend), (actions, mean, log_std), squash)


@torch.library.custom_op(
    "parl_core::gaussian_log_prob_gradient",
    mutates_args=(),
    schema=(
        "(Tensor? actions, Tensor mean, Tensor log_std, Tensor weights, bool squash, str? backend) -> (Tensor, Tensor)"
    ),
)
def _gradient_op(
    actions: Tensor | None, mean: Tensor, log_std: Tensor, weights: Tensor, squash: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    return _run(_GRADIENT, _GRADIENT.select(mean, backend), (actions, mean, log_std, weights), squash)


@_value_op.register_fake
def _(actions: Tensor | None, mean: Tensor, *_: Any) -> Tensor:
    return mean.new_empty(mean.shape[0])


@_gradient_op.register_fake
def _(actions: Tensor | None, mean: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return mean.new_empty(mean.shape), mean.new_empty(mean.shape)


def _save_op(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.squash, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _pull_value(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    actions, mean, log_std = ctx.saved_tensors
    by_mean, by_log_std = _gradient_op(actions, mean, log_std, cotangent, ctx.squash, ctx.backend)
    return None, by_mean, by_log_std, None, None


def _pull_gradient(ctx: Any, to_mean: Tensor, to_log_std: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, weights = ctx.saved_tensors
    pulled = _second_order(tuple(tensors), (to_mean, to_log_std), weights, ctx.squash, None)
    by_weights, by_mean, by_log_std = pulled
    return None, by_mean, by_log_std, by_weights, None, None


_value_op.register_autograd(_pull_value, setup_context=_save_op)
_gradient_op.register_autograd(_pull_gradient, setup_context=_save_op)
