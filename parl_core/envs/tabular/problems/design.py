"""Bilevel problems whose leader picks a point of a box, and their objective at many points at once.

The engine's leader moves free parameters x; a person thinks in tax rates and probabilities. The objective as a function of
those needs no gradient, and so is what a search can be run on.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import numpy.typing as npt

from ....errors import NonFiniteError
from ..mdp import Array, TabularMDP
from ..problem import BilevelMDP

_CHUNK = 4096  # points solved at once: their (S, S) systems take some MiB
_MAX_ITERATIONS = 100  # policy iteration needs about ten; a hundred never end by chance


class DesignProblem(BilevelMDP):
    """A bilevel problem whose leader picks a point z of a box, z = choice(x) for parameters x.

    Attributes:
        low, high: (D,) corners of the box, in the choice's own units.
    """

    low: Array
    high: Array

    @abstractmethod
    def choice(self, params: npt.ArrayLike) -> Array:
        """z (D,) at x (P,)."""

    @abstractmethod
    def rewards(self, choices: Array) -> tuple[Array, Array]:
        """The follower's and the leader's rewards, both (N, S, A), at N points (N, D) of the box."""

    def objectives(self, choices: npt.ArrayLike) -> Array:
        """What the leader earns (N,) at N points (N, D), by soft policy iteration on all at once.

        Raises:
            ValueError, NonFiniteError: points of another shape, outside the box, or not finite.
        """
        choices = np.asarray(choices, dtype=np.float64)
        if choices.ndim != 2 or choices.shape[1] != len(self.low):
            raise ValueError(f"choices must have shape (N, {len(self.low)}), got {choices.shape}")
        if not np.isfinite(choices).all():
            raise NonFiniteError(f"choices must be finite, got {choices[~np.isfinite(choices)][0]}")
        outside = (choices < self.low) | (choices > self.high)
        if outside.any():
            raise ValueError(f"choices must lie between low and high, got {choices[outside][0]:g}")
        values = np.empty(len(choices))
        for begin in range(0, len(choices), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            lower, upper = self.rewards(choices[part])
            values[part] = expected_returns(self.mdp, soft_optima(self.mdp, lower, self.temperature), upper)
        return values


def soft_optima(mdp: TabularMDP, rewards: Array, temperature: float, tolerance: float = 1e-10) -> Array:
    """The max-entropy policies (N, S, A) of N rewards (N, S, A), by soft policy iteration.

    That is Newton's method on V = T V, where T is the soft Bellman operator: V ← V + (I − γ P_π)⁻¹ (T V − V) with V's own
    softmax policy π. After the first step V comes from below, quadratically. It ends once max|T V − V| is at most
    tolerance·max(1, max|V|): log π is then within that times γ/((1 − γ) τ) of the optimum's.

    Raises:
        ValueError: no convergence.
    """
    value = np.zeros(rewards.shape[:2])
    for _ in range(_MAX_ITERATIONS):
        q = rewards + mdp.discount * np.einsum("sat,nt->nsa", mdp.transitions, value, optimize=True)
        highest = q.max(axis=2, keepdims=True)
        weights = np.exp((q - highest) / temperature)
        totals = weights.sum(axis=2, keepdims=True)
        policies = weights / totals
        residual = (highest + temperature * np.log(totals))[..., 0] - value
        if np.abs(residual).max(initial=0.0) <= tolerance * max(1.0, np.abs(value).max(initial=0.0)):
            return policies
        value += np.linalg.solve(_systems(mdp, policies), residual[..., None])[..., 0]
    raise ValueError(f"rewards must have an optimum, got a residual of {np.abs(residual).max():g} in the end")


def expected_returns(mdp: TabularMDP, policies: Array, rewards: Array) -> Array:
    """E Σ_t γ^t r (N,) of N policies under N rewards, both (N, S, A)."""
    earned = np.einsum("nsa,nsa->ns", policies, rewards)
    return np.linalg.solve(_systems(mdp, policies), earned[..., None])[..., 0] @ mdp.initial


def _systems(mdp: TabularMDP, policies: Array) -> Array:
    """I − γ P_π, (N, S, S)."""
    return np.eye(mdp.num_states) - mdp.discount * np.einsum("nsa,sat->nst", policies, mdp.transitions, optimize=True)
