"""The tabular problems that an agent can be trained on: the follower's side of each, without a leader."""

from __future__ import annotations

import numpy as np

from .environment import TabularEnvironment, TabularTask
from .problems.four_rooms import CELLS, GOALS, MOVES, four_rooms_mdp, state_of
from .problems.four_rooms import HORIZON as FOUR_ROOMS_HORIZON
from .problems.rand_mdp import rand_mdp as draw_rand_mdp

RAND_MDP_HORIZON = 100
RAND_MDP_PROBLEM = 0
"""Seed of the one problem that `tabular/rand-mdp` is; an environment's own seed draws its episodes only."""


def task_names() -> tuple[str, ...]:
    """All tabular tasks, sorted."""
    return tuple(sorted(_TASKS))


def make(task: str, seed: int) -> TabularEnvironment:
    """Make the task that `task_names` calls so."""
    return _TASKS[task](seed)


def four_rooms(seed: int) -> TabularEnvironment:
    """Four-Rooms as its follower meets it where the leader spends nothing (Thoma et al., NeurIPS 2024, sec. 4.1).

    From START to one of the two GOALS, each drawn for an episode with probability ½. The step taken at the goal earns 1 and
    ends the episode, which is a success; nothing else earns anything. Observations are the row and column of the follower
    and of its goal, each scaled so that the cells span [−1, 1].
    """
    low, high = np.min(CELLS, axis=0), np.max(CELLS, axis=0)
    tasks = []
    for number, goal in enumerate(GOALS):
        rewards = np.zeros((len(CELLS), len(MOVES)))
        rewards[state_of(goal)] = 1.0
        cells = np.concatenate((CELLS, np.broadcast_to(goal, (len(CELLS), 2))), axis=1)  # (S, 4)
        scaled = 2.0 * (cells - np.tile(low, 2)) / np.tile(high - low, 2) - 1.0
        tasks.append(TabularTask(four_rooms_mdp(number), rewards, scaled.astype(np.float32)))
    return TabularEnvironment("tabular/four-rooms", tasks, horizon=FOUR_ROOMS_HORIZON, ends_in_success=True, seed=seed)


def rand_mdp(seed: int) -> TabularEnvironment:
    """RandMDP's follower (Yang et al., AISTATS 2025) at the parameters that the leader starts from; one-hot observations."""
    problem = draw_rand_mdp(RAND_MDP_PROBLEM)
    rewards = problem.lower(problem.start).value
    task = TabularTask(problem.mdp, rewards, np.eye(problem.mdp.num_states, dtype=np.float32))
    return TabularEnvironment("tabular/rand-mdp", [task], horizon=RAND_MDP_HORIZON, ends_in_success=False, seed=seed)


_TASKS = {"four-rooms": four_rooms, "rand-mdp": rand_mdp}
