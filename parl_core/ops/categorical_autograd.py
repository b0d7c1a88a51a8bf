"""The four parts of a categorical log-probability under autograd, torch.func and torch.compile.

Each is differentiated by the others, so that derivatives of any order are computed by their kernels:

    value       in x: gradient
    gradient    in x and w at once: fisher, which finds what is along the tangent on its way
    along       in x: fisher; in t: gradient
    fisher      in t: fisher; in x: (d/dx F t)·u = F ((t − p·t) ⊙ (u − p·u))

At first and second order nothing of size (T, V) is made but what is asked for. `logsumexp`, kept from the value to spare the
gradient a pass, is not an input that is differentiated: what it owes to the logits is part of the derivatives in these.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .categorical_terms import ALONG, FISHER, GRADIENT, VALUE, run
from .function_rules import over_batch, saved_primals
from .segments import is_differentiated


class Compiled(NamedTuple):
    """Through torch.compile: as opaque nodes of its graph, which choose the backend when they run."""

    backend: str | None


Via = str | Compiled
"""How a part is computed: by the backend of this name, or as a node of a graph."""


def value(logits: Tensor, actions: Tensor | None, via: Via) -> tuple[Tensor, Tensor]:
    """The value (T,), and log Σ eˣ (T,) in at least float32."""
    if isinstance(via, Compiled):
        return torch.ops.parl_core.categorical_value(logits, actions, via.backend)
    if is_differentiated(logits, actions):
        return _Value.apply(logits, actions, via)
    return run(VALUE, via, logits, actions)


def gradient(logits: Tensor, logsumexp: Tensor | None, actions: Tensor | None, weights: Tensor, via: Via) -> Tensor:
    """w (e_a − p): (T, V)."""
    if logsumexp is None:
        logsumexp = value(logits, None, via)[1]
    if isinstance(via, Compiled):
        return torch.ops.parl_core.categorical_gradient(logits, logsumexp, actions, weights, via.backend)
    if is_differentiated(logits, logsumexp, actions, weights):
        return _Gradient.apply(logits, logsumexp, actions, weights, via)
    return run(GRADIENT, via, logits, logsumexp, actions, weights)


def along(logits: Tensor, logsumexp: Tensor | None, actions: Tensor | None, tangent: Tensor, via: Via) -> Tensor:
    """t_a − p·t: (T,)."""
    if isinstance(via, Compiled):
        return torch.ops.parl_core.categorical_along(logits, logsumexp, actions, tangent, via.backend)
    if is_differentiated(logits, logsumexp, actions, tangent):
        return _Along.apply(logits, logsumexp, actions, tangent, via)
    return run(ALONG, via, logits, actions, tangent)


def fisher(
    logits: Tensor,
    logsumexp: Tensor | None,
    actions: Tensor | None,
    tangent: Tensor,
    scale: Tensor | None,
    via: Via,
) -> tuple[Tensor, Tensor]:
    """t_a − p·t (T,) and s F t (T, V)."""
    if isinstance(via, Compiled):
        return torch.ops.parl_core.categorical_fisher(logits, logsumexp, actions, tangent, scale, via.backend)
    if is_differentiated(logits, logsumexp, actions, tangent, scale):
        return _Fisher.apply(logits, logsumexp, actions, tangent, scale, via)
    return run(FISHER, via, logits, actions, tangent, scale)


def _covariance(logits: Tensor, first: Tensor, second: Tensor, via: Via) -> Tensor:
    """(T,): second·F first."""
    return (second * fisher(logits, None, None, first, None, via)[1]).sum(-1)


def _bend(logits: Tensor, first: Tensor, second: Tensor, via: Via) -> Tensor:
    """(T, V): the z of (d/dx F first)·second = F z."""
    means = (along(logits, None, None, tensor, via).unsqueeze(-1) for tensor in (first, second))  # −p·t
    return (first + next(means)) * (second + next(means))


def pull_gradient(saved: Any, cotangent: Tensor, wanted: Any, via: Via) -> tuple[Tensor | None, Tensor | None]:
    """What a cotangent (T, V) of the gradient is to the logits and to the weights."""
    logits, logsumexp, actions, weights = saved
    if not wanted[0]:
        return None, along(logits, logsumexp, actions, cotangent, via)
    by_weights, by_logits = fisher(logits, logsumexp, actions, cotangent, -weights, via)
    return by_logits, by_weights


def pull_along(saved: Any, cotangent: Tensor, wanted: Any, via: Via) -> tuple[Tensor | None, Tensor | None]:
    """What a cotangent (T,) of what is along a tangent is to the logits and to the tangent."""
    logits, logsumexp, actions, tangent = saved
    by_logits = fisher(logits, logsumexp, None, tangent, -cotangent, via)[1] if wanted[0] else None
    return by_logits, gradient(logits, logsumexp, actions, cotangent, via) if wanted[3] else None


def pull_fisher(
    saved: Any, of_along: Tensor | None, of_image: Tensor | None, wanted: Any, via: Via
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What cotangents (T,) and (T, V) of the two results are to the logits, to the tangent and to the scale."""
    logits, logsumexp, actions, tangent, scale = saved
    by_logits = by_tangent = by_scale = None
    if of_along is not None:
        by_logits, by_tangent = pull_along((logits, logsumexp, actions, tangent), of_along, wanted, via)
    if of_image is not None:
        if wanted[0]:
            bent = fisher(logits, logsumexp, None, _bend(logits, tangent, of_image, via), scale, via)[1]
            by_logits = bent if by_logits is None else by_logits + bent
        if wanted[3]:
            moved = fisher(logits, logsumexp, None, of_image, scale, via)[1]
            by_tangent = moved if by_tangent is None else by_tangent + moved
        if wanted[4]:
            by_scale = _covariance(logits, tangent, of_image, via)
    return by_logits, by_tangent, by_scale


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, actions: Tensor | None, via: str) -> tuple[Tensor, Tensor]:
        return run(VALUE, via, logits, actions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, actions, ctx.via = inputs
        ctx.mark_non_differentiable(output[1])
        _save(ctx, logits, output[1], actions)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: None) -> tuple[Tensor | None, ...]:
        logits, logsumexp, actions = ctx.saved_tensors
        return gradient(logits, logsumexp, actions, cotangent, ctx.via), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, None]:
        with saved_primals(ctx) as (logits, logsumexp, actions):
            return along(logits, logsumexp, actions, tangent, ctx.via), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return over_batch(value, info.batch_size, in_dims, arguments)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, logsumexp: Tensor, actions: Tensor | None, weights: Tensor, via: str) -> Tensor:
        return run(GRADIENT, via, logits, logsumexp, actions, weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.via = inputs
        _save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        by_logits, by_weights = pull_gradient(ctx.saved_tensors, cotangent, ctx.needs_input_grad, ctx.via)
        return by_logits, None, None, by_weights, None

    @staticmethod
    def jvp(ctx: Any, u: Tensor | None, _: None, __: None, moved: Tensor | None, ___: None) -> Tensor:
        parts = []
        with saved_primals(ctx) as (logits, logsumexp, actions, weights):
            if u is not None:
                parts.append(fisher(logits, logsumexp, None, u, -weights, ctx.via)[1])
            if moved is not None:
                parts.append(gradient(logits, logsumexp, actions, moved, ctx.via))
            return _sum(parts)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return over_batch(gradient, info.batch_size, in_dims, arguments)


class _Along(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, logsumexp: Tensor | None, actions: Tensor | None, tangent: Tensor, via: str) -> Tensor:
        return run(ALONG, via, logits, actions, tangent)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.via = inputs
        _save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        by_logits, by_tangent = pull_along(ctx.saved_tensors, cotangent, ctx.needs_input_grad, ctx.via)
        return by_logits, None, None, by_tangent, None

    @staticmethod
    def jvp(ctx: Any, u: Tensor | None, _: None, __: None, moved: Tensor | None, ___: None) -> Tensor:
        parts = []
        with saved_primals(ctx) as (logits, logsumexp, actions, tangent):
            if u is not None:
                parts.append(-_covariance(logits, tangent, u, ctx.via))
            if moved is not None:
                parts.append(along(logits, logsumexp, actions, moved, ctx.via))
            return _sum(parts)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return over_batch(along, info.batch_size, in_dims, arguments)


class _Fisher(torch.autograd.Function):
    @staticmethod
    def forward(
        logits: Tensor,
        logsumexp: Tensor | None,
        actions: Tensor | None,
        tangent: Tensor,
        scale: Tensor | None,
        via: str,
    ) -> tuple[Tensor, Tensor]:
        return run(FISHER, via, logits, actions, tangent, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.via = inputs
        ctx.set_materialize_grads(False)
        _save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, of_along: Tensor | None, of_image: Tensor | None) -> tuple[Tensor | None, ...]:
        pulled = pull_fisher(ctx.saved_tensors, of_along, of_image, ctx.needs_input_grad, ctx.via)
        by_logits, by_tangent, by_scale = pulled
        return by_logits, None, None, by_tangent, by_scale, None

    @staticmethod
    def jvp(
        ctx: Any, u: Tensor | None, _: None, __: None, moved: Tensor | None, scaled: Tensor | None, ___: None
    ) -> tuple[Tensor, Tensor]:
        alongs, images = [], []
        with saved_primals(ctx) as (logits, logsumexp, actions, tangent, scale):
            if u is not None:
                alongs.append(-_covariance(logits, tangent, u, ctx.via))
                images.append(fisher(logits, logsumexp, None, _bend(logits, tangent, u, ctx.via), scale, ctx.via)[1])
            if moved is not None:
                by_tangent = fisher(logits, logsumexp, actions, moved, scale, ctx.via)
                alongs.append(by_tangent[0])
                images.append(by_tangent[1])
            if scaled is not None:
                images.append(fisher(logits, logsumexp, None, tangent, scaled, ctx.via)[1])
            return _sum(alongs) if alongs else torch.zeros_like(images[0][:, 0]), _sum(images)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return over_batch(fisher, info.batch_size, in_dims, arguments)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _sum(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)
