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

from ..ops import discounted_returns
from ..trajectories import Trajectories
from .last_layers import last_layers_preconditioner
from .linearize import Linearization
from .solvers import Damping, NativeOperator, OuterProducts, Preconditioner, check_damping

_WORTH = 4.0  # products that an approximate inverse may cost; it saves 10 to 30 of 20 to 50


class CurvatureOperator:
    """v ↦ A v + damping·v on flat (P,) vectors.

    Attributes:
        product: v ↦ A v.
        size: P.
        damping: the multiple of the identity that is included.
        cost: of one product, in gradients of Σ log π over the same steps.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], size: int, damping: Damping, cost: float) -> None:
        self.product = product
        self.size = size
        self.damping = 0.0 if damping == "auto" else damping
        self.cost = cost

    def __call__(self, vector: Tensor) -> Tensor:
        """(P,) -> (P,)."""
        image = self.product(vector)
        return image.add(vector, alpha=self.damping) if self.damping else image


class _SecondOrder(CurvatureOperator):
    """Σ_t (hessian_t ∇² log π_t + fisher_t F(s_t)) + Σ_i Σ_h scores_ih S_{0:h} S_{0:h}ᵀ + damping; None leaves one out."""

    def __init__(
        self,
        linearization: Linearization,
        damping: Damping,
        *,
        hessian: Tensor | None = None,
        fisher: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> None:
        self._linearization, self._hessian, self._fisher, self._scores = linearization, hessian, fisher, scores
        cost = linearization.second_order_cost(
            hessian=hessian is not None, fisher=fisher is not None, scores=scores is not None
        )
        super().__init__(self._product, linearization.num_params, damping, cost)

    def _product(self, v: Tensor) -> Tensor:
        return self._linearization.second_order(v, hessian=self._hessian, fisher=self._fisher, scores=self._scores)

    def native(self, extra: float = 0.0) -> NativeOperator | None:
        """A + extra·I for solves in compiled code; None where autograd computes the products, or in chunks."""
        linearization = self._linearization
        curvature = linearization.native_operator(hessian=self._hessian, fisher=self._fisher, scores=self._scores)
        if curvature is None:
            return None
        return NativeOperator(curvature, self.damping + extra, self.size, linearization.log_prob.dtype)

    def preconditioner(self, extra: float = 0.0) -> Preconditioner | None:
        """An approximate inverse of A + extra·I from the policy's last two layers, see `last_layers`.

        None where there is no damping or a score term, of which it would know nothing, for policies other than the package's
        own perceptrons, and where it would cost more than `_WORTH` products.
        """
        if self._scores is not None:
            return None
        trajectories = self._linearization.trajectories
        return last_layers_preconditioner(
            self._linearization.policy,
            trajectories.observations,
            trajectories.actions,
            hessian=self._hessian,
            fisher=self._fisher,
            damping=self.damping + extra,
            max_cost=_WORTH * self.cost,
        )


class _ScoreProducts(CurvatureOperator):
    """Σ_i c_i z_i z_iᵀ + damping, z_i the score of trajectory i with its steps weighed by `factors` (T,)."""

    def __init__(
        self, linearization: Linearization, factors: Tensor, coefficients: Tensor, damping: Damping, cost: float
    ) -> None:
        self._linearization, self._factors, self._coefficients = linearization, factors, coefficients
        super().__init__(self._product, linearization.num_params, damping, cost)

    def _product(self, v: Tensor) -> Tensor:
        trajectories = self._linearization.trajectories
        along = trajectories.sum_steps(self._factors * self._linearization.jvp(v))
        steps = (self._coefficients * along)[trajectories.trajectory_index]
        return self._linearization.vjp(self._factors * steps)

    def outer_products(self) -> OuterProducts:
        """The N rows z_i (N, P): what `Woodbury` solves with."""
        rows = self._linearization.scores(self._factors)
        return OuterProducts(rows, self._coefficients, self._linearization.costs.scores)


class Curvature(Protocol):
    """What `hypergradient` asks of a curvature."""

    def operator(
        self, linearization: Linearization, rewards: Tensor, discount: float, weights: Tensor | None = None
    ) -> CurvatureOperator:
        """−H on the trajectories of `linearization`, whose steps earn `rewards` (T,).

        `weights` (N,), of any sign, stand in for the trajectories' own; error estimates need them, and A is linear in them.
        """
        ...


@dataclass(frozen=True)
class Fisher:
    """H = −temperature·F_d − damping, F_d the discounted-occupancy Fisher matrix of the policy."""

    temperature: float
    """Entropy temperature of the lower problem, in units of reward per nat; SAC's α."""
    damping: Damping = 0.0
    """L2 weight of the lower objective, or "auto": see `parl_core.hypergrad.solvers.automatic_damping`."""
    scores: Literal["steps", "trajectories"] | None = None
    """How F is estimated. None: exactly over actions where the policy gives its Fisher matrix, else as "steps".
    "steps": outer products of the scores of the actions taken. "trajectories": outer products of Σ_h γ^{h/2} s_h, one for
    each trajectory, equal in expectation since later scores have mean zero given the earlier ones; noisier, but of rank N,
    so that `Woodbury` solves with it exactly."""

    def __post_init__(self) -> None:
        _check_non_negative("temperature", self.temperature)
        check_damping(self.damping)
        if self.scores not in (None, "steps", "trajectories"):
            raise ValueError(f"scores must be None, 'steps' or 'trajectories', got {self.scores!r}")
        if self.temperature == 0 and self.damping == 0:
            raise ValueError("Fisher with temperature 0 and damping 0 is the zero matrix: give one of them")

    def operator(
        self, linearization: Linearization, rewards: Tensor, discount: float, weights: Tensor | None = None
    ) -> CurvatureOperator:
        """Costs one JVP and one VJP of the policy a product; `rewards` do not matter."""
        trajectories, costs = linearization.trajectories, linearization.costs
        each = self.temperature * (trajectories.weights if weights is None else weights)
        discounts = _discounts(trajectories, discount, rewards)
        if self.scores == "trajectories":
            return _ScoreProducts(linearization, discounts.sqrt(), each, self.damping, costs.jvp + costs.vjp)
        steps = each[trajectories.trajectory_index] * discounts
        if self.scores == "steps":
            return CurvatureOperator(
                lambda v: linearization.vjp(steps * linearization.jvp(v)),
                linearization.num_params,
                self.damping,
                costs.jvp + costs.vjp,
            )
        return _SecondOrder(linearization, self.damping, fisher=steps)


