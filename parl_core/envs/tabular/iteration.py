"""Adaptive Model Design: soft value iteration that carries its own derivatives (Chen et al. 2022).

From the iterates' own policy π = exp((Q − V)/τ), every sweep updates, with successors' values from the sweep before,

    V ← τ log Σ_a exp(Q/τ)        Q   = r + γ P V
    ∇V ← Σ_a π ∇Q                 ∇Q  = ∇r + γ P ∇V
    V_U ← Σ_a π Q_U               Q_U = r_U + γ P V_U
    ∇V_U ← Σ_a π (∇Q_U + (Q_U − V_U) ∇Q/τ),      ∇Q_U = ∇r_U + γ P ∇V_U

(dπ = π (∇Q − ∇V)/τ, and ∇V drops out against the centred Q_U), so that the hypergradient ρ_0·∇V_U comes without a linear
solve, and a warm start carries it from one ν to the next. ∇V_U is kept in two parts, what comes through r_U and what
comes through π.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import import_extra
from .bilevel import ExactHypergradient, checked_jacobians
from .mdp import Array, TabularMDP, checked, checked_table
from .soft import check_temperature


class AMDState(NamedTuple):
    """Where the iteration stands."""

    value: Array
    """(S,), V."""
    value_jacobian: Array
    """(S, P), ∇V."""
    upper_value: Array
    """(S,), V_U."""
    upper_direct: Array
    """(S, P), the part of ∇V_U that comes through r_U."""
    upper_implicit: Array
    """(S, P), the part that comes through the policy."""
    iterations: int
    """Sweeps made from the start that was given."""
    residual: float
    """The last sweep's largest change in any of the five, each relative to max(1, its largest entry)."""
    converged: bool

    def hypergradient(self, mdp: TabularMDP) -> ExactHypergradient:
        """The upper objective and its gradient as the iterates have them, converged or not."""
        return ExactHypergradient(
            objective=float(mdp.initial @ self.upper_value),
            direct=mdp.initial @ self.upper_direct,
            implicit=mdp.initial @ self.upper_implicit,
        )


def amd_iteration(
    mdp: TabularMDP,
    rewards: npt.ArrayLike,
    reward_jacobian: npt.ArrayLike,
    upper_rewards: npt.ArrayLike,
    *,
    temperature: float,
    upper_reward_jacobian: npt.ArrayLike | None = None,
    start: AMDState | None = None,
    tolerance: float = 1e-12,
    max_iterations: int = 100_000,
) -> AMDState:
    """Sweep until the values and their derivatives stand still, or `max_iterations` times.

    Args:
        start: state of an earlier call on this MDP, at this ν or another; zeros if left out.
        tolerance: stop at a residual of at most this.
        rewards, reward_jacobian, upper_rewards, temperature, upper_reward_jacobian: as in `exact_hypergradient`.

    Raises:
        MissingExtraError: numba is not installed.
        ValueError, NonFiniteError: wrong shapes, non-finite numbers, a temperature that is not positive.
    """
    check_temperature(temperature)
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    jacobian, upper_jacobian = checked_jacobians(mdp, reward_jacobian, upper_reward_jacobian)
    rewards = checked_table("rewards", rewards, mdp)
    upper_rewards = checked_table("upper_rewards", upper_rewards, mdp)
    num_states, num_params = mdp.num_states, jacobian.shape[2]
    import_extra("numba", "numba", needed_for="Adaptive model design")
    from .kernels.iteration import iterate_amd

    scalars, slopes = np.zeros((2, num_states)), np.zeros((3, num_states, num_params))
    if start is not None:
        scalars[0] = checked("start.value", start.value, (num_states,))
        scalars[1] = checked("start.upper_value", start.upper_value, (num_states,))
        for slot, name in enumerate(("value_jacobian", "upper_direct", "upper_implicit")):
            slopes[slot] = checked(f"start.{name}", getattr(start, name), (num_states, num_params))
    if upper_jacobian is None:
        upper_jacobian = np.zeros((*rewards.shape, 0))
    scalars, slopes, iterations, residual = iterate_amd(
        mdp.transitions,
        rewards,
        jacobian,
        upper_rewards,
        upper_jacobian,
        float(mdp.discount),
        float(temperature),
        float(tolerance),
        max_iterations,
        scalars,
        slopes,
    )
    return AMDState(
        value=scalars[0],
        value_jacobian=slopes[0],
        upper_value=scalars[1],
        upper_direct=slopes[1],
        upper_implicit=slopes[2],
        iterations=iterations,
        residual=residual,
        converged=bool(residual <= tolerance),
    )


def amd(
    mdp: TabularMDP,
    rewards: npt.ArrayLike,
    reward_jacobian: npt.ArrayLike,
    upper_rewards: npt.ArrayLike,
    *,
    temperature: float,
    upper_reward_jacobian: npt.ArrayLike | None = None,
    tolerance: float = 1e-12,
    max_iterations: int = 100_000,
) -> ExactHypergradient:
    """As `exact_hypergradient`, by Adaptive Model Design run to convergence.

    To warm start, or to make few sweeps per outer step, use `amd_iteration` and its state's `hypergradient`.

    Raises:
        MissingExtraError: numba is not installed.
        ValueError, NonFiniteError: wrong shapes, non-finite numbers, an iteration that did not converge.
    """
    state = amd_iteration(
        mdp,
        rewards,
        reward_jacobian,
        upper_rewards,
        temperature=temperature,
        upper_reward_jacobian=upper_reward_jacobian,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    if not state.converged:
        raise ValueError(
            f"amd must converge, got a residual of {state.residual:g} after {state.iterations} iterations: "
            "raise max_iterations, or take amd_iteration's state as it is"
        )
    return state.hypergradient(mdp)
