"""Closed forms for a lower level at its maximum-entropy optimum, π* = exp((Q* − V*) / τ): no linear system.

∇_ν log π*(a|s) = (∇Q*(s, a) − ∇V*(s)) / τ, with ∇Q* and ∇V* the expected discounted sums of ∇_ν r along π*, so

    (dθ*/dν)ᵀ b = E[U Σ_h ∇_ν log π*(a_h|s_h)] = E[Σ_h A_h (∇Q* − ∇V*)(s_h, a_h)] / τ = E[Σ_h A_h ∇Q*(s_h, a_h)] / τ,
    A_h = E[U | h, s_h, a_h] − E[U | h, s_h]

whose last step holds because A_h has mean zero over actions. The estimators differ in what they put for each factor. They
know nothing of the policy's parameters: a policy class that does not contain the optimum is not felt.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import discounted_returns
from ...trajectories import Trajectories, require_finite
from ..result import HypergradientWarning
from .base import Outcome
from .problem import Problem


@dataclass(frozen=True)
class HPGD:
    """Hyper policy gradient descent (Thoma et al., NeurIPS 2024): E[(U − base) Σ_h (∇Q* − ∇V*)(s_h, a_h)] / τ.

    ∇Q* and ∇V* are averaged over the visits of the lower trajectories to the same state and action, and to the same state,
    so it needs states that recur with different actions: a tabular problem. With independent lower and upper data it is
    unbiased up to the averages' own denominators. Lower trajectories must be long, since the discounted sums end with them.
    """

    temperature: float
    """τ of the lower level, in units of reward per nat."""

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def implicit(self, problem: Problem, x0: Tensor | None) -> Outcome:
        """One backward pass through the reward, at the cross trajectories.

        Raises:
            ValueError: no state–action pair of the upper data is visited by the lower trajectories, or no state of theirs
                with more than one action.

        Warns:
            HypergradientWarning: some of them are not; they are left out.
        """
        lower = problem.cross
        total = torch.zeros_like(lower.step_weights)
        _require_choice(
            _groups((lower.observations,)), _groups((lower.observations,), (_columns(lower),)), "HPGD", "lower"
        )
        for part, coefficients in problem.score_weights():
            states = _groups((part.observations, lower.observations))
            pairs = _groups((part.observations, lower.observations), (_columns(part), _columns(lower)))
            steps = part.num_steps
            weights = lower.step_weights
            mass = _sum_by(pairs[steps:], weights, pairs)[pairs[:steps]]  # (T_upper,) lower weight on the same (s, a)
            known = mass > 0
            _check_visits(known, coefficients)
            kept = torch.where(known, coefficients, 0.0)
            for groups, sign in ((pairs, 1.0), (states, -1.0)):
                wanted = _sum_by(groups[:steps], kept, groups)
                here = _sum_by(groups[steps:], weights, groups)
                ratio = wanted / torch.where(here > 0, here, 1.0)
                total = total + sign * weights * ratio[groups[steps:]]
        along = _discounted_prefix(total / self.temperature, problem.discount, lower)
        return Outcome(problem.reward_gradient(lower, along))


@dataclass(frozen=True)
class BCHG:
    """BC-HG (ICAPS 2026): E[Σ_h A_h Σ_{k≥h} γ^{k−h} ∇_ν r(s_k, a_k)] / τ, along the upper trajectories themselves.

    No state need recur if the advantages are given, say by a critic. Left out, they are differences of averages of U over
    the visits to the same time, state and action, and to the same time and state: exact on an enumeration; on a sample,
    biased by each visit's part in its own averages (a few percent at some tens of visits each).
    """

    temperature: float
    """τ of the lower level, in units of reward per nat."""
    advantages: Callable[[Trajectories], Tensor] | None = None
    """trajectories -> (T,) A_h = E[U | h, s_h, a_h] − E[U | h, s_h] of the upper loss; asked for first and second of pairs
    one after the other."""

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def implicit(self, problem: Problem, x0: Tensor | None) -> Outcome:
        """One backward pass through the reward for each of a sample's trajectories."""
        return Outcome(_advantage_estimate(problem, self, problem.discount))


