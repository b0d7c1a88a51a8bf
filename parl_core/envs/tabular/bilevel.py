"""What the estimators of a tabular hypergradient share: the problem, solved, and the form of the answer.

lower   π*(ν) = argmax_π E_π Σ_t γ^t (r(s_t, a_t; ν) + τ H(π(·|s_t)))
upper   f(ν) = Σ_{s,a} d_{π*(ν)}(s, a) r_U(s, a; ν)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .mdp import (
    Array,
    PolicyValue,
    TabularMDP,
    checked_jacobian,
    checked_table,
    occupancy,
    policy_value,
)
from .soft import SoftSolution, require_converged, soft_value_iteration


class ExactHypergradient(NamedTuple):
    """Value and gradient of an upper objective, in the terms of the library's `Hypergradient`."""

    objective: float
    direct: Array
    """(P,) through the upper reward itself."""
    implicit: Array
    """(P,) through the optimal policy."""

    @property
    def total(self) -> Array:
        """(P,) direct + implicit."""
        return self.direct + self.implicit


class SolvedBilevel(NamedTuple):
    """The lower level's optimum with what the upper level makes of it; inputs checked."""

    mdp: TabularMDP
    rewards: Array
    """(S, A)."""
    upper_rewards: Array
    """(S, A)."""
    reward_jacobian: Array
    """(S, A, P)."""
    upper_reward_jacobian: Array | None
    """(S, A, P)."""
    solution: SoftSolution
    visits: Array
    """(S, A), the discounted occupancy of π*."""
    upper: PolicyValue
    """Q_U and V_U of π*."""

    @property
    def objective(self) -> float:
        """f."""
        return float(self.mdp.initial @ self.upper.value)

    @property
    def advantage(self) -> Array:
        """(S, A), A_U = Q_U − V_U."""
        return self.upper.q - self.upper.value[:, None]

    def direct(self, visits: Array) -> Array:
        """(P,) Σ_{s,a} visits ∇r_U, zeros if r_U does not depend on ν."""
        if self.upper_reward_jacobian is None:
            return np.zeros(self.reward_jacobian.shape[2])
        return np.einsum("sa,sap->p", visits, self.upper_reward_jacobian)

    def hypergradient(self, implicit: Array) -> ExactHypergradient:
        """With this implicit term (P,) and the direct term of π*."""
        return ExactHypergradient(self.objective, self.direct(self.visits), implicit)


def solve_bilevel(
    mdp: TabularMDP,
    rewards: npt.ArrayLike,
    reward_jacobian: npt.ArrayLike,
    upper_rewards: npt.ArrayLike,
    upper_reward_jacobian: npt.ArrayLike | None,
    temperature: float,
    tolerance: float,
    max_iterations: int,
) -> SolvedBilevel:
    """Solve the lower level and evaluate the upper one there.

    Raises:
        ValueError, NonFiniteError: wrong shapes, non-finite numbers, a lower level that did not converge.
    """
    jacobian, upper_jacobian = checked_jacobians(mdp, reward_jacobian, upper_reward_jacobian)
    rewards = checked_table("rewards", rewards, mdp)
    upper_rewards = checked_table("upper_rewards", upper_rewards, mdp)
    solution = soft_value_iteration(mdp, rewards, temperature, tolerance, max_iterations)
    require_converged(solution)
    return SolvedBilevel(
        mdp=mdp,
        rewards=rewards,
        upper_rewards=upper_rewards,
        reward_jacobian=jacobian,
        upper_reward_jacobian=upper_jacobian,
        solution=solution,
        visits=occupancy(mdp, solution.policy),
        upper=policy_value(mdp, solution.policy, upper_rewards),
    )


def checked_jacobians(
    mdp: TabularMDP, reward_jacobian: npt.ArrayLike, upper_reward_jacobian: npt.ArrayLike | None
) -> tuple[Array, Array | None]:
    """Both as (S, A, P) arrays of one P."""
    jacobian = checked_jacobian("reward_jacobian", reward_jacobian, mdp)
    if upper_reward_jacobian is None:
        return jacobian, None
    upper_jacobian = checked_jacobian("upper_reward_jacobian", upper_reward_jacobian, mdp)
    if upper_jacobian.shape != jacobian.shape:
        raise ValueError(
            f"upper_reward_jacobian must have shape {jacobian.shape} as reward_jacobian has, got {upper_jacobian.shape}"
        )
    return jacobian, upper_jacobian
