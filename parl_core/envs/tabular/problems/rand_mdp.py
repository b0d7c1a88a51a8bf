"""RandMDP: the synthetic benchmark of SoBiRL (Yang et al., AISTATS 2025), a bilevel problem whose optimum is known.

    lower   π*(x): max-entropy optimum, τ = 1, of a random MDP under r(s, a; x) = c_sa xᵀMx
    upper   min_x f(x) = ½‖x‖² + ½ Σ_{s,a} π*(a|s; x)²

The optimum is f = S/(2A), 1 as published, at x = 0 and nowhere else. By Cauchy–Schwarz Σ_a π(a|s)² ≥ (Σ_a π(a|s))²/A =
1/A for every policy, so f(x) ≥ ½‖x‖² + S/(2A). At x = 0 all rewards are 0, so V is the same in all states, Q in all
actions, and π* uniform: there Σ_a π² = 1/A and the bound is attained.

Around the optimum π* is uniform up to xᵀMx, so the implicit term is of third order in x there, and gradient descent
contracts as on ½‖x‖² alone, whatever it makes of the implicit term.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..bilevel import ExactHypergradient
from ..mdp import Array, TabularMDP, checked
from ..problem import ParametricReward
from ..soft import require_converged, soft_policy_vjp, soft_value_iteration

NUM_STATES, NUM_ACTIONS, NUM_PARAMS = 10, 5, 100
DISCOUNT, TEMPERATURE = 0.5, 1.0
OPTIMUM = NUM_STATES / (2 * NUM_ACTIONS)
"""min f."""


@dataclass(frozen=True, eq=False)
class RandMDP:
    """One draw of the problem; f is of the policy itself and not of an occupancy, so it is no `BilevelMDP`."""

    mdp: TabularMDP
    scales: Array
    """c, (S, A), at least 0."""
    matrix: Array
    """M, (P, P)."""
    start: Array
    """x₀, (P,), where a run begins."""
    temperature: float = TEMPERATURE
    """τ of the follower's entropy bonus."""

    def lower(self, params: npt.ArrayLike) -> ParametricReward:
        """The follower's reward at x (P,)."""
        x = checked("params", params, self.start.shape)
        slope = (self.matrix + self.matrix.T) @ x
        return ParametricReward(self.scales * (x @ self.matrix @ x), self.scales[..., None] * slope)

    def response(self, params: npt.ArrayLike) -> Array:
        """π*(x), (S, A)."""
        solution = soft_value_iteration(self.mdp, self.lower(params).value, self.temperature)
        require_converged(solution)
        return solution.policy

    def objective(self, params: npt.ArrayLike) -> float:
        """f(x), to be minimised."""
        return self.upper(params, self.response(params))

    def upper(self, params: npt.ArrayLike, policy: npt.ArrayLike) -> float:
        """f with this policy (S, A) in the place of π*(x); its derivatives in the two are the two themselves."""
        return 0.5 * float(np.sum(np.square(params)) + np.sum(np.square(policy)))

    def hypergradient(self, params: npt.ArrayLike) -> ExactHypergradient:
        """f(x) and its gradient: direct, x, and implicit, through π*(x)."""
        lower = self.lower(params)
        solution = soft_value_iteration(self.mdp, lower.value, self.temperature)
        through_rewards = soft_policy_vjp(self.mdp, solution, solution.policy)
        return ExactHypergradient(
            objective=self.upper(params, solution.policy),
            direct=np.array(params, dtype=np.float64),
            implicit=np.einsum("sa,sap->p", through_rewards, lower.jacobian),
        )


def rand_mdp(seed: int) -> RandMDP:
    """Draw a problem as published.

    From each state and action there are 1 to S−1 distinct successors, their number uniform, with uniform numbers as their
    probabilities, normalised; c_sa is the product of two uniform numbers; M and x₀ are standard normal. The first state,
    which f does not depend on, is uniform.
    """
    random = np.random.default_rng(seed)
    transitions = np.zeros((NUM_STATES, NUM_ACTIONS, NUM_STATES))
    for row in transitions.reshape(-1, NUM_STATES):
        successors = random.permutation(NUM_STATES)[: random.integers(1, NUM_STATES)]
        weights = random.random(len(successors))
        row[successors] = weights / weights.sum()
    return RandMDP(
        mdp=TabularMDP(transitions, np.full(NUM_STATES, 1.0 / NUM_STATES), DISCOUNT),
        scales=random.random((NUM_STATES, NUM_ACTIONS)) * random.random((NUM_STATES, NUM_ACTIONS)),
        matrix=random.standard_normal((NUM_PARAMS, NUM_PARAMS)),
        start=random.standard_normal(NUM_PARAMS),
    )