@dataclass(frozen=True)
class SoBiRL:
    """SoBiRL's shortcut for RLHF (Yang et al., AISTATS 2025): ∇Q* ≈ ∇_ν r, dropping γ P ∇V*. A baseline to beat.

    At γ = .9 on a random tabular problem its vector is off by nine tenths of its length; it is exact at γ = 0.
    """

    temperature: float
    """τ of the lower level, in units of reward per nat."""
    advantages: Callable[[Trajectories], Tensor] | None = None
    """As in `BCHG`."""

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def implicit(self, problem: Problem, x0: Tensor | None) -> Outcome:
        """One backward pass through the reward for each of a sample's trajectories."""
        return Outcome(_advantage_estimate(problem, self, 0.0))


def _advantage_estimate(problem: Problem, estimator: BCHG | SoBiRL, discount: float) -> Tensor:
    """(R,) E[Σ_h A_h Σ_{k≥h} discount^{k−h} ∇_ν r_k] / τ."""
    terms = []
    for part in problem.parts:
        weights = problem.weights[part.trajectory_index]
        if estimator.advantages is None:
            values = _averaged_advantages(problem, part, weights, type(estimator).__name__)
        else:
            values = estimator.advantages(part)
            if not isinstance(values, Tensor) or values.shape != (part.num_steps,):
                came = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"advantages(trajectories) must return shape (T,) = ({part.num_steps},), got {came}")
            require_finite("advantages(trajectories)", values.detach())
        along = _discounted_prefix(weights * values.detach() / estimator.temperature, discount, part)
        terms.append(problem.reward_gradient(part, along))
    return torch.stack(terms).sum(0)


def _averaged_advantages(problem: Problem, part: Trajectories, weights: Tensor, name: str) -> Tensor:
    """(T,) E[U | h, s, a] − E[U | h, s] by averages over equal (h, s, a) and (h, s)."""
    values = problem.losses.detach()[part.trajectory_index]
    time = part.time.unsqueeze(-1).to(torch.float64)
    states = _groups((part.observations,), (time,))
    pairs = _groups((part.observations,), (time,), (_columns(part),))
    _require_choice(states, pairs, name, "upper")
    result = torch.zeros_like(values)
    for groups, sign in ((pairs, 1.0), (states, -1.0)):
        mass = _sum_by(groups, weights, groups)
        mean = _sum_by(groups, weights * values, groups) / torch.where(mass != 0, mass, 1.0)
        result = result + sign * mean[groups]
    return result


def _require_choice(states: Tensor, pairs: Tensor, name: str, role: str) -> None:
    """Refuse data in which no state is seen with two actions: every difference between them would be zero."""
    if states.numel() and int(states.max()) == int(pairs.max()):
        raise ValueError(
            f"{name} compares actions taken in the same state, but in {role} no state recurs with another action: "
            "use BCHG with advantages, or hypergradient's curvature"
        )


def _groups(*columns: tuple[Tensor, ...]) -> Tensor:
    """(ΣT,) int64: equal rows get equal numbers; each argument holds one set of columns, for one batch after the other."""
    rows = torch.cat([torch.cat([c.to(torch.float64) for c in batches]) for batches in columns], dim=1)
    return torch.unique(rows, dim=0, return_inverse=True)[1]


def _columns(trajectories: Trajectories) -> Tensor:
    actions = trajectories.actions
    return actions.unsqueeze(-1) if actions.dim() == 1 else actions


def _sum_by(groups: Tensor, values: Tensor, every: Tensor) -> Tensor:
    """(G,) sums of `values` by group, G the number of groups among `every`."""
    number = int(every.max()) + 1 if every.numel() else 0
    return values.new_zeros(number).index_add(0, groups, values)


def _discounted_prefix(values: Tensor, discount: float, trajectories: Trajectories) -> Tensor:
    """(T,) Σ_{i≤k} discount^{k−i} values_i within each trajectory: discounted returns, read backwards."""
    offsets = (trajectories.num_steps - trajectories.offsets).flip(0)
    return discounted_returns(values.flip(0), discount, offsets).flip(0)


def _check_visits(known: Tensor, coefficients: Tensor) -> None:
    missing = int((~known & (coefficients != 0)).sum())
    if not missing:
        return
    if not bool(known.any()):
        raise ValueError(
            "HPGD needs lower trajectories that visit the state–action pairs of upper, got none in common: use BCHG with "
            "advantages, or hypergradient's curvature"
        )
    warnings.warn(
        f"HPGD left out {missing} of {known.numel()} upper steps, whose state and action the lower trajectories never visit",
        HypergradientWarning,
        stacklevel=5,
    )


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
