"""Upper-level losses U_ν: what the reward is judged by, sample by sample.

A loss turns the upper data into one value per sample and says which trajectories each sample is made of, so that the
engine can weigh their scores. Losses are minimised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..ops.preference_loss import preference_loss
from ..trajectories import PreferencePairs, Trajectories
from .modules import evaluate_reward


class UpperLoss(Protocol):
    """What `hypergradient` asks of a loss."""

    def per_sample(self, reward: nn.Module, data: Any) -> Tensor:
        """(n,) loss of each sample, differentiable in the reward's parameters."""
        ...

    def trajectories(self, data: Any) -> tuple[Trajectories, ...]:
        """The trajectories a sample consists of: one or more `Trajectories`, each with one entry per sample."""
        ...


class PreferenceLoss:
    """Cross-entropy of the labels under Bradley–Terry (1952): P(second preferred) = σ(R(second) − R(first)).

    R(τ) = Σ_h r_ν(s_h, a_h), undiscounted. Takes `PreferencePairs`.
    """

    def per_sample(self, reward: nn.Module, data: PreferencePairs) -> Tensor:
        """(M,) cross-entropy of each pair, in nats."""
        if not isinstance(data, PreferencePairs):
            raise TypeError(f"PreferenceLoss takes PreferencePairs as upper, got {type(data).__name__}")
        first, second = evaluate_reward(reward, data.first), evaluate_reward(reward, data.second)
        offsets = data.first.offsets, data.second.offsets
        return preference_loss(first, second, data.labels, *offsets, reduction="none").loss

    def trajectories(self, data: PreferencePairs) -> tuple[Trajectories, ...]:
        """Both segments of each pair: U depends on the policy through either."""
        return data.first, data.second


class TrajectoryLoss:
    """Any loss of single trajectories. Takes `Trajectories`.

    Args:
        fn: fn(reward, trajectories) -> (N,) loss of each trajectory, differentiable in the reward's parameters.
    """

    def __init__(self, fn: Callable[[nn.Module, Trajectories], Tensor]) -> None:
        if not callable(fn):
            raise TypeError(f"fn must be a callable (reward, trajectories) -> (N,), got {type(fn).__name__}")
        self.fn = fn

    def per_sample(self, reward: nn.Module, data: Trajectories) -> Tensor:
        """(N,) loss of each trajectory."""
        if not isinstance(data, Trajectories):
            raise TypeError(f"TrajectoryLoss takes Trajectories as upper, got {type(data).__name__}")
        values = self.fn(reward, data)
        if not isinstance(values, Tensor) or values.shape != (data.num_trajectories,):
            came = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"fn must return a tensor of shape (N,) = ({data.num_trajectories},), got {came}")
        return values

    def trajectories(self, data: Trajectories) -> tuple[Trajectories, ...]:
        """The trajectories themselves."""
        return (data,)


def centre(values: Tensor, weights: Tensor, is_sample: bool) -> Tensor:
    """Subtract a baseline that leaves E[(U − base) S] unchanged.

    A sample (uniform weights) gets the leave-one-out mean, which is independent of the value it is subtracted from and
    so unbiased. Given weights (an exact enumeration, or importance weights) get the weighted mean, one constant, with
    which an exact enumeration stays exact.
    """
    count = values.shape[0]
    if not is_sample:
        total = weights.sum()
        return values - torch.where(total != 0, (weights * values).sum() / total, 0.0)
    if count < 2:
        return values
    return (values - values.mean()) * (count / (count - 1))
