"""Tasks of MetaWorld v3 (Yu et al. 2019, arXiv:1910.10897) as preference-based RL has used them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import import_extra
from .interface import Environment, Step
from .mujoco_state import Attributes, ModelChanges, integration_state, set_integration_state


class MetaWorldEnvironment(Environment):
    """One task with a new random object or goal position in every episode, and the goal hidden from the
    observation.

    This is the set-up of B-Pref (Lee et al. 2021), on which the published preference-RL curves were made: the
    bare task class, positions drawn anew at every reset, the goal entries of the observation zero. It is
    *not* gymnasium's `Meta-World/MT1`, which cycles through 50 fixed positions and shows the goal.

    Observations are the task's 39 numbers as float32; rewards are the task's, 0 to 10 a step. Episodes last
    500 steps and are truncated there; success does not end them, and it may be lost again before the end.
    """

    def __init__(self, task: str, seed: int) -> None:
        environment = _import_metaworld().ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        # Without these four the positions are frozen, or come from NumPy's global random numbers;
        # reset(seed=) is ignored by MetaWorld.
        environment._set_task_called = True
        environment._freeze_rand_vec = False
        environment.seeded_rand_vec = True
        environment.seed(seed)
        self._environment = environment
        mujoco = import_extra("mujoco", "metaworld", needed_for="MetaWorld")
        self._forward: Callable[[Any, Any], None] = mujoco.mj_forward
        self._model_changes = ModelChanges(environment.model)
        # No step depends on the pictures that are drawn.
        self._attributes = Attributes(environment, environment.data, ("_np_random", "mujoco_renderer", "render_mode"))
        super().__init__(
            f"metaworld/{task}",
            obs_dim=environment.observation_space.shape[0],
            act_dim=environment.action_space.shape[0],
            horizon=environment.max_path_length,
            reports_success=True,
        )

    def close(self) -> None:
        self._environment.close()

    def _state(self) -> dict[str, Any]:
        environment = self._environment
        return {
            "physics": integration_state(environment.model, environment.data),
            "model": self._model_changes.state(),
            "task": self._attributes.state(),
            "random": environment.np_random.bit_generator.state,
        }

    def _set_state(self, state: Mapping[str, Any]) -> None:
        environment = self._environment
        self._model_changes.set_state(state["model"])
        # Once for what is computed from it, and again, since computing may have changed the warm start.
        set_integration_state(environment.model, environment.data, state["physics"])
        self._forward(environment.model, environment.data)
        set_integration_state(environment.model, environment.data, state["physics"])
        self._attributes.set_state(state["task"])
        environment.np_random.bit_generator.state = state["random"]

    def _reset(self) -> npt.NDArray[np.float32]:
        observation, _ = self._environment.reset()
        return observation.astype(np.float32)

    def _step(self, action: npt.NDArray[np.float64]) -> Step:
        observation, reward, terminated, truncated, info = self._environment.step(action)
        return Step(
            observation=observation.astype(np.float32),
            reward=float(reward),
            terminated=terminated,
            truncated=truncated,
            success=bool(info["success"]),
        )


def task_names() -> tuple[str, ...]:
    """All v3 tasks without their version, sorted."""
    return tuple(sorted(name.removesuffix("-v3") for name in _import_metaworld().ALL_V3_ENVIRONMENTS))


def make(task: str, seed: int) -> MetaWorldEnvironment:
    """Make the task that `task_names` calls so."""
    return MetaWorldEnvironment(task, seed)


def _import_metaworld() -> ModuleType:
    return import_extra("metaworld", "metaworld", needed_for="MetaWorld")
