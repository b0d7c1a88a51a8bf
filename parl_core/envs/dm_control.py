"""Tasks of the DM Control suite (Tassa et al. 2018, arXiv:1801.00690)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import NonFiniteError, ParlError, import_extra
from .interface import Environment, Step
from .mujoco_state import Attributes, ModelChanges, integration_state, set_integration_state

_UNLIMITED_HORIZON = 1000  # for tasks without a time limit (lqr): the length of nearly all others


class DMControlEnvironment(Environment):
    """One task of the suite.

    Observations are the task's own, flattened in the task's own order (orientations, height, velocity for
    walker), float32. Actions in [−1, 1] are scaled to the actuators' ranges. Episodes last until the task's
    time limit (1000 steps for nearly all), which truncates; only a final discount of 0 terminates. Rewards
    are the task's, 0 to 1 a step except in the lqr domain.

    In the lqr domain the seed also draws the system itself, not only its initial states.
    """

    def __init__(self, domain: str, task: str, seed: int) -> None:
        suite = _import_suite()
        self._environment = suite.load(domain, task, task_kwargs={"random": seed})
        mujoco = import_extra("mujoco", "dm-control", needed_for="DM Control")
        self._renderer_error: type[Exception] = mujoco.FatalError
        self._step1: Callable[[Any, Any], None] = mujoco.mj_step1
        self._physics_error: type[Exception] = import_extra(
            "dm_control.rl.control", "dm-control", needed_for="DM Control"
        ).PhysicsError
        # The limit in steps has no public accessor. The episode is cut at the first step that reaches it.
        if math.isinf(self._environment._step_limit):
            self._environment._step_limit = _UNLIMITED_HORIZON
        drawn = ("jnt_stiffness",) if domain == "lqr" else ()
        self._model_changes = ModelChanges(self._environment.physics.model.ptr, drawn=drawn)
        self._task_attributes = Attributes(self._environment.task, self._environment.physics.data.ptr, ("_random",))
        self._slices: list[tuple[str, slice, bool]] = []
        stop = 0
        for key, spec in self._environment.observation_spec().items():
            start, stop = stop, stop + math.prod(spec.shape)
            self._slices.append((key, slice(start, stop), len(spec.shape) > 1))
        action_spec = self._environment.action_spec()
        # Actuators without limits (lqr) come with ±mjMAXVAL = 1e10, no range to scale to: their actions stay
        # as they are.
        limited = action_spec.maximum < 1e10
        self._center = np.where(limited, (action_spec.maximum + action_spec.minimum) / 2, 0.0)
        self._half_range = np.where(limited, (action_spec.maximum - action_spec.minimum) / 2, 1.0)
        super().__init__(
            f"dm_control/{domain}-{task}",
            obs_dim=stop,
            act_dim=math.prod(action_spec.shape),
            horizon=math.ceil(self._environment._step_limit),
            reports_success=False,
        )

    def close(self) -> None:
        self._environment.close()
        self._environment.physics.free()

    def _state(self) -> dict[str, Any]:
        environment = self._environment
        data = environment.physics.data.ptr
        random = environment.task.random.get_state(legacy=False)
        return {
            "physics": integration_state(environment.physics.model.ptr, data),
            "sensors": data.sensordata.copy(),
            "model": self._model_changes.state(),
            "task": self._task_attributes.state(),
            "random": {**random, "state": {"key": random["state"]["key"].copy(), "pos": random["state"]["pos"]}},
            "step_count": environment._step_count,
            "reset_next_step": environment._reset_next_step,
        }

    def _set_state(self, state: Mapping[str, Any]) -> None:
        environment = self._environment
        model, data = environment.physics.model.ptr, environment.physics.data.ptr
        self._model_changes.set_state(state["model"])
        set_integration_state(model, data, state["physics"])
        # dm_control begins a step where mj_step1 has left off, and mj_step1 leaves the warm start alone.
        self._step1(model, data)
        # Accelerations and forces are sensed in the other half of the step before.
        data.sensordata[:] = state["sensors"]
        self._task_attributes.set_state(state["task"])
        environment.task.random.set_state(dict(state["random"]))
        environment._step_count = state["step_count"]
        environment._reset_next_step = state["reset_next_step"]

    def _reset(self) -> npt.NDArray[np.float32]:
        try:
            return self._flatten(self._environment.reset().observation)
        except (RuntimeError, self._renderer_error) as error:  # which one depends on the renderer that was chosen
            if "gl" not in str(error).lower():
                raise
            raise ParlError(
                f"{self.name} hands its terrain to OpenGL at every reset: set MUJOCO_GL=egl (Debian package "
                "libegl1) or MUJOCO_GL=osmesa (libosmesa6) before starting"
            ) from error

    def _step(self, action: npt.NDArray[np.float64]) -> Step:
        try:
            time_step = self._environment.step(self._center + self._half_range * action)
        except self._physics_error as error:
            raise NonFiniteError(
                f"{self.name}: the simulation broke down at step {self._num_steps} of the episode: {error}"
            ) from error
        ended = time_step.last()
        terminated = ended and time_step.discount == 0.0
        return Step(
            observation=self._flatten(time_step.observation),
            reward=float(time_step.reward),
            terminated=terminated,
            truncated=ended and not terminated,
            success=False,
        )

    def _flatten(self, observation: Mapping[str, Any]) -> npt.NDArray[np.float32]:
        flat = np.empty(self.obs_dim, dtype=np.float32)
        for key, where, many_axes in self._slices:
            flat[where] = observation[key].ravel() if many_axes else observation[key]
        return flat


def task_names() -> tuple[str, ...]:
    """All tasks of the suite as `<domain>-<task>`, sorted."""
    return tuple(sorted(f"{domain}-{task}" for domain, task in _import_suite().ALL_TASKS))


def make(task: str, seed: int) -> DMControlEnvironment:
    """Make the task that `task_names` calls `<domain>-<task>`."""
    domain, _, name = task.partition("-")
    return DMControlEnvironment(domain, name, seed)


def _import_suite() -> ModuleType:
    """Import the suite on any machine, with or without a screen and OpenGL.

    On import dm_control picks an OpenGL library unless MUJOCO_GL names one: it initialises GLFW, which warns
    where there is no screen. Training never draws, so unless the user has chosen, dm_control is told to take
    none, for the time of the import only: MuJoCo's own renderer, imported before, and child processes are
    left as the user has them.
    """
    import_extra("mujoco", "dm-control", needed_for="DM Control")
    chosen = "MUJOCO_GL" in os.environ
    os.environ.setdefault("MUJOCO_GL", "off")
    try:
        suite = import_extra("dm_control.suite", "dm-control", needed_for="DM Control")
    finally:
        if not chosen:
            del os.environ["MUJOCO_GL"]
    suite.quadruped.np = _NumPyWithIn1d()
    return suite


class _NumPyWithIn1d:
    """NumPy for dm_control's quadruped domain, which calls `np.in1d` (in 1.0.28); NumPy 2.4 removed that."""

    in1d = staticmethod(np.isin)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)
