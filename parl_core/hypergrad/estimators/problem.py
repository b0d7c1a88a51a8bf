"""The data of one hypergradient, and the three products that every estimator is made of.

    b = E[(U − base) S(τ)]                       `rhs`
    Cᵀw = ∇_ν E[Σ_h γ^h r_ν(s_h, a_h) S_{0:h}·w]   `cross_term`
    ∂V/∂ν = ∇_ν E[Σ_h γ^h r_ν(s_h, a_h)]           `value_gradient`

The first, and the direct term, take other weights of the samples in place of their own: they are linear in them, which is
what error estimates need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import prefix_sum
from ...trajectories import Trajectories, require_finite
from ..captured import CapturedPolicy, CapturedReward
from ..linearize import Linearization
from ..losses import centre
from ..modules import evaluate_reward, reward_values

Baseline = bool | Callable[[Trajectories], Tensor]


@dataclass
class Problem:
    """What a call of `hypergradient` is about."""

    policy: CapturedPolicy
    reward: CapturedReward
    discount: float
    losses: Tensor  # (n,) U of each sample, with its graph
    weights: Tensor  # (n,) of the samples
    is_sample: bool
    parts: tuple[Trajectories, ...]  # the trajectories each sample consists of, n in each
    lower: Trajectories  # for H
    cross: Trajectories  # for C
    baseline: Baseline
    chunk_steps: int | None
    keep_graph: bool  # of the losses, for direct terms with other weights

    def __post_init__(self) -> None:
        self._linearized: dict[int, tuple[Trajectories, Linearization]] = {}
        self._direct: Tensor | None = None
        self._cross_rewards: Tensor | None = None  # with its graph, if the reward is seen whole

    def linearize(self, trajectories: Trajectories) -> Linearization:
        """The policy's linearization on some trajectories; made once for each."""
        if id(trajectories) not in self._linearized:
            # The trajectories are kept as well, so that their id stays theirs.
            made = Linearization(self.policy, trajectories, self.chunk_steps)
            self._linearized[id(trajectories)] = (trajectories, made)
        return self._linearized[id(trajectories)][1]

    def with_policy(self, policy: CapturedPolicy, reweigh: Callable[[Trajectories], Tensor]) -> Problem:
        """The same data under another policy; `reweigh` gives the (N,) density ratios of trajectories."""
        ratio = torch.ones_like(self.weights)
        for part in self.parts:
            ratio = ratio * reweigh(part)
        lower = self.lower.with_weights(self.lower.weights * reweigh(self.lower))
        cross = self.cross.with_weights(self.cross.weights * reweigh(self.cross))
        return dataclasses.replace(
            self,
            policy=policy,
            weights=self.weights * ratio,
            is_sample=False,
            lower=lower,
            cross=lower if self.cross is self.lower else cross,
        )

    def fold(self, upper: Tensor, lower: Tensor, cross: Tensor) -> Problem:
        """A part of the data, by the numbers of the samples and of the trajectories."""
        return dataclasses.replace(
            self,
            losses=self.losses[upper],
            weights=torch.full_like(self.weights[upper], 1.0 / max(upper.numel(), 1)),
            parts=tuple(part.select(upper) for part in self.parts),
            lower=self.lower.select(lower),
            cross=self.cross.select(cross),
        )

    def direct(self, weights: Tensor | None = None) -> Tensor:
        """(R,) Σ weight · ∇_ν U."""
        if weights is None and self._direct is not None:
            return self._direct
        given = self.weights if weights is None else weights
        found = self.reward.gradient([self.losses], [given], retain_graph=self.keep_graph)
        if weights is None:
            self._direct = found
        return found

    def score_weights(self, weights: Tensor | None = None) -> list[tuple[Trajectories, Tensor]]:
        """For each part, weight · (U − base) at each of its steps (T,): what its scores are summed with in b."""
        weights = self.weights if weights is None else weights
        gains = weights * self._centred_losses()
        found = []
        for part in self.parts:
            index = part.trajectory_index
            steps = gains[index]
            if callable(self.baseline):
                steps = steps - weights[index] * self._step_baseline(part)
            found.append((part, steps))
        return found

    def rhs(self) -> Tensor:
        """(P,) b."""
        return self._weighted_scores(self.score_weights())

    def rhs_noise(self, signs: Tensor) -> Tensor:
        """(P,) Σ_i sign_i · (what sample i moves b by, to first order), for signed weights (n,).

        With the mean loss as baseline that is a covariance: (U_i − mean U)(S_i − mean S).
        """
        if self.baseline is not True:
            return self._weighted_scores(self.score_weights(signs))
        moved = signs * self._centred_losses()
        moved = moved - self.weights * moved.sum() / self.weights.sum()
        return self._weighted_scores([(part, moved[part.trajectory_index]) for part in self.parts])

    def _centred_losses(self) -> Tensor:
        losses = self.losses.detach()
        return centre(losses, self.weights, self.is_sample) if self.baseline is True else losses

    def _weighted_scores(self, weights: list[tuple[Trajectories, Tensor]]) -> Tensor:
        return torch.stack([self.linearize(part).vjp(steps) for part, steps in weights]).sum(0)

    def responses(self, direction: Tensor) -> Tensor:
        """(T,) S_{0:h}·direction on the cross trajectories."""
        return prefix_sum(self.linearize(self.cross).jvp(direction), self.cross.offsets)

    def cross_term(self, direction: Tensor) -> Tensor:
        """(R,) Cᵀ·direction, (P,) -> (R,).

        Unless baselines are off, S_{0:h} is taken less its mean over the trajectories: E[S_{0:h}] = 0, so the mean only
        carries noise, Σ γ^h ∇r times it. A trajectory that has ended keeps its last S in the mean (a stopped martingale
        has mean zero too); a sample leaves the trajectory itself out, which keeps the cross term unbiased.
        """
        responses = self.responses(direction)
        if self.baseline:
            responses = responses - _mean_of_others(responses, self.cross)
        return self._reward_gradient(self.cross, self.cross.weights, responses)

    def cross_noise(self, direction: Tensor, signs: Tensor) -> Tensor:
        """(R,) Σ_i sign_i · (what trajectory i moves `cross_term` by, to first order), for signed weights (N,).

        In the centred term that is through its own S and through the mean that the others are taken less.
        """
        responses = self.responses(direction)
        if not self.baseline:
            return self._reward_gradient(self.cross, signs, responses)
        cross = self.cross
        mean = _sums_at_each_time(responses, cross, cross.weights) / cross.weights.sum()
        moved = _sums_at_each_time(responses, cross, signs)
        own = self._reward_gradient(cross, signs, responses - mean)
        return own - self._reward_gradient(cross, cross.weights, moved)

    def value_gradient(self, trajectories: Trajectories) -> Tensor:
        """(R,) ∂V/∂ν at the policy that the trajectories are from."""
        return self._reward_gradient(trajectories, trajectories.weights, torch.ones_like(trajectories.step_weights))

    def rewards(self, trajectories: Trajectories) -> Tensor:
        """(T,) r_ν(s_t, a_t), without a graph."""
        if trajectories is self.cross and self.chunk_steps is None:
            return self._graph_of_cross().detach()
        return self.reward.run(reward_values, trajectories, chunk_steps=self.chunk_steps)

    def reward_gradient(self, trajectories: Trajectories, coefficients: Tensor) -> Tensor:
        """(R,) ∇_ν Σ_t coefficient_t · r_ν(s_t, a_t)."""
        if trajectories is self.cross and self.chunk_steps is None:
            return self.reward.gradient([self._graph_of_cross()], [coefficients], retain_graph=True)
        return self.reward.vjp(trajectories, coefficients, chunk_steps=self.chunk_steps)

    def _graph_of_cross(self) -> Tensor:
        """(T,) the rewards of the cross trajectories: often those of `lower`, so that one forward pass serves H and C."""
        if self._cross_rewards is None:
            self._cross_rewards = self.reward.run(evaluate_reward, self.cross)
        return self._cross_rewards

    def discounts(self, trajectories: Trajectories) -> Tensor:
        """(T,) γ^h."""
        return self.discount ** trajectories.time.to(self.losses.dtype)

    def _reward_gradient(self, trajectories: Trajectories, weights: Tensor, factors: Tensor) -> Tensor:
        """(R,) Σ_i weight_i Σ_h γ^h factor_h ∇_ν r_h."""
        steps = weights[trajectories.trajectory_index] * self.discounts(trajectories) * factors
        return self.reward_gradient(trajectories, steps)

    def _step_baseline(self, part: Trajectories) -> Tensor:
        assert callable(self.baseline)
        given = self.baseline(part)
        if not isinstance(given, Tensor) or given.shape != (part.num_steps,):
            came = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"baseline(trajectories) must return shape (T,) = ({part.num_steps},), got {came}")
        require_finite("baseline(trajectories)", given.detach())
        return given.detach().to(self.losses.dtype)


def _mean_of_others(values: Tensor, trajectories: Trajectories) -> Tensor:
    """(T,) at each step, the mean over trajectories of their value at that time, or of their last one if they ended."""
    if not trajectories.is_sample:
        return _sums_at_each_time(values, trajectories, trajectories.weights) / trajectories.weights.sum()
    number = trajectories.num_trajectories
    if number < 2:
        return torch.zeros_like(values)
    return (_sums_at_each_time(values, trajectories, torch.ones_like(trajectories.weights)) - values) / (number - 1)


def _sums_at_each_time(values: Tensor, trajectories: Trajectories, weights: Tensor) -> Tensor:
    """(T,) at each step, Σ_i weight_i · (trajectory i's value at that time, or its last one if it has ended)."""
    lengths, index, time = trajectories.lengths, trajectories.trajectory_index, trajectories.time
    horizon = trajectories.horizon
    weighted = weights[index] * values
    running = values.new_zeros(horizon).index_add(0, time, weighted)
    at_the_end = torch.where(time == lengths[index] - 1, weighted, 0.0)
    ended = values.new_zeros(horizon + 1).index_add(0, lengths[index], at_the_end)
    return (running + ended[:horizon].cumsum(0))[time]
