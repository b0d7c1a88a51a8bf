"""Stackelberg games: the leader commits to a mixed strategy in every state, the follower plays its best against it.

With σ(a|s) the leader's strategy and R_F, R_L (S, A, B) the two players' payoffs for the leader's action a and the
follower's b, the follower solves the MDP of r(s, b) = Σ_a σ(a|s) R_F(s, a, b), and the leader is paid
Σ_a σ(a|s) R_L(s, a, b) on what it then does. The state moves by the follower's action alone: so the MDP is the same at every
strategy, as in every `BilevelMDP`, and what the leader decides about is rewards. A matrix game is one state and γ = 0.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..mdp import Array, TabularMDP, checked, occupancy, random_mdp
from ..problem import ParametricReward
from ..soft import check_temperature
from .design import DesignProblem

_FEASIBLE = 1e-9  # how far from a constraint rounding may leave a vertex


class StackelbergGame(DesignProblem):
    """Commitment to mixed strategies against a max-entropy follower.

    The leader's parameters are logits (S·A,), state after state; σ is their softmax over the actions of a state. Its choice
    is (S·(A−1),) conditional probabilities, σ(a|s) / Σ_{a'≥a} σ(a'|s) for all actions but a state's last: with two actions
    the probability of the first, and with any number every point of the unit cube is one strategy.

    Args:
        mdp: the follower's, with B actions.
        follower_payoffs, leader_payoffs: (S, A, B), R_F and R_L.
        temperature: τ > 0 of the follower's entropy bonus; as τ → 0 it plays a best response.

    Raises:
        ValueError, NonFiniteError: payoffs of the wrong shape or not finite, a temperature that is not positive.
    """

    def __init__(
        self, mdp: TabularMDP, follower_payoffs: npt.ArrayLike, leader_payoffs: npt.ArrayLike, temperature: float
    ) -> None:
        check_temperature(temperature)
        shape = np.shape(follower_payoffs)
        if len(shape) != 3 or (shape[0], shape[2]) != mdp.transitions.shape[:2] or shape[1] < 2:
            raise ValueError(
                f"follower_payoffs must have shape ({mdp.num_states}, A, {mdp.num_actions}), A at least 2, got {shape}"
            )
        self.mdp, self.temperature = mdp, float(temperature)
        self.follower_payoffs = checked("follower_payoffs", follower_payoffs, shape)
        self.leader_payoffs = checked("leader_payoffs", leader_payoffs, shape)
        self.num_leader_actions = shape[1]
        self.num_params = shape[0] * shape[1]
        self.low, self.high = np.zeros(shape[0] * (shape[1] - 1)), np.ones(shape[0] * (shape[1] - 1))

    def strategy(self, params: npt.ArrayLike) -> Array:
        """σ (S, A) at logits (S·A,)."""
        logits = self._logits(params)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def choice(self, params: npt.ArrayLike) -> Array:
        """Conditional probabilities (S·(A−1),) at logits (S·A,)."""
        logits = self._logits(params)
        rest = np.logaddexp.accumulate(logits[:, ::-1], axis=1)[:, ::-1]  # log Σ_{a'≥a} exp
        return np.exp(logits - rest)[:, :-1].reshape(-1)

    def strategies(self, choices: Array) -> Array:
        """σ (N, S, A) at N points (N, S·(A−1))."""
        shares = choices.reshape(len(choices), self.mdp.num_states, self.num_leader_actions - 1)
        ends = np.ones((*shares.shape[:2], 1))
        left = np.concatenate([ends, np.cumprod(1.0 - shares, axis=2)], axis=2)  # probability of reaching an action
        return left * np.concatenate([shares, ends], axis=2)

    def lower(self, params: npt.ArrayLike) -> ParametricReward:
        """Σ_a σ(a|s) R_F(s, a, b)."""
        return self._expected(self.follower_payoffs, params)

    def upper(self, params: npt.ArrayLike) -> ParametricReward:
        """Σ_a σ(a|s) R_L(s, a, b)."""
        return self._expected(self.leader_payoffs, params)

    def rewards(self, choices: Array) -> tuple[Array, Array]:
        """See `DesignProblem`."""
        strategies = self.strategies(choices)
        lower, upper = (
            np.einsum("nsa,sab->nsb", strategies, payoffs, optimize=True)
            for payoffs in (self.follower_payoffs, self.leader_payoffs)
        )
        return lower, upper

    def _expected(self, payoffs: Array, params: npt.ArrayLike) -> ParametricReward:
        strategy = self.strategy(params)
        value = np.einsum("sa,sab->sb", strategy, payoffs)
        slopes = strategy[:, :, None] * (payoffs - value[:, None])  # ∂/∂logit(s, a) of the reward at (s, b)
        states, _, replies = payoffs.shape
        jacobian = np.zeros((states, replies, *strategy.shape))
        jacobian[np.arange(states), :, np.arange(states)] = slopes.transpose(0, 2, 1)
        return ParametricReward(value, jacobian.reshape(states, replies, -1))

    def _logits(self, params: npt.ArrayLike) -> Array:
        return checked("params", params, (self.num_params,)).reshape(-1, self.num_leader_actions)


class SimultaneousPlay(NamedTuple):
    """What comes of the game when the leader cannot commit."""

    strategy: Array
    """(S, A), the leader's."""
    value: float
    """What the leader earns."""
    gap: float
    """What the leader would gain by its best deviation against the same follower: 0 at an equilibrium."""


