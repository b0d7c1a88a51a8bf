"""The Bradley–Terry loss of pairs of segments, each member of an ensemble having pairs of its own, and its gradient.

The pairs are rows of one table of steps, so that neither segments nor what is cropped from them need be copied.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.rewards import RewardEnsemble
from ..models.unchanged import change_of
from ..ops.ensemble_rewards import MAX_LAYERS, dense, widths
from ..ops.preference_loss import preference_loss
from ..ops.registry import Op


class PairBatch(NamedTuple):
    """B pairs for each member, by where their segments lie in a table of steps."""

    starts: Tensor
    """(members, B, 2) int64, the first row of each of the two segments."""
    lengths: Tensor
    """(members, B) int64, at least 1: how many rows each of the two has."""
    labels: Tensor
    """(members, B), in [0, 1]: the probability that the second is preferred."""
    longest: int
    """No length is greater."""
    kept: Tensor | None = None
    """(members, B) bool: only these pairs have a loss; None: all."""


class PairGradient(NamedTuple):
    """What `pair_gradient` returns."""

    loss: Tensor
    """(): the sum over the members of each one's summed cross-entropies divided by B, in nats."""
    logits: Tensor
    """(members, B), of "the second is preferred"; 0 for pairs that are not kept."""
    gradients: tuple[Tensor, ...]
    """Of the loss, in the order of `ensemble.parameters()`."""


def pair_gradient(ensemble: RewardEnsemble, steps: Tensor, batch: PairBatch) -> PairGradient:
    """Loss and gradient of a batch, where a logit is the difference of the member's rewards summed over the segments.

    Args:
        ensemble: the reward model.
        steps: (T, do + da), the table that the batch refers to.
        batch: the pairs. Those that are not kept count in the mean all the same.
    """
    name = _GRADIENT.select(next(ensemble.parameters()), None)
    result: PairGradient = _GRADIENT.kernel(name)(ensemble, steps, batch)
    return result


def pair_logits(ensemble: RewardEnsemble, steps: Tensor, starts: Tensor, length: int, *, chunk: int = 32) -> Tensor:
    """(members, B) logits of pairs `starts` (members, B, 2) of segments of `length` rows, at most `chunk` at once."""
    time = torch.arange(length, device=steps.device)
    parts = []
    with torch.no_grad():
        for some in starts.split(chunk, dim=1):
            first, second = _rewards(ensemble, steps, some[..., None] + time).sum(-1).unbind(-1)
            parts.append(second - first)
    return torch.cat(parts, dim=1)


def _rewards(ensemble: RewardEnsemble, steps: Tensor, rows: Tensor) -> Tensor:
    """The members' rewards of their own `rows` (members, …), of the same shape."""
    inputs = steps[rows.flatten(1)]
    observations, actions = inputs.split((ensemble.obs_dim, ensemble.act_dim), dim=-1)
    return ensemble.member_rewards(observations, actions).view(rows.shape)


def _reference_gradient(ensemble: RewardEnsemble, steps: Tensor, batch: PairBatch) -> PairGradient:
    """The specification: all segments are windows of `longest` rows, and a mask takes what belongs to them."""
    time = torch.arange(batch.longest, device=steps.device)
    rows = (batch.starts[..., None] + time).clamp(max=len(steps) - 1)  # (members, B, 2, longest)
    rewards = _rewards(ensemble, steps, rows)
    first, second = rewards.where(time < batch.lengths[..., None, None], 0.0).unbind(2)
    losses = preference_loss(first, second, batch.labels, reduction="none").loss
    logits = (second.sum(-1) - first.sum(-1)).detach()
    if batch.kept is not None:
        losses, logits = losses.where(batch.kept, 0.0), logits.where(batch.kept, 0.0)
    loss = losses.sum() / losses.shape[1]
    return PairGradient(loss.detach(), logits, torch.autograd.grad(loss, list(ensemble.parameters())))


def _native_gradient(ensemble: RewardEnsemble, steps: Tensor, batch: PairBatch) -> PairGradient:
    """The same, segment sums, loss and backward pass included, while a few pairs at a time stay in the cache."""
    params = list(ensemble.parameters())
    weights, biases = _plain_layers(ensemble, params)
    if not 1 <= len(weights) <= MAX_LAYERS or steps.dtype != params[0].dtype:
        return _reference_gradient(ensemble, steps, batch)
    native = importlib.import_module("parl_core._native")
    gradients = tuple(torch.empty_like(param, memory_format=torch.contiguous_format) for param in params)
    kept = torch.ones(batch.labels.shape, dtype=torch.bool) if batch.kept is None else batch.kept
    offsets = torch.zeros(len(kept) + 1, dtype=torch.int64)
    offsets[1:] = kept.sum(1).cumsum(0)
    kept_logits = steps.new_empty(int(offsets[-1]))
    loss = native.ensemble_preference_gradient(
        ensemble.num_members, dense(weights), dense(biases), widths(weights), *dense([steps]),
        batch.starts[kept], batch.lengths[kept], batch.labels[kept].to(steps.dtype), offsets, batch.labels.shape[1],
        list(gradients[::2]), list(gradients[1::2]), kept_logits, torch.get_num_threads(),
    )  # fmt: skip
    logits = steps.new_zeros(kept.shape).masked_scatter(kept, kept_logits)
    return PairGradient(torch.tensor(loss, dtype=steps.dtype), logits, gradients)


def _plain_layers(ensemble: RewardEnsemble, params: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases if a gradient for `params` is that of these alone, else none."""
    layers = ensemble.plain_layers() if type(ensemble) is RewardEnsemble else None
    if layers is None or change_of(ensemble, "the ensemble") is not None:
        return [], []
    own = [tensor for pair in zip(*layers, strict=True) for tensor in pair]
    same = len(own) == len(params) and all(one is other for one, other in zip(own, params, strict=True))
    if not same or any(not param.requires_grad or param._backward_hooks for param in params):
        return [], []
    return layers


_GRADIENT = Op("pair_gradient", _reference_gradient)
_GRADIENT.register(
    "cpp",
    lambda: _native_gradient,
    device_types=frozenset({"cpu"}),
    dtypes=frozenset({torch.float32, torch.float64}),
)
