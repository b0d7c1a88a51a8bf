"""A tabular bilevel problem: an MDP whose two rewards depend on the leader's parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy.typing as npt

from .bilevel import ExactHypergradient
from .estimators import exact_hypergradient
from .mdp import Array, TabularMDP, expected_return
from .soft import require_converged, soft_value_iteration


class ParametricReward(NamedTuple):
    """A reward table at some parameters, and how it changes with them."""

    value: Array
    """(S, A)."""
    jacobian: Array
    """(S, A, P)."""


class BilevelMDP(ABC):
    """max_x E_{π*(x)} Σ_t γ^t r_U(s_t, a_t; x), π*(x) the max-entropy optimum of r(·; x).

    The follower solves the MDP for the lower reward; the leader, who sets x, is paid the upper one on what the follower
    then does.

    Attributes:
        mdp: the follower's MDP.
        temperature: τ > 0 of the follower's entropy bonus, in units of reward.
        num_params: P, the length of x.
    """

    mdp: TabularMDP
    temperature: float
    num_params: int

    @abstractmethod
    def lower(self, params: npt.ArrayLike) -> ParametricReward:
        """The follower's reward at x (P,)."""

    @abstractmethod
    def upper(self, params: npt.ArrayLike) -> ParametricReward:
        """The leader's reward at x (P,)."""

    def response(self, params: npt.ArrayLike) -> Array:
        """π*(x), (S, A)."""
        solution = soft_value_iteration(self.mdp, self.lower(params).value, self.temperature)
        require_converged(solution)
        return solution.policy

    def objective(self, params: npt.ArrayLike) -> float:
        """What the leader earns at x."""
        return expected_return(self.mdp, self.response(params), self.upper(params).value)

    def hypergradient(
        self,
        params: npt.ArrayLike,
        estimator: Callable[..., ExactHypergradient] = exact_hypergradient,
        **options: Any,
    ) -> ExactHypergradient:
        """The objective and its gradient at x, by any estimator of this package; `options` are its own."""
        lower, upper = self.lower(params), self.upper(params)
        return estimator(
            self.mdp,
            lower.value,
            lower.jacobian,
            upper.value,
            temperature=self.temperature,
            upper_reward_jacobian=upper.jacobian,
            **options,
        )
