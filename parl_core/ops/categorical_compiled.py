"""The four parts of a categorical log-probability as opaque nodes under torch.compile.

Dynamo does not trace autograd Functions that define `jvp`; the backend is chosen when a node runs, so that a context around
the compiled call is honoured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import categorical_autograd as parts
from .categorical_autograd import Compiled
from .categorical_terms import ALONG, FISHER, GRADIENT, VALUE, dtype_of_sums, run


@torch.library.custom_op(
    "parl_core::categorical_value",
    mutates_args=(),
    schema="(Tensor logits, Tensor? actions, str? backend) -> (Tensor, Tensor)",
)
def _value(logits: Tensor, actions: Tensor | None, backend: str | None) -> tuple[Tensor, Tensor]:
    return run(VALUE, VALUE.select(logits, backend), logits, actions)


@_value.register_fake
def _(logits: Tensor, actions: Tensor | None, backend: str | None) -> tuple[Tensor, Tensor]:
    steps = logits.shape[0]
    return logits.new_empty(steps), logits.new_empty(steps, dtype=dtype_of_sums(logits))


def _save_value(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, actions, ctx.backend = inputs
    ctx.save_for_backward(logits, output[1], actions)


def _pull_value(ctx: Any, cotangent: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, logsumexp, actions = ctx.saved_tensors
    return parts.gradient(logits, logsumexp, actions, cotangent, Compiled(ctx.backend)), None, None


@torch.library.custom_op(
    "parl_core::categorical_gradient",
    mutates_args=(),
    schema="(Tensor logits, Tensor logsumexp, Tensor? actions, Tensor weights, str? backend) -> Tensor",
)
def _gradient(
    logits: Tensor, logsumexp: Tensor, actions: Tensor | None, weights: Tensor, backend: str | None
) -> Tensor:
    return run(GRADIENT, GRADIENT.select(logits, backend), logits, logsumexp, actions, weights)


@_gradient.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _pull_gradient(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    pulled = parts.pull_gradient(ctx.saved_tensors, cotangent, ctx.needs_input_grad, Compiled(ctx.backend))
    by_logits, by_weights = pulled
    return by_logits, None, None, by_weights, None


@torch.library.custom_op(
    "parl_core::categorical_along",
    mutates_args=(),
    schema="(Tensor logits, Tensor? logsumexp, Tensor? actions, Tensor tangent, str? backend) -> Tensor",
)
def _along(
    logits: Tensor, logsumexp: Tensor | None, actions: Tensor | None, tangent: Tensor, backend: str | None
) -> Tensor:
    return run(ALONG, ALONG.select(logits, backend), logits, actions, tangent)


@_along.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[0])


def _pull_along(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    pulled = parts.pull_along(ctx.saved_tensors, cotangent, ctx.needs_input_grad, Compiled(ctx.backend))
    by_logits, by_tangent = pulled
    return by_logits, None, None, by_tangent, None


@torch.library.custom_op(
    "parl_core::categorical_fisher",
    mutates_args=(),
    schema=(
        "(Tensor logits, Tensor? logsumexp, Tensor? actions, Tensor tangent, Tensor? scale, str? backend) "
        "-> (Tensor, Tensor)"
    ),
)
def _fisher(
    logits: Tensor,
    logsumexp: Tensor | None,
    actions: Tensor | None,
    tangent: Tensor,
    scale: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    return run(FISHER, FISHER.select(logits, backend), logits, actions, tangent, scale)


@_fisher.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0]), torch.empty_like(logits, memory_format=torch.contiguous_format)


def _pull_fisher(ctx: Any, of_along: Tensor | None, of_image: Tensor | None) -> tuple[Tensor | None, ...]:
    via = Compiled(ctx.backend)
    by_logits, by_tangent, by_scale = parts.pull_fisher(
        ctx.saved_tensors, of_along, of_image, ctx.needs_input_grad, via
    )
    return by_logits, None, None, by_tangent, by_scale, None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


_value.register_autograd(_pull_value, setup_context=_save_value)
_gradient.register_autograd(_pull_gradient, setup_context=_save)
_along.register_autograd(_pull_along, setup_context=_save)
_fisher.register_autograd(_pull_fisher, setup_context=_save)
