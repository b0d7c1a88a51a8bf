"""The data of one hypergradient, and the three products that every estimator is made of.

    b = E[(U − base) S(τ)]                       `rhs`
    Cᵀw = ∇_ν E[Σ_h γ^h r_ν(s_h, a_h) S_{0:h}·w]   `cross_term`
    ∂V/∂ν = ∇_ν E[Σ_h γ^h r_ν(s_h, a_h)]           `value_gradient`

Each takes other weights of the samples in place of their own: it is linear in them, which is what cross-fitting and error
estimates need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...ops import prefix_sum
from ...trajectories import Trajectories, require_finite
from ..flat import flat_grad
from ..linearize import Linearization, linearize
from ..losses import centre
from ..modules import reward_vjp

Baseline = bool | Callable[[Trajectories], Tensor]


@dataclass
class Problem:
    """What a call of `hypergradient` is about."""

    policy: nn.Module
    reward: nn.Module
    reward_params: list[nn.Parameter]
    discount: float
    losses: Tensor  # (n,) U of each sample, with its graph
    weights: Tensor  # (n,) of the samples
    is_sample: bool
    parts: tuple[Trajectories, ...]  # the trajectories each sample consists of, n in each
    lower: Trajectories  # for H
    cross: Trajectories  # for C
    baseline: Baseline
    chunk_steps: int | None

    def __post_init__(self) -> None:
        self._linearized: dict[int, tuple[Trajectories, Linearization]] = {}

    def linearize(self, trajectories: Trajectories) -> Linearization:
        """The policy's linearization on some trajectories; made once for each."""
        if id(trajectories) not in self._linearized:
            # The trajectories are kept as well, so that their id stays theirs.
            made = linearize(self.policy, trajectories, chunk_steps=self.chunk_steps)
            self._linearized[id(trajectories)] = (trajectories, made)
        return self._linearized[id(trajectories)][1]

    def with_policy(self, policy: nn.Module, reweigh: Callable[[Trajectories], Tensor]) -> Problem:
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
        weights = self.weights if weights is None else weights
        return flat_grad([self.losses], self.reward_params, [weights], retain_graph=True)

    def score_weights(self, weights: Tensor | None = None) -> list[tuple[Trajectories, Tensor]]:
        """For each part, weight · (U − base) at each of its steps (T,): what its scores are summed with in b."""
        weights = self.weights if weights is None else weights
        values = self.losses.detach()
        if self.baseline is True:
            values = centre(values, self.weights, self.is_sample)
        found = []
        for part in self.parts:
            index = part.trajectory_index
            steps = values[index]
            if callable(self.baseline):
                steps = steps - self._step_baseline(part)
            found.append((part, weights[index] * steps))
        return found

    def rhs(self, weights: Tensor | None = None) -> Tensor:
        """(P,) b."""
        return torch.stack([self.linearize(part).vjp(w) for part, w in self.score_weights(weights)]).sum(0)

    def responses(self, direction: Tensor) -> Tensor:
        """(T,) S_{0:h}·direction on the cross trajectories, less its mean over them unless baselines are off.

        E[S_{0:h}] = 0, so the mean only carries noise: Σ γ^h ∇r times it. A trajectory that has ended keeps its last
        S in the mean (a stopped martingale has mean zero too); a sample leaves the trajectory itself out, which keeps
        the cross term unbiased.
        """
        raw = prefix_sum(self.linearize(self.cross).jvp(direction), self.cross.offsets)
        return raw - _mean_of_others(raw, self.cross) if self.baseline else raw

    def cross_term(self, responses: Tensor, weights: Tensor | None = None) -> Tensor:
        """(R,) Cᵀw from `responses(w)` (T,)."""
        return self._reward_gradient(self.cross, responses, weights)

    def value_gradient(self, trajectories: Trajectories, weights: Tensor | None = None) -> Tensor:
        """(R,) ∂V/∂ν at the policy that the trajectories are from."""
        return self._reward_gradient(trajectories, torch.ones_like(trajectories.step_weights), weights)

    def reward_gradient(self, trajectories: Trajectories, coefficients: Tensor) -> Tensor:
        """(R,) ∇_ν Σ_t coefficient_t · r_ν(s_t, a_t)."""
        return reward_vjp(
            self.reward, trajectories, coefficients, list(self.reward_params), chunk_steps=self.chunk_steps
        )

    def discounts(self, trajectories: Trajectories) -> Tensor:
        """(T,) γ^h."""
        return self.discount ** trajectories.time.to(self.losses.dtype)

    def _reward_gradient(self, trajectories: Trajectories, factors: Tensor, weights: Tensor | None) -> Tensor:
        each = trajectories.weights if weights is None else weights
        steps = each[trajectories.trajectory_index] * self.discounts(trajectories) * factors
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
    number, lengths, index = trajectories.num_trajectories, trajectories.lengths, trajectories.trajectory_index
    if number < 2 and trajectories.is_sample:
        return torch.zeros_like(values)
    horizon = int(lengths.max())
    weights = torch.ones_like(trajectories.weights) if trajectories.is_sample else trajectories.weights
    weighted = weights[index] * values
    running = values.new_zeros(horizon).index_add(0, trajectories.time, weighted)
    is_last = trajectories.time == lengths[index] - 1
    ended = values.new_zeros(horizon + 1).index_add(0, lengths[index][is_last], weighted[is_last])
    total = (running + ended[:horizon].cumsum(0))[trajectories.time]
    if trajectories.is_sample:
        return (total - values) / (number - 1)
    return total / weights.sum()
