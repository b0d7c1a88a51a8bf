"""A tiny environment and configuration with which whole runs take a second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from parl_core.envs.interface import Environment, Step
from parl_core.preference.semi_supervised import SurfConfig
from parl_core.rl.sac import SACConfig
from parl_core.training.config import ImplicitConfig, RewardConfig, TrainConfig


class PointMass(Environment):
    """A point on a line, pushed by the action; the reward is highest at the origin. Episodes of 25 steps."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name, obs_dim=2, act_dim=1, horizon=25, reports_success=True)
        self.random = np.random.default_rng(seed)
        self.where = np.zeros(2)
        self.taken = 0

    def _reset(self):
        self.where = self.random.uniform(-1, 1, size=2)
        self.taken = 0
        return self.where.astype(np.float32)

    def _step(self, action):
        position, velocity = self.where
        velocity = 0.9 * velocity + 0.1 * action[0]
        self.where = np.array([position + 0.1 * velocity, velocity])
        self.taken += 1
        reward = float(1.0 - min(abs(position), 1.0))
        return Step(self.where.astype(np.float32), reward, False, self.taken == self.horizon, reward > 0.9)

    def _state(self) -> dict[str, Any]:
        random = self.random.bit_generator.state
        return {"where": self.where.copy(), "taken": self.taken, "random": random}

    def _set_state(self, state: Mapping[str, Any]) -> None:
        self.where, self.taken = state["where"].copy(), state["taken"]
        self.random.bit_generator.state = state["random"]


def tiny_config(algorithm: str = "a-parl", **changes: Any) -> TrainConfig:
    """A run of a few hundred steps with three query sessions."""
    options: dict[str, Any] = dict(
        env="point-mass",
        algorithm=algorithm,
        steps=300,
        random_steps=40,
        pretrain_steps=40 if algorithm != "oracle" else 0,
        updates_after_reset=3,
        replay_capacity=250,
        eval_interval=100,
        eval_episodes=2,
        checkpoint_interval=50,
        sac=SACConfig(hidden=(8, 8), batch_size=16),
        reward=RewardConfig(
            hidden=(8,),
            segment_length=5,
            label_budget=18,
            labels_per_session=8,
            session_interval=60,
            max_epochs=4,
            pool_episodes=4,
        ),
        surf=SurfConfig(inv_label_ratio=3, crop=2),
        implicit=ImplicitConfig(refresh_interval=3),
    )
    return TrainConfig(**{**options, **changes})


def replace_environments(monkeypatch, make):
    """Make all environments by make(name, seed), whatever they are called."""
    for module in ("parl_core.training.train", "parl_core.envs.vector"):
        monkeypatch.setattr(f"{module}.make_env", make)