@dataclass(frozen=True)
class ScoreHessian:
    """The full Hessian of the lower objective from scores and log-prob Hessians; invariant to a shift of the reward."""

    baseline: Literal["mean"] | Tensor | None = None
    """Subtracted from the reward of step h: None, "mean" (over trajectories, one that has ended counting 0; biased by
    O(1/N) on a sample) or a tensor (H,), H at least the longest trajectory; where lengths vary, the longest possible one,
    since trajectories that have ended carry the rest too."""
    temperature: float = 0.0
    """Entropy temperature of the lower problem, in units of reward per nat."""
    damping: Damping = 0.0
    """L2 weight of the lower objective, or "auto": see `parl_core.hypergrad.solvers.automatic_damping`."""

    def __post_init__(self) -> None:
        _check_hessian_fields(self)

    def operator(
        self, linearization: Linearization, rewards: Tensor, discount: float, weights: Tensor | None = None
    ) -> CurvatureOperator:
        """Costs one double backward and one VJP of the policy a product, two more with a temperature."""
        return _hessian_operator(self, linearization, rewards, discount, weights, with_score_products=True)


@dataclass(frozen=True)
class LogProbHessian:
    """The score-free part of `ScoreHessian`, as PARL prints it. Not invariant to a shift of the reward: an ablation."""

    baseline: Literal["mean"] | Tensor | None = None
    """As in `ScoreHessian`; here it changes the answer."""
    temperature: float = 0.0
    """Entropy temperature of the lower problem, in units of reward per nat."""
    damping: Damping = 0.0
    """L2 weight of the lower objective, or "auto": see `parl_core.hypergrad.solvers.automatic_damping`."""

    def __post_init__(self) -> None:
        _check_hessian_fields(self)

    def operator(
        self, linearization: Linearization, rewards: Tensor, discount: float, weights: Tensor | None = None
    ) -> CurvatureOperator:
        """Costs one double backward of the policy a product, and Fisher's with a temperature."""
        return _hessian_operator(self, linearization, rewards, discount, weights, with_score_products=False)


