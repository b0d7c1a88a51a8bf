"""Tabular hypergradients that differentiate no policy: they compare the optima of perturbed rewards.

The value of the max-entropy optimum, V*[r] = max_π E_π Σ γ^t (r + τ H), has E_{π*} Σ γ^t dr as its derivative. So
f = dV*[r + ε r_U]/dε at ε = 0, and difference quotients in ε approximate f by functions whose gradients need π* alone,
never its derivative.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .bilevel import ExactHypergradient, SolvedBilevel, solve_bilevel
from .mdp import Array, TabularMDP, expected_return, occupancy
from .soft import require_converged, soft_value_iteration


def nudged_contrast(
    mdp: TabularMDP,
    rewards: npt.ArrayLike,
    reward_jacobian: npt.ArrayLike,
    upper_rewards: npt.ArrayLike,
    *,
    temperature: float,
    penalty: float,
    upper_reward_jacobian: npt.ArrayLike | None = None,
    tolerance: float = 1e-12,
    max_iterations: int = 100_000,
) -> ExactHypergradient:
    """First-order hypergradient from two max-entropy policies nudged to either side by r_U/λ; its error falls as λ⁻².

    implicit = (λ/2)(E_{π[r+r_U/λ]} Σ γ^t ∇r − E_{π[r−r_U/λ]} Σ γ^t ∇r), and direct = the mean of E Σ γ^t ∇r_U under the
    two. Their sum is the exact gradient of (λ/2)(V*[r + r_U/λ] − V*[r − r_U/λ]), a central difference whose limit is f.
    `objective` is f itself. Rounding takes over where r_U/λ is lost beside the errors of the lower level's solution.

    Args:
        penalty: λ > 0, the weight of the lower level against the upper one.
        rewards, reward_jacobian, upper_rewards, temperature, upper_reward_jacobian, tolerance, max_iterations: as in
            `exact_hypergradient`.
    """
    _check_positive("penalty", penalty)
    solved = solve_bilevel(
        mdp, rewards, reward_jacobian, upper_rewards, upper_reward_jacobian, temperature, tolerance, max_iterations
    )
    nudge = solved.upper_rewards / penalty
    above, below = (
        occupancy(mdp, _optimum(solved, solved.rewards + change, tolerance, max_iterations))
        for change in (nudge, -nudge)
    )
    implicit = 0.5 * penalty * np.einsum("sa,sap->p", above - below, solved.reward_jacobian)
    return ExactHypergradient(solved.objective, solved.direct(0.5 * (above + below)), implicit)


def value_penalty(
    mdp: TabularMDP,
    rewards: npt.ArrayLike,
    reward_jacobian: npt.ArrayLike,
    upper_rewards: npt.ArrayLike,
    *,
    temperature: float,
    penalty: float,
    upper_reward_jacobian: npt.ArrayLike | None = None,
    tolerance: float = 1e-12,
    max_iterations: int = 100_000,
) -> ExactHypergradient:
    """Gradient of PBRL's value-penalised objective (Shen et al. 2024), solved exactly; its error falls as λ⁻¹.

    F_λ(ν) = max_π [f(π) − λ (V* − V^π)], V with the entropy term. Its maximiser is the max-entropy policy of r + r_U/λ, so
    F_λ = λ(V*[r + r_U/λ] − V*[r]), the one-sided form of `nudged_contrast`:
    implicit = λ(E_{π[r+r_U/λ]} Σ γ^t ∇r − E_{π*} Σ γ^t ∇r), direct = E_{π[r+r_U/λ]} Σ γ^t ∇r_U. `objective` is f itself.

    Args:
        penalty: λ > 0, the weight of the lower level's suboptimality.
        rewards, reward_jacobian, upper_rewards, temperature, upper_reward_jacobian, tolerance, max_iterations: as in
            `exact_hypergradient`.
    """
    _check_positive("penalty", penalty)
    solved = solve_bilevel(
        mdp, rewards, reward_jacobian, upper_rewards, upper_reward_jacobian, temperature, tolerance, max_iterations
    )
    nudged = solved.rewards + solved.upper_rewards / penalty
    visits = occupancy(mdp, _optimum(solved, nudged, tolerance, max_iterations))
    implicit = penalty * np.einsum("sa,sap->p", visits - solved.visits, solved.reward_jacobian)
    return ExactHypergradient(solved.objective, solved.direct(visits), implicit)


def zero_order(
    mdp: TabularMDP,
    rewards: npt.ArrayLike,
    reward_jacobian: npt.ArrayLike,
    upper_rewards: npt.ArrayLike,
    *,
    temperature: float,
    radius: float,
    directions: int,
    seed: int,
    upper_reward_jacobian: npt.ArrayLike | None = None,
    tolerance: float = 1e-12,
    max_iterations: int = 100_000,
) -> ExactHypergradient:
    """Gaussian smoothing: implicit = mean over z ~ N(0, 1) of (f(ν + u z) − f(ν)) z / u; a bias of O(u²), much variance.

    The lower reward is moved along its tangent, r + u ∇r·z, and r_U stays where it is: the direct term is exact.

    Args:
        radius: u > 0, in units of the parameters.
        directions: draws of z, each a solve of the lower level.
        seed: of the draws.
        rewards, reward_jacobian, upper_rewards, temperature, upper_reward_jacobian, tolerance, max_iterations: as in
            `exact_hypergradient`.
    """
    _check_positive("radius", radius)
    if directions < 1:
        raise ValueError(f"directions must be at least 1, got {directions}")
    solved = solve_bilevel(
        mdp, rewards, reward_jacobian, upper_rewards, upper_reward_jacobian, temperature, tolerance, max_iterations
    )
    num_params = solved.reward_jacobian.shape[2]
    implicit = np.zeros(num_params)
    for direction in np.random.default_rng(seed).normal(size=(directions, num_params)):
        moved = solved.rewards + radius * solved.reward_jacobian @ direction
        policy = _optimum(solved, moved, tolerance, max_iterations)
        change = expected_return(mdp, policy, solved.upper_rewards) - solved.objective
        implicit += change / (radius * directions) * direction
    return solved.hypergradient(implicit)


def _optimum(solved: SolvedBilevel, rewards: Array, tolerance: float, max_iterations: int) -> Array:
    """(S, A), the max-entropy policy of other rewards."""
    solution = soft_value_iteration(solved.mdp, rewards, solved.solution.temperature, tolerance, max_iterations)
    require_converged(solution)
    return solution.policy


def _check_positive(name: str, value: float) -> None:
    if not 0.0 < value < np.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
