"""M-SoBiRL (Yang et al., AISTATS 2025): a hypergradient from few sweeps and one adjoint step, both warm-started.

For f = f(x, π*(x)) and ∂f = ∂f/∂π, with dπ = π (dQ − dV)/τ, dQ = ∇r + γ P dV and dV = (I − γ P_π)⁻¹ φ, φ(s) = Σ_a π ∇r,

    implicit = (1/τ) (Σ_{s,a} π ∂f ∇r − φᵀw),   (I − γ P_π)ᵀ w = b,   b(s') = Σ_{s,a} (1{s = s'} − γ P(s' | s, a)) π ∂f.

An outer iteration makes a few sweeps of soft value iteration from the last values, and one step of gradient descent on
½‖(I − γ P_π)ᵀ w − b‖² from the last w. Where both stand still, this is the exact gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..mdp import Array, TabularMDP, state_transitions
from ..problem import ParametricReward


class MSoBiRLState(NamedTuple):
    """What one outer iteration hands to the next."""

    value: Array
    """(S,), soft values."""
    adjoint: Array
    """(S,), w."""


class MSoBiRLResult(NamedTuple):
    """What an outer iteration makes of its x."""

    state: MSoBiRLState
    policy: Array
    """(S, A), of the values as they are."""
    implicit: Array
    """(P,), the estimate of the gradient through the policy."""


def m_sobirl_start(mdp: TabularMDP) -> MSoBiRLState:
    """Zeros."""
    return MSoBiRLState(np.zeros(mdp.num_states), np.zeros(mdp.num_states))


def m_sobirl_iteration(
    mdp: TabularMDP,
    reward: ParametricReward,
    policy_gradient: Callable[[Array], Array],
    state: MSoBiRLState,
    *,
    temperature: float,
    sweeps: int = 10,
    adjoint_step: float = 0.5,
) -> MSoBiRLResult:
    """One outer iteration at the x at which `reward` was taken.

    Args:
        policy_gradient: from a policy (S, A) to ∂f/∂π there, (S, A).
        state: of the last iteration, or `m_sobirl_start`.
        temperature: τ > 0.
        sweeps: of soft value iteration.
        adjoint_step: of the descent on w; it converges below 2/‖I − γ P_π‖².
    """
    value, policy = state.value, np.empty(0)
    for _ in range(sweeps + 1):  # the last one gives the policy of the values that the others arrived at
        q = reward.value + mdp.discount * mdp.transitions @ value
        highest = q.max(axis=1, keepdims=True)
        weights = np.exp((q - highest) / temperature)
        totals = weights.sum(axis=1, keepdims=True)
        last, value, policy = value, (highest + temperature * np.log(totals))[:, 0], weights / totals
    weighted = policy * policy_gradient(policy)
    system = np.eye(mdp.num_states) - mdp.discount * state_transitions(mdp, policy).T
    rhs = weighted.sum(axis=1) - mdp.discount * np.einsum("sa,sat->t", weighted, mdp.transitions)
    adjoint = state.adjoint - adjoint_step * system.T @ (system @ state.adjoint - rhs)
    through_rewards = (weighted - policy * adjoint[:, None]) / temperature
    implicit = np.einsum("sa,sap->p", through_rewards, reward.jacobian)
    return MSoBiRLResult(MSoBiRLState(last, adjoint), policy, implicit)
