"""Finite MDPs as environments: what they are to an agent that sees observations and knows no table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..interface import Environment, Step
from .mdp import Array, TabularMDP, checked_table


class TabularTask(NamedTuple):
    """An MDP with what a step in it earns and what an agent sees of its states."""

    mdp: TabularMDP
    rewards: Array
    """(S, A), earned for the action taken in a state, wherever it leads."""
    observations: npt.NDArray[np.float32]
    """(S, do)."""


class TabularEnvironment(Environment):
    """One of several equally likely MDPs in each episode, drawn at its start.

    Actions are boxes [−1, 1]^A, and the largest entry is the action taken, the first of them if there are several: so an
    agent for continuous actions, such as SAC, can choose among A, and uniformly random boxes are uniformly random
    actions. An episode terminates where the MDP ends it; the observation is then that of the last state, since there is no
    next one. After `horizon` steps it is truncated.

    Args:
        name: as `make_env` takes it.
        tasks: alike in the numbers of actions and of what is observed.
        horizon: steps of an episode, at most.
        ends_in_success: whether an episode that the MDP ends is a success; else success is not reported.
        seed: of the draws of MDPs, first states and transitions.

    Raises:
        ValueError: tasks that do not fit together, or a horizon below 1.
        NonFiniteError: a NaN or an infinity in the rewards.
    """

    def __init__(
        self, name: str, tasks: Sequence[TabularTask], *, horizon: int, ends_in_success: bool, seed: int
    ) -> None:
        if not tasks:
            raise ValueError("tasks must hold at least one task, got none")
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        sizes = {_sizes(task) for task in tasks}
        if len(sizes) > 1:
            raise ValueError(f"tasks must agree in (do, A), got {sorted(sizes)}")
        ((obs_dim, act_dim),) = sizes
        super().__init__(name, obs_dim=obs_dim, act_dim=act_dim, horizon=horizon, reports_success=ends_in_success)
        self._samplers = [_Sampler(task) for task in tasks]
        self._random = np.random.default_rng(seed)
        self._task, self._state_index = 0, 0

    def _state(self) -> dict[str, Any]:
        return {"task": self._task, "state": self._state_index, "random": self._random.bit_generator.state}

    def _set_state(self, state: Mapping[str, Any]) -> None:
        task, index = state["task"], state["state"]
        if not (0 <= task < len(self._samplers) and 0 <= index < len(self._samplers[task].observations)):
            raise ValueError(f"there is no state {index} of task {task}")
        self._random.bit_generator.state = state["random"]
        self._task, self._state_index = task, index

    def _reset(self) -> npt.NDArray[np.float32]:
        self._task = int(self._random.integers(len(self._samplers)))
        sampler = self._samplers[self._task]
        self._state_index = _draw(sampler.initial, self._random)
        return sampler.observations[self._state_index].copy()

    def _step(self, action: npt.NDArray[np.float64]) -> Step:
        sampler = self._samplers[self._task]
        choice = int(action.argmax())
        reward = float(sampler.rewards[self._state_index, choice])
        successor = _draw(sampler.successors[self._state_index, choice], self._random)
        terminated = successor == len(sampler.observations)
        if not terminated:
            self._state_index = successor
        return Step(
            observation=sampler.observations[self._state_index].copy(),
            reward=reward,
            terminated=terminated,
            truncated=self._num_steps == self.horizon and not terminated,
            success=terminated and self.reports_success,
        )


class _Sampler:
    """A task as cumulative distributions, to draw from by one uniform number each."""

    def __init__(self, task: TabularTask) -> None:
        mdp = task.mdp
        self.rewards = checked_table("rewards", task.rewards, mdp)
        self.observations = np.asarray(task.observations, dtype=np.float32)
        self.initial = _cumulative(mdp.initial)
        # The end of the episode counts as state S.
        self.successors = _cumulative(np.concatenate((mdp.transitions, mdp.ends[..., None]), axis=-1))  # (S, A, S+1)


def _sizes(task: TabularTask) -> tuple[int, int]:
    """(do, A)."""
    shape = np.shape(task.observations)
    if len(shape) != 2 or shape[0] != task.mdp.num_states:
        raise ValueError(f"observations must have shape (S, do) with S = {task.mdp.num_states}, got {shape}")
    return shape[1], task.mdp.num_actions


def _cumulative(probabilities: Array) -> Array:
    """Sums along the last axis that end in exactly 1, so that no uniform number lies beyond them."""
    sums = np.cumsum(probabilities, axis=-1)
    return sums / sums[..., -1:]


def _draw(cumulative: Array, random: np.random.Generator) -> int:
    """The first index whose cumulative probability exceeds a uniform number: never one of probability zero."""
    return int(cumulative.searchsorted(random.random(), side="right"))
