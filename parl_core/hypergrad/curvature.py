"""Curvature of the lower level: H = ∇²_θ V as products, never as a matrix.

V(θ) = E[Σ_h γ^h r(s_h, a_h)] + temperature·(discounted entropy) − damping/2·‖θ‖² is maximised, so H is negative
definite at a strict optimum. Every class here yields A = −H: the positive operator that the solvers get. In the notation
S_{0:h} = Σ_{j≤h} ∇ log π(a_j|s_j), with weights w of the trajectories:

    ScoreHessian     H = E[Σ_h γ^h r_h (S_{0:h} S_{0:h}ᵀ + Σ_{j≤h} ∇² log π_j)]      the Hessian itself
    LogProbHessian   H = E[Σ_h γ^h r_h Σ_{j≤h} ∇² log π_j]                           PARL's printed form; an ablation:
                                                        it changes when a constant is added to the reward
    Fisher           H = −temperature · E[Σ_h γ^h F(s_h)]                            exact at the soft optimum of a policy
                                                        class that contains it, cheap and never indefinite
    Identity         H = −1                                                          no curvature

With a temperature, the first two use r_h − temperature·log π_h (not differentiated) and add Fisher's term. In expectation
a baseline b_h subtracted from r_h changes nothing, since E[S Sᵀ + ∇² log ρ] = ∇²1 = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..ops import discounted_returns, prefix_sum
from ..trajectories import Trajectories
from .linearize import Linearization


class CurvatureOperator:
    """v ↦ A v + damping·v on flat (P,) vectors.

    Attributes:
        size: P.
        damping: the multiple of the identity that is included.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], size: int, damping: float) -> None:
        self._product = product
        self.size = size
        self.damping = damping

    def __call__(self, vector: Tensor) -> Tensor:
        """(P,) -> (P,)."""
        image = self._product(vector)
        return image.add(vector, alpha=self.damping) if self.damping else image


class Curvature(Protocol):
    """What `hypergradient` asks of a curvature."""

    def operator(self, linearization: Linearization, rewards: Tensor, discount: float) -> CurvatureOperator:
        """−H on the trajectories of `linearization`, whose steps earn `rewards` (T,)."""
        ...


@dataclass(frozen=True)
class Fisher:
    """H = −temperature·F_d − damping, F_d the discounted-occupancy Fisher matrix of the policy."""

    temperature: float
    """Entropy temperature of the lower problem, in units of reward per nat; SAC's α."""
    damping: float = 0.0
    """L2 weight of the lower objective."""

    def __post_init__(self) -> None:
        _check_non_negative("temperature", self.temperature)
        _check_non_negative("damping", self.damping)
        if self.temperature == 0 and self.damping == 0:
            raise ValueError("Fisher with temperature 0 and damping 0 is the zero matrix: give one of them")

    def operator(self, linearization: Linearization, rewards: Tensor, discount: float) -> CurvatureOperator:
        """Costs one JVP and one VJP of the policy a product; `rewards` do not matter."""
        weights = self.temperature * _discounted_weights(linearization.trajectories, discount)
        return CurvatureOperator(lambda v: linearization.fisher_vp(weights, v), linearization.num_params, self.damping)


@dataclass(frozen=True)
class ScoreHessian:
    """The full Hessian of the lower objective from scores and log-prob Hessians; invariant to a shift of the reward."""

    baseline: Literal["mean"] | Tensor | None = None
    """Subtracted from the reward of step h: None, "mean" (over trajectories, one that has ended counting 0; biased by
    O(1/N) on a sample) or a tensor (at least the longest trajectory,)."""
    temperature: float = 0.0
    """Entropy temperature of the lower problem, in units of reward per nat."""
    damping: float = 0.0
    """L2 weight of the lower objective."""

    def __post_init__(self) -> None:
        _check_hessian_fields(self)

    def operator(self, linearization: Linearization, rewards: Tensor, discount: float) -> CurvatureOperator:
        """Costs one double backward and one VJP of the policy a product, two more with a temperature."""
        return _hessian_operator(self, linearization, rewards, discount, with_score_products=True)


