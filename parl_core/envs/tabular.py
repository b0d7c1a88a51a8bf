"""Finite MDPs whose every quantity is exact: the oracles against which estimators are tested.

Notation: S states, A actions, γ discount, d the discounted occupancy of a policy. Everything is float64
NumPy, except that `enumerate_trajectories` returns the library's `Trajectories`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..errors import NonFiniteError, import_extra
from ..trajectories import Trajectories

Array = npt.NDArray[np.float64]

_SUM_TOLERANCE = 1e-9  # how far from 1 a distribution may sum
_MAX_ENUMERATED_NUMBERS = 2**28  # entries of the observations of an enumeration: 2 GiB


@dataclass(frozen=True, eq=False)
class TabularMDP:
    """A finite MDP without its reward.

    Args:
        transitions: (S, A, S), P(s' | s, a).
        initial: (S,), the distribution of the first state.
        discount: γ, 0 ≤ γ < 1.

    Raises:
        ValueError: wrong shapes, negative or unnormalised probabilities, a discount out of range.
        NonFiniteError: a NaN or an infinity.
    """

    transitions: Array
    initial: Array
    discount: float

    def __post_init__(self) -> None:
        transitions = np.ascontiguousarray(self.transitions, dtype=np.float64)
        if transitions.ndim != 3 or transitions.shape[0] != transitions.shape[2] or 0 in transitions.shape:
            raise ValueError(f"transitions must have shape (S, A, S), got {transitions.shape}")
        transitions = _checked_distributions("transitions", transitions, transitions.shape)
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


class PolicyValue(NamedTuple):
    """Values of a fixed policy."""

    q: Array
    """(S, A)."""
    value: Array
    """(S,)."""


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


def random_mdp(num_states: int, num_actions: int, discount: float, seed: int) -> TabularMDP:
    """An MDP whose transition rows and initial distribution are uniform on the simplex (Dirichlet(1,…,1))."""
    rng = np.random.default_rng(seed)
    transitions = rng.dirichlet(np.ones(num_states), size=(num_states, num_actions))
    return TabularMDP(transitions, rng.dirichlet(np.ones(num_states)), discount)


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
    rewards = _checked_table("rewards", rewards, mdp)
    if not 0.0 < temperature < np.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    import_extra("numba", "numba", needed_for="Soft value iteration")
    from .tabular_kernels import iterate_soft_values

    value, iterations, residual = iterate_soft_values(
        mdp.transitions, rewards, float(mdp.discount), float(temperature), float(tolerance), max_iterations
    )
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


def policy_value(
    mdp: TabularMDP, policy: npt.ArrayLike, rewards: npt.ArrayLike, temperature: float = 0.0
) -> PolicyValue:
    """Values of `policy` (S, A) under rewards (S, A) plus `temperature` times its entropy; a linear solve."""
    policy = _checked_policy(policy, mdp)
    rewards = _checked_table("rewards", rewards, mdp)
    bonus = np.zeros(mdp.num_states)
    if temperature:
        log_policy = np.log(policy, where=policy > 0.0, out=np.zeros_like(policy))
        bonus = -temperature * np.sum(policy * log_policy, axis=1)
    system = np.eye(mdp.num_states) - mdp.discount * _state_transitions(mdp, policy)
    value = np.linalg.solve(system, np.sum(policy * rewards, axis=1) + bonus)
    return PolicyValue(rewards + mdp.discount * mdp.transitions @ value, value)


def occupancy(mdp: TabularMDP, policy: npt.ArrayLike) -> Array:
    """Discounted occupancy d(s, a) = Σ_t γ^t P(s_t = s, a_t = a), (S, A); it sums to 1/(1−γ)."""
    policy = _checked_policy(policy, mdp)
    system = np.eye(mdp.num_states) - mdp.discount * _state_transitions(mdp, policy).T
    return np.linalg.solve(system, mdp.initial)[:, None] * policy


def expected_return(mdp: TabularMDP, policy: npt.ArrayLike, rewards: npt.ArrayLike) -> float:
    """E Σ_t γ^t r(s_t, a_t) under `policy` (S, A)."""
    return float(np.sum(occupancy(mdp, policy) * _checked_table("rewards", rewards, mdp)))


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
    if not solution.converged:
        raise ValueError(
            f"solution must have converged, got a residual of {solution.residual:g} after "
            f"{solution.iterations} iterations: raise max_iterations"
        )
    gradient = _checked_table("policy_gradient", policy_gradient, mdp)
    policy = solution.policy
    # q_gradient: the function's derivatives in Q at fixed values downstream
    mean = np.sum(policy * gradient, axis=1, keepdims=True)
    q_gradient = policy * (gradient - mean) / solution.temperature
    system = np.eye(mdp.num_states) - mdp.discount * _state_transitions(mdp, policy).T
    adjoint = np.linalg.solve(system, mdp.discount * np.einsum("sat,sa->t", mdp.transitions, q_gradient))
    return q_gradient + policy * adjoint[:, None]


def exact_hypergradient(
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
    """Gradient in ν of f(ν) = Σ_{s,a} d_{π*(ν)}(s, a) r_U(s, a; ν), where π*(ν) is the max-entropy optimum
    for r(·; ν).

    The sign is that of f itself: ascend f, or pass −r_U to have a loss.

    Args:
        rewards: (S, A), the lower reward r at ν.
        reward_jacobian: (S, A, P), ∇_ν r.
        upper_rewards: (S, A), r_U at ν.
        temperature: τ > 0 of the lower level.
        upper_reward_jacobian: (S, A, P), ∇_ν r_U; left out if r_U does not depend on ν.
        tolerance, max_iterations: of the lower level's `soft_value_iteration`.

    Raises:
        ValueError, NonFiniteError: wrong shapes, non-finite numbers, a lower level that did not converge.
    """
    reward_jacobian = _checked_jacobian("reward_jacobian", reward_jacobian, mdp)
    solution = soft_value_iteration(mdp, rewards, temperature, tolerance, max_iterations)
    upper = policy_value(mdp, solution.policy, upper_rewards)
    visits = occupancy(mdp, solution.policy)
    # ∂f/∂π(a|s) = d(s) Q_U(s, a), the policy-gradient theorem
    by_reward = soft_policy_vjp(mdp, solution, visits.sum(axis=1, keepdims=True) * upper.q)
    direct = np.zeros(reward_jacobian.shape[2])
    if upper_reward_jacobian is not None:
        upper_reward_jacobian = _checked_jacobian("upper_reward_jacobian", upper_reward_jacobian, mdp)
        if upper_reward_jacobian.shape != reward_jacobian.shape:
            raise ValueError(
                f"upper_reward_jacobian must have shape {reward_jacobian.shape} as reward_jacobian has, "
                f"got {upper_reward_jacobian.shape}"
            )
        direct = np.einsum("sa,sap->p", visits, upper_reward_jacobian)
    return ExactHypergradient(
        objective=float(mdp.initial @ upper.value),
        direct=direct,
        implicit=np.einsum("sa,sap->p", by_reward, reward_jacobian),
    )


def enumerate_trajectories(mdp: TabularMDP, policy: npt.ArrayLike, horizon: int) -> Trajectories:
    """All trajectories of `horizon` steps that have positive probability under `policy` (S, A).

    Returns:
        `Trajectories` with one-hot observations (T, S) float64, actions (T, 1) int64 and the exact
        probabilities as weights, which sum to 1. In lexicographic order of (s_0, a_0, s_1, a_1, …).

    Raises:
        ValueError: horizon below 1, a policy that is none, or more trajectories than fit in memory.
    """
    policy = _checked_policy(policy, mdp)
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    num = _count_trajectories(mdp, policy, horizon)
    most = _MAX_ENUMERATED_NUMBERS // (horizon * mdp.num_states)
    if num > most:
        raise ValueError(f"horizon must leave at most {most} trajectories to enumerate, got {horizon}: {num:.3g}")

    states: npt.NDArray[np.int64] = np.flatnonzero(mdp.initial)[:, None]  # (N, h+1), grows by a column each step
    actions: npt.NDArray[np.int64] = np.empty((len(states), 0), dtype=np.int64)  # (N, h)
    weights = mdp.initial[states[:, 0]]  # (N,)
    for step in range(horizon):
        if step:
            last = mdp.transitions[states[:, -1], actions[:, -1]]  # (N, S)
            branch, successor = np.nonzero(last)
            weights = weights[branch] * last[branch, successor]
            states, actions = np.column_stack([states[branch], successor]), actions[branch]
        choices = policy[states[:, -1]]  # (N, A)
        branch, action = np.nonzero(choices)
        weights = weights[branch] * choices[branch, action]
        states, actions = states[branch], np.column_stack([actions[branch], action])
    return Trajectories(
        torch.from_numpy(np.eye(mdp.num_states)[states.reshape(-1)]),
        torch.from_numpy(actions.reshape(-1, 1)),
        torch.arange(0, len(weights) * horizon + 1, horizon),
        weights=torch.from_numpy(weights),
    )


def _count_trajectories(mdp: TabularMDP, policy: Array, horizon: int) -> float:
    successors = np.einsum("sa,sat->st", policy > 0.0, (mdp.transitions > 0.0).astype(np.float64))
    num_from = np.count_nonzero(policy, axis=1).astype(np.float64)
    for _ in range(horizon - 1):
        num_from = successors @ num_from
    return float(num_from[mdp.initial > 0.0].sum())


def _state_transitions(mdp: TabularMDP, policy: Array) -> Array:
    """P_π(s' | s), (S, S)."""
    return np.einsum("sa,sat->st", policy, mdp.transitions)


def _checked_policy(policy: npt.ArrayLike, mdp: TabularMDP) -> Array:
    return _checked_distributions("policy", policy, mdp.transitions.shape[:2])


def _checked_distributions(name: str, values: npt.ArrayLike, shape: tuple[int, ...]) -> Array:
    array = _checked(name, values, shape)
    if array.min() < 0.0:
        raise ValueError(f"{name} must hold probabilities, got {array.min():g}")
    worst = float(np.abs(array.sum(axis=-1) - 1.0).max())
    if worst > _SUM_TOLERANCE:
        raise ValueError(f"{name} must sum to 1 along its last axis, got a sum that is off by {worst:g}")
    return array


def _checked_table(name: str, values: npt.ArrayLike, mdp: TabularMDP) -> Array:
    return _checked(name, values, mdp.transitions.shape[:2])


def _checked_jacobian(name: str, values: npt.ArrayLike, mdp: TabularMDP) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 3:
        raise ValueError(f"{name} must have shape (S, A, P), got {array.shape}")
    return _checked(name, array, (*mdp.transitions.shape[:2], array.shape[2]))


def _checked(name: str, values: npt.ArrayLike, shape: tuple[int, ...]) -> Array:
    array = np.ascontiguousarray(values, dtype=np.float64)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}")
    return array