@dataclass(frozen=True)
class Identity:
    """H = −1: the implicit term is the plain cross product Cᵀ b."""

    def operator(
        self, linearization: Linearization, rewards: Tensor, discount: float, weights: Tensor | None = None
    ) -> CurvatureOperator:
        """Costs nothing."""
        scale = 1.0 if weights is None else weights.sum()  # no data in it: linear in weights, all the same
        return CurvatureOperator(lambda v: scale * v, linearization.num_params, 0.0, cost=0.0)


def lower_gradient(
    linearization: Linearization, rewards: Tensor, discount: float, temperature: float, *, baseline: bool = False
) -> Tensor:
    """(P,) ∇_θ E[Σ_h γ^h (r_h − temperature·log π_h)], of which H is the derivative, for rewards (T,).

    With `baseline` the mean discounted return to go at each time is subtracted: less noise, the same expectation up to
    O(1/N).
    """
    trajectories = linearization.trajectories
    gains = _discounts(trajectories, discount, rewards) * (rewards - temperature * linearization.log_prob)
    to_go = discounted_returns(gains, 1.0, trajectories.offsets)
    weights = trajectories.step_weights
    if baseline:
        time = trajectories.time
        zeros = rewards.new_zeros(trajectories.horizon)
        mass = zeros.index_add(0, time, weights)[time]
        to_go = to_go - zeros.index_add(0, time, weights * to_go)[time] / torch.where(mass != 0, mass, 1.0)
    return linearization.vjp(weights * to_go)


def _hessian_operator(
    spec: ScoreHessian | LogProbHessian,
    linearization: Linearization,
    rewards: Tensor,
    discount: float,
    weights: Tensor | None,
    *,
    with_score_products: bool,
) -> CurvatureOperator:
    trajectories = linearization.trajectories
    each = trajectories.weights if weights is None else weights
    discounts = _discounts(trajectories, discount, rewards)
    step_weights = each[trajectories.trajectory_index] * discounts
    if spec.temperature:
        rewards = rewards - spec.temperature * linearization.log_prob
    gains = step_weights * rewards
    if spec.baseline is not None:
        taken = _baseline_per_step(spec.baseline, trajectories, rewards, discount)
        gains = gains - each[trajectories.trajectory_index] * taken
    to_go = discounted_returns(gains, 1.0, trajectories.offsets)

    return _SecondOrder(
        linearization,
        spec.damping,
        hessian=-to_go,
        fisher=spec.temperature * step_weights if spec.temperature else None,
        scores=-gains if with_score_products else None,
    )


def _discounts(trajectories: Trajectories, discount: float, like: Tensor) -> Tensor:
    """(T,) γ^h."""
    return discount ** trajectories.time.to(like.dtype)


def _baseline_per_step(
    baseline: Literal["mean"] | Tensor, trajectories: Trajectories, rewards: Tensor, discount: float
) -> Tensor:
    """(T,) what a per-step baseline takes off each step's γ^h r_h.

    A trajectory that has ended still carries the baselines of the later steps, with its whole score: its last step takes
    them. Otherwise the baseline would not vanish in expectation when lengths depend on the policy.
    """
    time, lengths, horizon = trajectories.time, trajectories.lengths, trajectories.horizon
    if isinstance(baseline, Tensor):
        if baseline.dim() != 1 or baseline.shape[0] < horizon:
            raise ValueError(
                f"baseline must have shape (H,) with H >= {horizon}, the longest trajectory, got {tuple(baseline.shape)}"
            )
        values = baseline.to(rewards)
    else:
        total = trajectories.weights.sum()
        values = rewards.new_zeros(horizon).index_add(0, time, trajectories.step_weights * rewards) / total
    discounted = values * discount ** torch.arange(len(values), dtype=values.dtype, device=values.device)
    after = discounted_returns(discounted, 1.0) - discounted  # sum of the baselines strictly after each time
    is_last = time == lengths[trajectories.trajectory_index] - 1
    return discounted[time] + torch.where(is_last, after[time], 0.0)


def _check_hessian_fields(spec: ScoreHessian | LogProbHessian) -> None:
    _check_non_negative("temperature", spec.temperature)
    check_damping(spec.damping)
    if not (spec.baseline is None or isinstance(spec.baseline, Tensor) or spec.baseline == "mean"):
        raise ValueError(f"baseline must be None, 'mean' or a tensor (H,), got {spec.baseline!r}")


def _check_non_negative(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
