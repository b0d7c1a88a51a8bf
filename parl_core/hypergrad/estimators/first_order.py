"""Estimators that solve the lower level again instead of differentiating it twice.

With θ_β = argmax_θ V(ν, θ) + β·L(ν, θ), L the upper loss, d/dβ ∂V/∂ν(ν, θ_β) at β = 0 is (dθ*/dν)ᵀ b: the implicit term is a
difference of first derivatives. They need no second derivative of the policy, so they run where there is none (flash
attention, sharded training), at the price of lower levels solved to well below the nudge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...trajectories import Trajectories
from ..flat import assign, flatten
from ..result import ErrorEstimate
from .base import Outcome
from .problem import Problem

BestResponse = Callable[[float], Trajectories]


@dataclass(frozen=True)
class NudgedContrast:
    """(∂V/∂ν at θ_β − ∂V/∂ν at θ_{−β}) / 2β: error O(β²)."""

    best_response: BestResponse
    """coefficient -> on-policy trajectories of the policy that maximises V + coefficient·L, for the reward as it is."""
    nudge: float = 1e-2
    """β, in units of the lower value per unit of the upper loss; 1/λ in the contrast of rewards r ± r_U/λ."""

    def __post_init__(self) -> None:
        _check_best_response(self.best_response)
        _check_positive("nudge", self.nudge)

    def implicit(self, problem: Problem, x0: Tensor | None) -> Outcome:
        """Two lower solves by the caller, two backward passes through the reward."""
        up, down = (_value_gradient(problem, self.best_response, sign * self.nudge) for sign in (1.0, -1.0))
        return Outcome((up - down) / (2.0 * self.nudge))


@dataclass(frozen=True)
class ValuePenalty:
    """λ (∂V/∂ν at θ* − ∂V/∂ν at θ_{−1/λ}): error O(1/λ).

    The gradient of PBRL's value penalty (Shen et al. 2024) λ (max_θ V − V(θ)) at the minimiser of the penalised loss.
    """

    best_response: BestResponse
    """As in `NudgedContrast`; asked for the coefficient −1/λ."""
    penalty: float = 100.0
    """λ, in units of the upper loss per unit of the lower value."""

    def __post_init__(self) -> None:
        _check_best_response(self.best_response)
        _check_positive("penalty", self.penalty)

    def implicit(self, problem: Problem, x0: Tensor | None) -> Outcome:
        """One lower solve by the caller, two backward passes through the reward."""
        nudged = _value_gradient(problem, self.best_response, -1.0 / self.penalty)
        return Outcome(self.penalty * (problem.value_gradient(problem.cross) - nudged))


@dataclass(frozen=True)
class ZeroOrder:
    """Mean over Gaussian z of (L(ν + uz) − L(ν − uz)) z / 2u, less the direct term: nothing is differentiated.

    Its standard error falls as √(R / directions) of the gradient's length, R the number of reward parameters.
    """

    objective: Callable[[nn.Module], float]
    """reward -> the upper loss, without regulariser, of the lower level solved again for it. The reward's parameters hold
    the perturbed numbers during the call."""
    radius: float = 1e-2
    """u, in units of the reward's parameters."""
    directions: int = 100
    """Number of z; each costs two lower solves."""
    seed: int = 0
    """Of the directions."""

    def __post_init__(self) -> None:
        if not callable(self.objective):
            raise TypeError(f"objective must be a callable reward -> float, got {type(self.objective).__name__}")
        _check_positive("radius", self.radius)
        if self.directions < 2:
            raise ValueError(f"directions must be at least 2, got {self.directions}")

    def implicit(self, problem: Problem, x0: Tensor | None) -> Outcome:
        """2·directions lower solves by the caller; `error.stderr` is the directions' own."""
        params, direct = problem.reward.own, problem.direct()  # of the losses' graph, which the moves below invalidate
        start = flatten(p.detach() for p in params)
        generator = torch.Generator(device=start.device).manual_seed(self.seed)
        mean, squares = torch.zeros_like(start), torch.zeros_like(start)
        try:
            for count in range(1, self.directions + 1):
                z = torch.randn(start.shape, generator=generator, dtype=start.dtype, device=start.device)
                ends = []
                for sign in (1.0, -1.0):
                    assign(params, start + sign * self.radius * z)
                    ends.append(float(self.objective(problem.reward.module)))
                slope = (ends[0] - ends[1]) / (2.0 * self.radius) * z
                before = slope - mean
                mean = mean + before / count
                squares = squares + before * (slope - mean)
        finally:
            assign(params, start)
        stderr = (squares / (self.directions - 1) / self.directions).sqrt()
        return Outcome(mean - direct, error=ErrorEstimate(stderr=stderr))


def _value_gradient(problem: Problem, best_response: BestResponse, coefficient: float) -> Tensor:
    trajectories = best_response(coefficient)
    if not isinstance(trajectories, Trajectories):
        raise TypeError(f"best_response(coefficient) must return Trajectories, got {type(trajectories).__name__}")
    return problem.value_gradient(trajectories)


def _check_best_response(best_response: BestResponse) -> None:
    if not callable(best_response):
        raise TypeError(
            f"best_response must be a callable coefficient -> Trajectories, got {type(best_response).__name__}"
        )


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
