"""Scripted teachers: they label segments by the environment's own reward, which the learner does not see."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NonFiniteError


class OracleTeacher:
    """Always prefers the segment with the higher undiscounted true return; an exact tie is no preference."""

    def label(self, first_true_rewards: Tensor, second_true_rewards: Tensor) -> Tensor:
        """True rewards of M pairs of segments (M, L), (M, L) -> labels (M,) float32.

        A label is the probability that the *second* segment is preferred: 1, 0, or 0.5 for a tie.

        Raises:
            NonFiniteError: a NaN or an infinity among the rewards.
        """
        if first_true_rewards.dim() != 2 or first_true_rewards.shape != second_true_rewards.shape:
            raise ValueError(
                "first_true_rewards and second_true_rewards must both have shape (M, L), got "
                f"{tuple(first_true_rewards.shape)} and {tuple(second_true_rewards.shape)}"
            )
        for name, rewards in (("first", first_true_rewards), ("second", second_true_rewards)):
            if not torch.isfinite(rewards).all():
                raise NonFiniteError(f"{name}_true_rewards must be finite, got a NaN or an infinity")
        margin = second_true_rewards.double().sum(1) - first_true_rewards.double().sum(1)
        return (0.5 + 0.5 * margin.sign()).float()
