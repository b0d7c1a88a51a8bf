"""Environments as users might write them."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np


class Drift:
    """A point that drifts at random; both of its numbers are seen. The bare form: sizes as attributes, four values."""

    obs_dim, act_dim, horizon = 2, 1, 4

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.point = np.zeros(2)

    def reset(self):
        self.point = self.random.normal(size=2)
        return self.point  # the same array at every step: what was given out must not change

    def step(self, action):
        self.point += self.random.normal(size=2) + action
        if self.point[0] > 50.0:
            raise FloatingPointError("the point is gone")
        return self.point, self.point[0], False, False


class SavedDrift(Drift):
    """The same with what an exact resume needs."""

    def state(self):
        return {"point": self.point.copy(), "random": self.random.bit_generator.state}

    def set_state(self, state):
        self.point = state["point"].copy()
        self.random.bit_generator.state = state["random"]


class SharedDrift(Drift):
    """State methods that hand out, and take over, the very array that the steps write to."""

    def state(self):
        return {"point": self.point}

    def set_state(self, state):
        self.point = state["point"]


class SecretiveDrift(Drift):
    """A state that no process can send to another."""

    def state(self):
        return {"next": lambda: self.random.normal()}

    def set_state(self, state):
        pass


class Longer(Drift):
    """Episodes as long as the seed says."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.horizon = seed


class Dies(Drift):
    def step(self, action):
        os._exit(7)


class Box:
    """What of gymnasium's boxes counts."""

    def __init__(self, low, high, dtype=np.float32):
        self.low, self.high, self.dtype = np.array(low, dtype), np.array(high, dtype), np.dtype(dtype)
        self.shape = self.low.shape


class Gym:
    """The form of gymnasium: spaces, spec, a seeded reset, five values."""

    def __init__(self) -> None:
        self.observation_space = Box(np.full((2, 3), -1.0), np.full((2, 3), 1.0))
        self.action_space = Box([[-2.0, 0.0]], [[4.0, np.inf]])
        self.spec = SimpleNamespace(max_episode_steps=5)
        self.seeds: list[int | None] = []
        self.actions: list[np.ndarray] = []
        self.ends = (False, False)

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        return np.arange(6.0).reshape(2, 3), {}

    def step(self, action):
        self.actions.append(action)
        return np.ones((2, 3)), 1, *self.ends, {"success": np.bool_(len(self.actions) == 2)}


def fails_to_start(seed: int) -> Drift:
    raise ValueError(f"no environment for {seed}")


not_a_function = 3