def simultaneous_play(game: StackelbergGame, rounds: int = 5000) -> SimultaneousPlay:
    """The equilibrium without commitment: the follower plays its max-entropy optimum, the leader a best response to it.

    Fictitious play (Brown 1951): the leader's strategy is the mean of its best responses so far. Since the state does not
    move by her action, they maximise the payoff in each state. In some games it does not converge; `gap` tells.

    Raises:
        ValueError: rounds below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    states = np.arange(game.mdp.num_states)
    counts = np.full((game.mdp.num_states, game.num_leader_actions), 1.0 / game.num_leader_actions)
    for _ in range(rounds):
        counts[states, _leader_values(game, _logits_of(counts)).argmax(axis=1)] += 1.0
    params = _logits_of(counts)
    strategy = game.strategy(params)
    values = _leader_values(game, params)
    visits = occupancy(game.mdp, game.response(params)).sum(axis=1)
    gains = values.max(axis=1) - np.sum(strategy * values, axis=1)
    return SimultaneousPlay(strategy, game.objective(params), float(visits @ gains))


def _logits_of(counts: Array) -> Array:
    """Parameters whose strategy is proportional to positive counts (S, A)."""
    return np.log(counts).reshape(-1)


def _leader_values(game: StackelbergGame, params: Array) -> Array:
    """(S, A), what each of her actions pays her now against the follower's response to `params`."""
    return np.einsum("sb,sab->sa", game.response(params), game.leader_payoffs)


