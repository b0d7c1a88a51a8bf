"""A finite MDP, and what a fixed policy earns in it: linear solves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import NonFiniteError

Array = npt.NDArray[np.float64]

_SUM_TOLERANCE = 1e-9  # how far from 1 a distribution may sum


@dataclass(frozen=True, eq=False)
class TabularMDP:
    """A finite MDP without its reward.

    Args:
        transitions: (S, A, S), P(s' | s, a). A row may sum to less than 1: what is missing is the probability that the
            episode ends with this step, and that nothing is earned, nor any entropy counted, after it.
        initial: (S,), the distribution of the first state.
        discount: γ, 0 ≤ γ < 1.

    Raises:
        ValueError: wrong shapes, negative probabilities, sums above (or, for `initial`, off) 1, a discount out of range.
        NonFiniteError: a NaN or an infinity.
    """

    transitions: Array
    initial: Array
    discount: float

    def __post_init__(self) -> None:
        transitions = np.ascontiguousarray(self.transitions, dtype=np.float64)
        if transitions.ndim != 3 or transitions.shape[0] != transitions.shape[2] or 0 in transitions.shape:
            raise ValueError(f"transitions must have shape (S, A, S), got {transitions.shape}")
        transitions = _checked_distributions("transitions", transitions, transitions.shape, may_end=True)
        initial = _checked_distributions("initial", self.initial, transitions.shape[:1])
        object.__setattr__(self, "transitions", transitions)
        object.__setattr__(self, "initial", initial)
        if not 0.0 <= self.discount < 1.0:
            raise ValueError(f"discount must satisfy 0 <= discount < 1, got {self.discount}")

    @property
    def num_states(self) -> int:
        """S."""
        return self.transitions.shape[0]

    @property
    def num_actions(self) -> int:
        """A."""
        return self.transitions.shape[1]

    @property
    def ends(self) -> Array:
        """(S, A), the probability that the episode ends with this step."""
        missing = 1.0 - self.transitions.sum(axis=-1)
        return np.where(missing > _SUM_TOLERANCE, missing, 0.0)


class PolicyValue(NamedTuple):
    """Values of a fixed policy."""

    q: Array
    """(S, A)."""
    value: Array
    """(S,)."""


def random_mdp(num_states: int, num_actions: int, discount: float, seed: int) -> TabularMDP:
    """An MDP whose transition rows and initial distribution are uniform on the simplex (Dirichlet(1,…,1))."""
    rng = np.random.default_rng(seed)
    transitions = rng.dirichlet(np.ones(num_states), size=(num_states, num_actions))
    return TabularMDP(transitions, rng.dirichlet(np.ones(num_states)), discount)


def policy_value(
    mdp: TabularMDP, policy: npt.ArrayLike, rewards: npt.ArrayLike, temperature: float = 0.0
) -> PolicyValue:
    """Values of `policy` (S, A) under rewards (S, A) plus `temperature` times its entropy; a linear solve."""
    policy = checked_policy(policy, mdp)
    rewards = checked_table("rewards", rewards, mdp)
    bonus = np.zeros(mdp.num_states)
    if temperature:
        log_policy = np.log(policy, where=policy > 0.0, out=np.zeros_like(policy))
        bonus = -temperature * np.sum(policy * log_policy, axis=1)
    system = np.eye(mdp.num_states) - mdp.discount * state_transitions(mdp, policy)
    value = np.linalg.solve(system, np.sum(policy * rewards, axis=1) + bonus)
    return PolicyValue(rewards + mdp.discount * mdp.transitions @ value, value)


def occupancy(mdp: TabularMDP, policy: npt.ArrayLike) -> Array:
    """Discounted occupancy d(s, a) = Σ_t γ^t P(s_t = s, a_t = a), (S, A); it sums to 1/(1−γ) if episodes never end."""
    policy = checked_policy(policy, mdp)
    system = np.eye(mdp.num_states) - mdp.discount * state_transitions(mdp, policy).T
    return np.linalg.solve(system, mdp.initial)[:, None] * policy


def expected_return(mdp: TabularMDP, policy: npt.ArrayLike, rewards: npt.ArrayLike) -> float:
    """E Σ_t γ^t r(s_t, a_t) under `policy` (S, A)."""
    return float(np.sum(occupancy(mdp, policy) * checked_table("rewards", rewards, mdp)))


def state_transitions(mdp: TabularMDP, policy: Array) -> Array:
    """P_π(s' | s), (S, S)."""
    return np.einsum("sa,sat->st", policy, mdp.transitions)


def checked_policy(policy: npt.ArrayLike, mdp: TabularMDP) -> Array:
    return _checked_distributions("policy", policy, mdp.transitions.shape[:2])


def _checked_distributions(name: str, values: npt.ArrayLike, shape: tuple[int, ...], *, may_end: bool = False) -> Array:
    array = checked(name, values, shape)
    if array.min() < 0.0:
        raise ValueError(f"{name} must hold probabilities, got {array.min():g}")
    excess = array.sum(axis=-1) - 1.0
    worst = float(excess.max() if may_end else np.abs(excess).max())
    if worst > _SUM_TOLERANCE:
        expected = "to 1, or less where episodes end," if may_end else "to 1"
        raise ValueError(f"{name} must sum {expected} along its last axis, got a sum that is off by {worst:g}")
    return array


def checked_table(name: str, values: npt.ArrayLike, mdp: TabularMDP) -> Array:
    return checked(name, values, mdp.transitions.shape[:2])


def checked_jacobian(name: str, values: npt.ArrayLike, mdp: TabularMDP) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 3:
        raise ValueError(f"{name} must have shape (S, A, P), got {array.shape}")
    return checked(name, array, (*mdp.transitions.shape[:2], array.shape[2]))


def checked(name: str, values: npt.ArrayLike, shape: tuple[int, ...]) -> Array:
    array = np.ascontiguousarray(values, dtype=np.float64)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}")
    return array
