"""Differentiation through the lower level's own ascent steps."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import prefix_sum
from ...trajectories import Trajectories
from ..captured import CapturedPolicy
from ..flat import gradients
from ..modules import chunks, evaluate_reward
from ..result import HypergradientWarning
from .base import Outcome
from .problem import Problem

_LEAST_EFFECTIVE = 0.3


@dataclass(frozen=True)
class Unrolled:
    """∇_ν L(θ_K) through K steps θ ← θ + η ∇_θ V̂(ν, θ) from the policy as it is.

    V̂ is the lower value on the given trajectories, reweighted to the policy of each step by the density ratio up to that
    step. At the lower optimum this is the Neumann series of the implicit function theorem cut after K terms, and its error
    (1 − ημ)^K, μ the smallest curvature. It holds K graphs of policy and reward at once.
    """

    steps: int
    """K."""
    step_size: float
    """η, in units of parameters per unit of the lower value's gradient; below 2 / (largest curvature)."""
    temperature: float = 0.0
    """Entropy temperature of the lower problem, in units of reward per nat."""
    damping: float = 0.0
    """L2 weight of the lower objective."""

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a whole number, at least 1, got {self.steps!r}")
        if not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size must be positive and finite, got {self.step_size}")
        for name in ("temperature", "damping"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")

    def implicit(self, problem: Problem, x0: Tensor | None) -> Outcome:
        """K differentiable gradients of the lower value, then one backward pass through all of them."""
        if problem.cross is not problem.lower or problem.chunk_steps is not None:
            raise ValueError("Unrolled takes its steps on lower as a whole: leave out cross and chunk_steps")
        lower, policy = problem.lower, problem.policy
        start = theta = policy.params
        discounts = problem.discounts(lower)
        rewards = problem.reward.run(evaluate_reward, lower)
        before = _log_prob(policy, start, lower).detach()
        policy.check_repeatable(lower, before)
        for _ in range(self.steps):
            log_prob = _log_prob(policy, theta, lower)
            ratio = prefix_sum(log_prob - before, lower.offsets).exp()
            gains = rewards - self.temperature * log_prob
            value = (lower.step_weights * discounts * ratio * gains).sum()
            value = value - 0.5 * self.damping * torch.stack([(t * t).sum() for t in theta]).sum()
            ascent = gradients([value], theta, [torch.ones_like(value)], create_graph=True)
            theta = [t + self.step_size * g for t, g in zip(theta, ascent, strict=True)]

        after = [_log_prob(policy, theta, part) for part in problem.parts]
        shift = torch.zeros_like(problem.losses.detach())  # (n,) log density ratio of each sample
        for part, log_prob in zip(problem.parts, after, strict=True):
            shift = shift + part.sum_steps(log_prob.detach() - _log_prob(policy, start, part).detach())
        weights = [
            w * shift.exp()[part.trajectory_index]
            for part, (_, w) in zip(problem.parts, problem.score_weights(), strict=True)
        ]
        moved = lower.sum_steps(_log_prob(policy, theta, lower).detach() - before)
        _warn_if_far(((lower.weights, moved), (problem.weights, shift)))
        return Outcome(problem.reward.gradient(after, weights))


def _warn_if_far(changes: tuple[tuple[Tensor, Tensor], ...]) -> None:
    """Say so if reweighting by exp(log-ratio) (n,) leaves little of the weights (n,)."""
    for weights, log_ratio in changes:
        ratio = (log_ratio - log_ratio.max()).exp()
        share = float((weights * ratio).sum() ** 2 / (weights.sum() * (weights * ratio**2).sum()))
        if not share > _LEAST_EFFECTIVE:
            warnings.warn(
                f"the unrolled steps move the policy so far that reweighting leaves an effective {share:.0%} of the sample: "
                "take fewer or smaller steps, or draw trajectories from a policy that is nearer to the optimum",
                HypergradientWarning,
                stacklevel=6,
            )
            return


def _log_prob(policy: CapturedPolicy, params: list[Tensor], trajectories: Trajectories) -> Tensor:
    """(T,) with its graph in `params`."""
    moved = policy.at(params)
    pieces = [moved.log_prob(chunk) for chunk in chunks(trajectories, None, whole=moved.sees_trajectories)]
    return torch.cat(pieces) if pieces else params[0].new_zeros(0)