def strong_stackelberg(follower_payoffs: npt.ArrayLike, leader_payoffs: npt.ArrayLike) -> tuple[float, Array]:
    """The leader's best commitment in a matrix game against a best response that breaks ties in her favour.

    For every reply b, the strategies σ to which b is a best response form a polytope, on which her payoff is linear: so the
    best is a vertex of one (Conitzer and Sandholm, EC 2006, who find it by linear programs). All are enumerated here, which
    is for small games: one linear system for every choice of A−1 among A+B−1 constraints.

    Args:
        follower_payoffs, leader_payoffs: (A, B).

    Returns:
        Her payoff, and σ (A,). A temperature's optimum tends to this payoff as τ → 0, unless the reply is best only on
        strategies without an interior.

    Raises:
        ValueError: payoffs that are no matrices of one shape.
    """
    follower, leader = (np.asarray(payoffs, dtype=np.float64) for payoffs in (follower_payoffs, leader_payoffs))
    if follower.ndim != 2 or follower.shape != leader.shape:
        raise ValueError(
            f"follower_payoffs and leader_payoffs must have one shape (A, B), got {follower.shape} and {leader.shape}"
        )
    actions, replies = follower.shape
    best, commitment = -np.inf, np.full(actions, 1.0 / actions)
    for reply in range(replies):
        others = np.delete(np.arange(replies), reply)
        constraints = np.concatenate([np.eye(actions), (follower[:, [reply]] - follower[:, others]).T])  # · σ ≥ 0
        for active in itertools.combinations(range(len(constraints)), actions - 1):
            system = np.concatenate([constraints[list(active)], np.ones((1, actions))])
            if np.linalg.matrix_rank(system) < actions:
                continue
            vertex = np.linalg.solve(system, np.eye(actions)[-1])
            payoff = float(leader[:, reply] @ vertex)
            if (constraints @ vertex >= -_FEASIBLE).all() and payoff > best:
                best, commitment = payoff, vertex.clip(0.0)
    return best, commitment


def matrix_game(
    follower_payoffs: npt.ArrayLike = ((1.0, 0.0), (0.0, 1.0)),
    leader_payoffs: npt.ArrayLike = ((2.0, 4.0), (1.0, 3.0)),
    temperature: float = 0.1,
) -> StackelbergGame:
    """A game of one move each; by default the textbook's in which commitment pays (Conitzer and Sandholm, EC 2006).

    There her first row dominates, so in the Nash equilibrium she plays it and earns 2. Committed to the second row she earns
    3, and to both in equal parts 3.5, the most: the follower, indifferent then, replies with the second column.

    Args:
        follower_payoffs, leader_payoffs: (A, B).
        temperature: see `StackelbergGame`.
    """
    follower, leader = (np.asarray(payoffs, dtype=np.float64)[None] for payoffs in (follower_payoffs, leader_payoffs))
    replies = follower.shape[-1]
    once = TabularMDP(np.ones((1, replies, 1)), np.ones(1), 0.0)
    return StackelbergGame(once, follower, leader, temperature)


def audit_game(temperature: float = 0.1, discount: float = 0.9) -> StackelbergGame:
    """An inspector commits to how often she audits trusted and watched firms (after Harrington, J. Public Econ. 1988).

    Two states, trusted and watched; her choice is the probability of an audit in each. A firm that cheats becomes watched;
    a watched one that complies is trusted again with probability .2. Cheating pays the firm 1 without an audit; with one,
    .5 in its first offence, while it is trusted, and −1 while it is watched. Complying pays 0, and −.25 while it is watched.
    She pays .3 for an audit, and a firm that cheats does harm of 1, of which an audit repairs half.

    Without commitment she audits as far as audits pay for themselves at once: in both states so often that the firm cheats
    with probability .6, which costs her .6 a step. With it, audits deter; and she audits the watched firms more, since the
    prospect of that deters the trusted ones as well.
    """
    transitions = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.2, 0.8], [0.0, 1.0]]])  # comply, cheat
    follower = np.array([[[0.0, 0.5], [0.0, 1.0]], [[-0.25, -1.0], [-0.25, 1.0]]])  # audit, no audit
    leader = np.array([[[-0.3, -0.8], [0.0, -1.0]]] * 2)
    return StackelbergGame(TabularMDP(transitions, np.array([1.0, 0.0]), discount), follower, leader, temperature)


def random_game(
    num_states: int = 3,
    num_leader_actions: int = 3,
    num_follower_actions: int = 3,
    discount: float = 0.8,
    temperature: float = 0.1,
    seed: int = 0,
) -> StackelbergGame:
    """A Markov game of independent standard normal payoffs on a `random_mdp` of the same seed."""
    follower, leader = np.random.default_rng(seed).normal(
        size=(2, num_states, num_leader_actions, num_follower_actions)
    )
    return StackelbergGame(random_mdp(num_states, num_follower_actions, discount, seed), follower, leader, temperature)
