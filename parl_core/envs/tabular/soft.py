"""The max-entropy optimum of a finite MDP, and derivatives through it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import import_extra
from .mdp import Array, TabularMDP, checked_table, state_transitions


class SoftSolution(NamedTuple):
    """The solution of an entropy-regularised MDP."""

    q: Array
    """(S, A) soft action values, r + γ P V."""
    value: Array
    """(S,) soft values, τ log Σ_a exp(q/τ)."""
    policy: Array
    """(S, A) the optimal policy exp((q − value)/τ)."""
    iterations: int
    residual: float
    """max|ΔV| of the last iteration; V is off by at most γ/(1−γ) times this."""
    converged: bool
    temperature: float


def soft_value_iteration(
    mdp: TabularMDP,
    rewards: npt.ArrayLike,
    temperature: float,
    tolerance: float = 1e-12,
    max_iterations: int = 100_000,
) -> SoftSolution:
    """Solve max_π E Σ_t γ^t (r + τ H(π(·|s_t))) by soft value iteration, a γ-contraction in the maximum norm.

    Args:
        rewards: (S, A).
        temperature: τ > 0, in units of reward.
        tolerance: stop when max|ΔV| ≤ tolerance·max(1, max|V|).
        max_iterations: stop anyway; the solution then says `converged=False`.

    Raises:
        MissingExtraError: numba is not installed.
        ValueError, NonFiniteError: rewards of the wrong shape or not finite; a temperature that is not
        positive.
    """
    rewards = checked_table("rewards", rewards, mdp)
    check_temperature(temperature)
    import_extra("numba", "numba", needed_for="Soft value iteration")
    from .kernels.iteration import iterate_soft_values

    value, iterations, residual = iterate_soft_values(
        mdp.transitions, rewards, float(mdp.discount), float(temperature), float(tolerance), max_iterations
    )
    return _solution(mdp, rewards, temperature, value, iterations, residual, tolerance)


def soft_policy_iteration(
    mdp: TabularMDP, rewards: npt.ArrayLike, temperature: float, tolerance: float = 1e-12
) -> SoftSolution:
    """As `soft_value_iteration`, by Newton's method: a linear solve per iteration, and a handful of iterations.

    The better choice where γ is close to 1, and where states are numbered so that transitions lead to nearby numbers: the
    solves are banded.
    """
    rewards = checked_table("rewards", rewards, mdp)
    check_temperature(temperature)
    import_extra("numba", "numba", needed_for="Soft policy iteration")
    from .kernels.iteration import compressed_rows
    from .kernels.newton import bandwidth, soft_optimum

    starts, successors, probabilities = compressed_rows(mdp.transitions)
    band = bandwidth(starts, successors, mdp.num_actions)
    value, policy = np.zeros(mdp.num_states), np.empty(rewards.shape)
    factors = np.empty((mdp.num_states, 2 * band + 1))
    iterations, residual = soft_optimum(
        rewards,
        float(temperature),
        float(mdp.discount),
        starts,
        successors,
        probabilities,
        float(tolerance),
        value,
        policy,
        factors,
    )
    return _solution(mdp, rewards, temperature, value, iterations, residual, tolerance)


def _solution(
    mdp: TabularMDP,
    rewards: Array,
    temperature: float,
    value: Array,
    iterations: int,
    residual: float,
    tolerance: float,
) -> SoftSolution:
    """What follows from the values that an iteration has reached."""
    converged = bool(residual <= tolerance * max(1.0, float(np.abs(value).max())))
    q = rewards + mdp.discount * mdp.transitions @ value
    highest = q.max(axis=1, keepdims=True)
    weights = np.exp((q - highest) / temperature)
    totals = weights.sum(axis=1, keepdims=True)
    return SoftSolution(
        q=q,
        value=(highest + temperature * np.log(totals))[:, 0],
        policy=weights / totals,
        iterations=iterations,
        residual=residual,
        converged=converged,
        temperature=float(temperature),
    )


def soft_policy_vjp(mdp: TabularMDP, solution: SoftSolution, policy_gradient: npt.ArrayLike) -> Array:
    """Gradient with respect to the rewards of a function of the max-entropy optimal policy.

    With dπ = π (dQ − dV)/τ, dV = Σ_a π dQ and dQ = dr + γ P dV, the adjoint needs one solve of size S
    whatever the number of parameters behind r (M-SoBiRL; Yang et al., AISTATS 2025).

    Args:
        solution: of `soft_value_iteration` on this MDP, converged.
        policy_gradient: (S, A), the function's partial derivatives in π(a|s).

    Returns:
        (S, A), its derivatives in r(s, a).
    """
    require_converged(solution)
    gradient = checked_table("policy_gradient", policy_gradient, mdp)
    policy = solution.policy
    # q_gradient: the function's derivatives in Q at fixed values downstream
    mean = np.sum(policy * gradient, axis=1, keepdims=True)
    q_gradient = policy * (gradient - mean) / solution.temperature
    system = np.eye(mdp.num_states) - mdp.discount * state_transitions(mdp, policy).T
    adjoint = np.linalg.solve(system, mdp.discount * np.einsum("sat,sa->t", mdp.transitions, q_gradient))
    return q_gradient + policy * adjoint[:, None]


def require_converged(solution: SoftSolution) -> None:
    """Refuse a solution that stopped early: derivatives at it would be those of nothing."""
    if not solution.converged:
        raise ValueError(
            f"solution must have converged, got a residual of {solution.residual:g} after "
            f"{solution.iterations} iterations: raise max_iterations"
        )


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not positive."""
    if not 0.0 < temperature < np.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
