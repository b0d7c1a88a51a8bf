"""The interface that every task stands behind: seeded, checked, actions in [−1, 1]."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import NonFiniteError

_ROUNDING = 1e-6  # how far beyond ±1 an action may lie through rounding; it is clipped without a word


class Step(NamedTuple):
    """What one environment step gives back."""

    observation: npt.NDArray[np.float32]
    """(do,) the observation after the step."""
    reward: float
    """The task's own (true) reward, in the task's own scale."""
    terminated: bool
    """The episode ended in a state of value zero: do not bootstrap."""
    truncated: bool
    """The episode was cut by its time limit: bootstrap as if it went on."""
    success: bool
    """Whether the task counts as solved in this state; always False unless the task `reports_success`."""


class Environment(ABC):
    """A seeded episodic task with a flat observation and actions in [−1, 1].

    Subclasses implement `_reset`, `_step`, `_state` and `_set_state`; `reset` and `step` check what goes in and
    out. An instance belongs to one thread.

    Attributes:
        name: the name that `make_env` took.
        obs_dim, act_dim: sizes do and da of an observation and an action.
        horizon: steps after which an episode is truncated.
        reports_success: whether `Step.success` means anything.
        restores_state: whether `set_state` puts an episode back to where it stood. Where it does not, it ends the
            episode, and the next reset begins a new one with whatever random numbers the instance has then.
    """

    restores_state: bool = True

    def __init__(self, name: str, *, obs_dim: int, act_dim: int, horizon: int, reports_success: bool) -> None:
        self.name = name
        self.obs_dim = obs_dim
        self.act_dim = act_dim
        self.horizon = horizon
        self.reports_success = reports_success
        self._num_steps = 0
        self._in_episode = False

    def reset(self) -> npt.NDArray[np.float32]:
        """Begin an episode and return its first observation, (do,) float32.

        Raises:
            NonFiniteError: the simulator returned a NaN or an infinity.
        """
        self._in_episode = False
        self._num_steps = 0
        observation = self._reset()
        self._check_observation(observation, "that reset returned")
        self._in_episode = True
        return observation

    def step(self, action: npt.ArrayLike) -> Step:
        """Take one step.

        Args:
            action: (da,) in [−1, 1]; up to 1e-6 beyond counts as rounding and is clipped.

        Raises:
            RuntimeError: no episode is under way (before the first reset, or after an episode's last step).
            ValueError: the action has the wrong shape or lies outside [−1, 1].
            NonFiniteError: a NaN or an infinity in the action, or in what the simulator returned; in the
                latter case the episode is over.
        """
        if not self._in_episode:
            raise RuntimeError(
                f"{self.name}: step needs an episode under way; call reset first"
                + (f" (the last one ended after {self._num_steps} steps)" if self._num_steps else "")
            )
        checked = self._check_action(action)
        self._in_episode = False  # stays so if anything below raises: a half-taken step cannot be continued
        self._num_steps += 1
        step = self._step(checked)
        self._check_observation(step.observation, f"after step {self._num_steps} of the episode")
        if not math.isfinite(step.reward):
            raise NonFiniteError(
                f"{self.name}: the reward of step {self._num_steps} of the episode must be finite, got {step.reward}"
            )
        self._in_episode = not (step.terminated or step.truncated)
        return step

    def state(self) -> dict[str, Any]:
        """Everything that the following steps and resets depend on, the episode under way included.

        Nested dicts and lists of NumPy arrays, numbers, strings and None; none of it changes when the environment goes
        on. Where `restores_state` is False it says only that.

        Raises:
            ParlError: the simulator holds something that cannot be saved.
        """
        if not self.restores_state:
            return {"restores_state": False}
        return {
            "restores_state": True,
            "name": self.name,
            "num_steps": self._num_steps,
            "in_episode": self._in_episode,
            "simulator": self._state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned, in this or another instance of the same task, whatever its seed: the
        following steps and resets repeat bit for bit.

        After an error there is no episode under way; its state is then undefined until `set_state` succeeds.

        Raises:
            ValueError: `state` is not one that `state` of such an environment returned.
        """
        self._in_episode = False
        self._num_steps = 0
        try:
            if not state["restores_state"]:
                return
            if not self.restores_state:
                raise ValueError("it holds an episode, but the environment has no state() and set_state()")
            if state["name"] != self.name:
                raise ValueError(f"it is one of {state['name']}")
            num_steps, in_episode = int(state["num_steps"]), bool(state["in_episode"])
            self._set_state(state["simulator"])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"state must come from state() of {self.name}: {reason}") from error
        self._num_steps = num_steps
        self._in_episode = in_episode

    def close(self) -> None:  # noqa: B027  (a simulator that holds nothing has nothing to release)
        """Release what the simulator holds."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What `state` says of the simulator: its state, the task's own variables and its random numbers."""

    @abstractmethod
    def _set_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `_state` returned."""

    @abstractmethod
    def _reset(self) -> npt.NDArray[np.float32]:
        """Begin an episode; a fresh (do,) float32 array."""

    @abstractmethod
    def _step(self, action: npt.NDArray[np.float64]) -> Step:
        """Take one step with a checked (da,) action; the observation is a fresh float32 array."""

    def _check_action(self, action: npt.ArrayLike) -> npt.NDArray[np.float64]:
        checked = np.asarray(action, dtype=np.float64)
        if checked.shape != (self.act_dim,):
            raise ValueError(f"{self.name}: action must have shape ({self.act_dim},), got {checked.shape}")
        # A loop over plain floats beats two NumPy reductions at these sizes, and a NaN fails both
        # comparisons.
        if all(-1.0 <= value <= 1.0 for value in checked.tolist()):
            return checked
        if not np.isfinite(checked).all():
            raise NonFiniteError(f"{self.name}: action must be finite, got {checked.tolist()}")
        if np.abs(checked).max() > 1.0 + _ROUNDING:
            raise ValueError(f"{self.name}: action must lie in [-1, 1], got {checked.tolist()}")
        return np.clip(checked, -1.0, 1.0)

    def _check_observation(self, observation: npt.NDArray[np.float32], where: str) -> None:
        if observation.shape != (self.obs_dim,):
            raise ValueError(
                f"{self.name}: the observation {where} must have shape ({self.obs_dim},), got {observation.shape}"
            )
        finite = np.isfinite(observation)
        if not finite.all():
            index = int(np.argmin(finite))
            raise NonFiniteError(
                f"{self.name}: the observation {where} must be finite, got {observation[index]} at index {index}"
            )
