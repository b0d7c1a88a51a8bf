"""Differentiation through the lower level's own ascent steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import prefix_sum
from ...trajectories import Trajectories
from ..flat import flat_grad, gradients
from ..modules import CapturedPolicy, chunks, evaluate_reward
from .base import Outcome
from .problem import Problem


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
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size must be positive and finite, got {self.step_size}")
        for name in ("temperature", "damping"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")

    def implicit(self, problem: Problem, x0: Tensor | None) -> Outcome:
        """K differentiable gradients of the lower value, then one backward pass through all of them."""
        lower = problem.lower
        policy = CapturedPolicy(problem.policy)
        start = theta = policy.params
        discounts = problem.discount ** lower.time.to(problem.losses.dtype)
        rewards = evaluate_reward(problem.reward, lower)
        before = _log_prob(policy, start, lower).detach()
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
        return Outcome(flat_grad(after, problem.reward_params, weights))


def _log_prob(policy: CapturedPolicy, params: list[Tensor], trajectories: Trajectories) -> Tensor:
    """(T,) with its graph in `params`."""
    moved = policy.at(params)
    pieces = [moved.log_prob(chunk) for chunk in chunks(trajectories, None, whole=moved.sees_trajectories)]
    return torch.cat(pieces) if pieces else params[0].new_zeros(0)
