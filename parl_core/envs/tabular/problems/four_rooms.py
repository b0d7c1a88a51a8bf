"""Four-Rooms with incentives: the public benchmark of bilevel reinforcement learning (Thoma et al., NeurIPS 2024, sec. 4.1).

A follower walks a 13 × 13 map of four rooms from START to one of two goals, where the episode ends with reward 1. The
leader spends a budget of .2 on penalties for entering cells, so as to lead the follower past TARGET, and pays for what it
spends when the follower arrives. The numbers are those of the authors' transition matrix and published configuration.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..mdp import Array, TabularMDP, checked
from ..problem import BilevelMDP, ParametricReward
from ..soft import check_temperature

MAP = (
    "#############",
    "#.....#.....#",
    "#.....#.....#",
    "#...........#",
    "#.....#.....#",
    "#.....#.....#",
    "##.####.....#",
    "#.....###.###",
    "#.....#.....#",
    "#.....#.....#",
    "#...........#",
    "#.....#.....#",
    "#############",
)
CELLS = tuple((row, column) for row, line in enumerate(MAP) for column, sign in enumerate(line) if sign == ".")
"""(row, column) of the 104 states."""
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""Actions: up, right, down, left."""
START, GOALS, TARGET = (4, 1), ((1, 9), (11, 11)), (8, 4)
DISCOUNT = 0.99
INTENDED = 0.56
"""Probability of the intended move; the other three share the rest. A move into a wall stays where it is."""
HORIZON = 200
"""Steps after which an episode is cut; the shortest ways to the goals take 12 and 18."""
BUDGET = 0.2
"""What the leader can spend."""
NUM_WEIGHTS = len(CELLS) + 1
"""One weight for each state, and one for what is not spent."""
INITIAL_SCALE = 0.01
"""Standard deviation of the weights that a run starts from."""


def state_of(cell: tuple[int, int]) -> int:
    """Index of the state at (row, column)."""
    return CELLS.index(cell)


def four_rooms_mdp(goal: int) -> TabularMDP:
    """The follower's MDP on the way to GOALS[goal], where its episode ends with the next step."""
    index = {cell: state for state, cell in enumerate(CELLS)}
    slip = (1.0 - INTENDED) / (len(MOVES) - 1)
    transitions = np.zeros((len(CELLS), len(MOVES), len(CELLS)))
    for (row, column), state in index.items():
        if (row, column) == GOALS[goal]:
            continue
        for move, (down, right) in enumerate(MOVES):
            successor = index.get((row + down, column + right), state)
            transitions[state, :, successor] += slip
            transitions[state, move, successor] += INTENDED - slip
    initial = np.zeros(len(CELLS))
    initial[index[START]] = 1.0
    return TabularMDP(transitions, initial, DISCOUNT)


class FourRooms(BilevelMDP):
    """Four-Rooms on the way to one of its goals; the published objective is the mean over the two.

    The leader's parameters are weights w (105,). Incentives −.2 softmax(w)_s, s < 104, are added to the follower's reward of
    being in state s, save at the goal, where it gets 1. The leader gets 1 for every step in TARGET, and at the goal −cost
    times the sum of the incentives' sizes, .2 (1 − softmax(w)_104).

    Args:
        goal: 0 or 1, which of GOALS.
        temperature: λ of the follower's entropy bonus; .001, .003 and .005 are published.
        cost: c, what the leader pays for a unit of incentives; 1, 3 and 5 are published.
    """

    num_params = NUM_WEIGHTS

    def __init__(self, goal: int, temperature: float, cost: float) -> None:
        if goal not in (0, 1):
            raise ValueError(f"goal must be 0 or 1, got {goal!r}")
        check_temperature(temperature)
        self.mdp = four_rooms_mdp(goal)
        self.temperature, self.cost = float(temperature), float(cost)
        self.goal_state = state_of(GOALS[goal])

    def incentives(self, params: npt.ArrayLike) -> Array:
        """(104,), what the leader adds to the follower's reward of being in each state but the goal."""
        return self._incentives(params)[0]

    def lower(self, params: npt.ArrayLike) -> ParametricReward:
        """1 at the goal and the incentive elsewhere, whatever the action."""
        incentives, jacobian = self._incentives(params)
        incentives[self.goal_state], jacobian[self.goal_state] = 1.0, 0.0
        return _for_all_actions(incentives, jacobian)

    def upper(self, params: npt.ArrayLike) -> ParametricReward:
        """1 at the target, and at the goal the cost of the incentives, whatever the action."""
        incentives, incentives_jacobian = self._incentives(params)
        value, jacobian = np.zeros(len(CELLS)), np.zeros((len(CELLS), NUM_WEIGHTS))
        value[state_of(TARGET)] = 1.0
        value[self.goal_state] += self.cost * incentives.sum()  # the incentives are negative
        jacobian[self.goal_state] = self.cost * incentives_jacobian.sum(axis=0)
        return _for_all_actions(value, jacobian)

    def _incentives(self, params: npt.ArrayLike) -> tuple[Array, Array]:
        """(104,) and its derivatives (104, 105)."""
        weights = checked("params", params, (NUM_WEIGHTS,))
        shares = np.exp(weights - weights.max())
        shares /= shares.sum()
        jacobian = -BUDGET * (np.diag(shares) - np.outer(shares, shares))
        return -BUDGET * shares[:-1], jacobian[:-1]


def _for_all_actions(value: Array, jacobian: Array) -> ParametricReward:
    """A reward of the state alone as one of state and action."""
    return ParametricReward(
        np.repeat(value[:, None], len(MOVES), axis=1), np.repeat(jacobian[:, None], len(MOVES), axis=1)
    )