@dataclass(frozen=True)
class LogProbHessian:
    """The score-free part of `ScoreHessian`, as PARL prints it. Not invariant to a shift of the reward: an ablation."""

    baseline: Literal["mean"] | Tensor | None = None
    """As in `ScoreHessian`; here it changes the answer."""
    temperature: float = 0.0
    """Entropy temperature of the lower problem, in units of reward per nat."""
    damping: float = 0.0
    """L2 weight of the lower objective."""

    def __post_init__(self) -> None:
        _check_hessian_fields(self)

    def operator(self, linearization: Linearization, rewards: Tensor, discount: float) -> CurvatureOperator:
        """Costs one double backward of the policy a product, and Fisher's with a temperature."""
        return _hessian_operator(self, linearization, rewards, discount, with_score_products=False)


@dataclass(frozen=True)
class Identity:
    """H = −1: the implicit term is the plain cross product Cᵀ b."""

    def operator(self, linearization: Linearization, rewards: Tensor, discount: float) -> CurvatureOperator:
        """Costs nothing."""
        return CurvatureOperator(torch.clone, linearization.num_params, 0.0)


def _hessian_operator(
    spec: ScoreHessian | LogProbHessian,
    linearization: Linearization,
    rewards: Tensor,
    discount: float,
    *,
    with_score_products: bool,
) -> CurvatureOperator:
    trajectories = linearization.trajectories
    offsets = trajectories.offsets
    weights = _discounted_weights(trajectories, discount)
    if spec.temperature:
        rewards = rewards - spec.temperature * linearization.log_prob
    gains = weights * rewards
    if spec.baseline is not None:
        gains = gains - _baseline_gains(spec.baseline, trajectories, rewards, discount)
    to_go = discounted_returns(gains, 1.0, offsets)

    def product(v: Tensor) -> Tensor:
        step_products, image = linearization.jvp_and_hvp(to_go, v)
        if with_score_products:
            outer = discounted_returns(gains * prefix_sum(step_products, offsets), 1.0, offsets)
            image = image + linearization.vjp(outer)
        if spec.temperature:
            image = image - spec.temperature * linearization.fisher_vp(weights, v)
        return -image

    return CurvatureOperator(product, linearization.num_params, spec.damping)


def _discounted_weights(trajectories: Trajectories, discount: float) -> Tensor:
    """(T,) w_i γ^h."""
    powers = discount ** trajectories.time.to(trajectories.weights.dtype)
    return trajectories.step_weights * powers


def _baseline_gains(
    baseline: Literal["mean"] | Tensor, trajectories: Trajectories, rewards: Tensor, discount: float
) -> Tensor:
    """(T,) what a per-step baseline takes off each step's w γ^h r_h.

    A trajectory that has ended still carries the baselines of the later steps, with its whole score: its last step takes
    them. Otherwise the baseline would not vanish in expectation when lengths depend on the policy.
    """
    time, lengths = trajectories.time, trajectories.lengths
    horizon = int(lengths.max()) if trajectories.num_trajectories else 0
    if isinstance(baseline, Tensor):
        if baseline.dim() != 1 or baseline.shape[0] < horizon:
            raise ValueError(
                f"baseline must have shape (H,) with H >= {horizon}, the longest trajectory, got {tuple(baseline.shape)}"
            )
        values = baseline[:horizon].to(rewards)
    else:
        total = trajectories.weights.sum()
        values = rewards.new_zeros(horizon).index_add(0, time, trajectories.step_weights * rewards) / total
    discounted = values * discount ** torch.arange(horizon, dtype=values.dtype, device=values.device)
    after = discounted_returns(discounted, 1.0) - discounted  # sum of the baselines strictly after each time
    taken = discounted[time]
    is_last = time == lengths[trajectories.trajectory_index] - 1
    return trajectories.step_weights * (taken + torch.where(is_last, after[time], 0.0))


def _check_hessian_fields(spec: ScoreHessian | LogProbHessian) -> None:
    _check_non_negative("temperature", spec.temperature)
    _check_non_negative("damping", spec.damping)
    if not (spec.baseline is None or isinstance(spec.baseline, Tensor) or spec.baseline == "mean"):
        raise ValueError(f"baseline must be None, 'mean' or a tensor (H,), got {spec.baseline!r}")


def _check_non_negative(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
