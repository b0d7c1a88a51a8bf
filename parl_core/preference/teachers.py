"""Scripted teachers: they label segments by the environment's own reward, which the learner does not see.

The six of B-Pref (Lee, Smith, Dragan and Abbeel, "B-Pref: Benchmarking Preference-Based Reinforcement Learning", NeurIPS
Datasets and Benchmarks 2021) are one teacher with different numbers. For segments with true returns R₀ and R₁, undiscounted,
and G₀ and G₁ with the step t of H weighted by γ^(H−1−t):

1. Skip: no answer unless one of R₀, R₁ exceeds the skip threshold. (Without a threshold above 0 nothing is skipped.)
2. Answer: the second segment is preferred if G₁ > G₀ (rational), or with probability σ(β(G₁ − G₀)).
3. Mistake: the answer is turned round with a fixed probability.
4. Equal: both are equally good, whatever was answered, if |R₁ − R₀| is below the equal threshold.

Thresholds are a share ε of what an average segment returns of late, m = mean(last 10 episode returns)·H/T. Before the first
episode has ended they are 0.

Where this departs from B-Pref's code, `bpref_compat=True` follows the code:

1. There the share multiplies once more from the second session on: the thresholds become ε²·m.
2. There an exact tie of a rational teacher is answered with the first segment. Here it is no preference: 0.5.
3. There the mean of the last 10 returns begins with a return of 0 before the first episode.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, NonFiniteError

if TYPE_CHECKING:
    from ..rl.rollout import Segments

RECENT_EPISODES = 10


@dataclass(frozen=True)
class TeacherConfig:
    """What a scripted teacher's answers depend on."""

    beta: float = -1.0
    """Rationality β: the second segment is preferred with probability σ(β·difference of returns); −1 for always the
    better one."""
    discount: float = 1.0
    """Weight γ of myopia: a step that lies k steps before the segment's last one counts γᵏ."""
    mistake: float = 0.0
    """Probability of the wrong answer."""
    skip: float = 0.0
    """Pairs are not judged if neither segment returns more than this share of what an average segment returns."""
    equal: float = 0.0
    """Pairs are equally good if they differ by less than this share of what an average segment returns."""

    def validate(self) -> None:
        """Refuse what no teacher can be.

        Raises:
            ConfigError: one sentence that names the field.
        """
        if self.beta != -1 and not 0 < self.beta < math.inf:
            raise ConfigError(f"teacher.beta must be finite and above 0, or -1 for a rational teacher, got {self.beta}")
        for name, number in (("discount", self.discount), ("mistake", self.mistake)):
            if not 0 <= number <= 1:
                raise ConfigError(f"teacher.{name} must lie in [0, 1], got {number}")
        for name, number in (("skip", self.skip), ("equal", self.equal)):
            if not 0 <= number < math.inf:
                raise ConfigError(f"teacher.{name} must be finite and at least 0, got {number}")


TEACHERS = {
    "oracle": TeacherConfig(),
    "mistake": TeacherConfig(mistake=0.1),
    "noisy": TeacherConfig(beta=1.0),
    "skip": TeacherConfig(skip=0.1),
    "equal": TeacherConfig(equal=0.1),
    "myopic": TeacherConfig(discount=0.9),
}
"""The teachers of B-Pref, with its numbers."""


class ScriptedTeacher:
    """A `LabelSource` that judges by the true rewards.

    Args:
        config: what its answers depend on.
        segment_length: steps H of a segment that it judges.
        horizon: steps T of a full episode.
        generator: of its noise and its mistakes.
        bpref_compat: whether to follow B-Pref's code where the module's docstring lists a difference.
    """

    def __init__(
        self,
        config: TeacherConfig,
        *,
        segment_length: int,
        horizon: int,
        generator: torch.Generator,
        bpref_compat: bool = False,
    ) -> None:
        config.validate()
        if segment_length < 1 or horizon < 1:
            raise ValueError(f"segment_length and horizon must be at least 1, got {segment_length} and {horizon}")
        self.config, self.segment_length, self.horizon = config, segment_length, horizon
        self.bpref_compat = bpref_compat
        self._generator = generator
        self._returns = deque([0.0] if bpref_compat else [], maxlen=RECENT_EPISODES)
        self._asked_before = False
        steps_to_end = torch.arange(segment_length - 1, -1, -1, dtype=torch.float64)
        self._weights = torch.tensor(config.discount, dtype=torch.float64) ** steps_to_end

    def label(self, first: Segments, second: Segments) -> Tensor:
        """Judge M pairs by their true rewards: (M,) float32, P(second preferred), 0.5 if equal and NaN if skipped.

        One call counts as one session: `bpref_compat` tells the first from the later ones.

        Raises:
            ValueError: not M pairs of segments of `segment_length` steps.
            NonFiniteError: a NaN or an infinity among the true rewards.
        """
        rewards = self._checked_rewards(first, second)
        returns = rewards.sum(-1)
        labels = self._answers((rewards * self._weights).sum(-1))
        if self.config.mistake > 0:
            labels = torch.where(self._uniforms(labels) < self.config.mistake, 1 - labels, labels)
        labels[(returns[1] - returns[0]).abs() < self._threshold(self.config.equal)] = 0.5
        skip_threshold = self._threshold(self.config.skip)
        if skip_threshold > 0:
            labels[returns.amax(0) <= skip_threshold] = torch.nan
        self._asked_before = True
        return labels.float()

    def episode_ended(self, true_return: float, length: int) -> None:
        """Count a finished episode in the thresholds.

        Raises:
            NonFiniteError: the return is NaN or infinite.
        """
        if not math.isfinite(true_return):
            raise NonFiniteError(f"true_return must be finite, got {true_return} for an episode of {length} steps")
        self._returns.append(float(true_return))

    def state_dict(self) -> dict[str, Any]:
        """What an identical continuation needs besides the constructor's arguments."""
        return {
            "returns": list(self._returns),
            "asked_before": self._asked_before,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, from a teacher of the same arguments."""
        self._returns = deque(state["returns"], maxlen=RECENT_EPISODES)
        self._asked_before = bool(state["asked_before"])
        self._generator.set_state(state["generator"])

    def _answers(self, weighted: Tensor) -> Tensor:
        """Weighted returns (2, M) -> labels (M,) before mistakes."""
        difference = weighted[1] - weighted[0]
        if self.config.beta > 0:
            return (self._uniforms(difference) < torch.sigmoid(self.config.beta * difference)).double()
        if self.bpref_compat:
            return (difference > 0).double()
        return 0.5 + 0.5 * difference.sign()

    def _threshold(self, share: float) -> float:
        if not self._returns:
            return 0.0
        average_segment = statistics.fmean(self._returns) * self.segment_length / self.horizon
        if self.bpref_compat and self._asked_before:
            share *= share
        return share * average_segment

    def _uniforms(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self._generator, dtype=torch.float64)

    def _checked_rewards(self, first: Segments, second: Segments) -> Tensor:
        """True rewards of both segments, (2, M, H) float64."""
        shapes = tuple(first.true_rewards.shape), tuple(second.true_rewards.shape)
        if shapes[0] != shapes[1] or shapes[0][1:] != (self.segment_length,):
            raise ValueError(
                f"first.true_rewards and second.true_rewards must both have shape (M, {self.segment_length}), "
                f"got {shapes[0]} and {shapes[1]}"
            )
        for name, segments in (("first", first), ("second", second)):
            if not torch.isfinite(segments.true_rewards).all():
                raise NonFiniteError(f"{name}.true_rewards must be finite, got a NaN or an infinity")
        return torch.stack((first.true_rewards, second.true_rewards)).double()
