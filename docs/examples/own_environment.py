"""PEBBLE on an environment of your own: a function from a seed to an object with `reset` and `step`.

From the command line, in this folder, with the larger networks of the preset:

    parl train --env own_environment:Cart --algorithm pebble --steps 800 --random-steps 100 --pretrain-steps 100
        --reward.segment-length 10
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console

from parl_core.rl.sac import SACConfig
from parl_core.training.config import RewardConfig, TrainConfig
from parl_core.training.train import Options, train


class Cart:
    """A cart on a rail, to be brought to rest in the middle. Actions are in [−1, 1], one reward a step."""

    obs_dim, act_dim, horizon = 2, 1, 20

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)

    def reset(self):
        self.position, self.velocity = self.random.uniform(-1, 1), 0.0
        return self.position, self.velocity

    def step(self, action):
        self.velocity = 0.5 * self.velocity + 0.3 * action[0]
        self.position = np.clip(self.position + self.velocity, -2, 2)
        reward = 1 - abs(self.position)
        return (self.position, self.velocity), reward, False, False  # terminated and truncated; `horizon` ends it

    # Optional: with these two a run that is killed and resumed gives the same numbers as one that is not.
    def state(self):
        return {"random": self.random.bit_generator.state, "position": self.position, "velocity": self.velocity}

    def set_state(self, state):
        self.random.bit_generator.state = state["random"]
        self.position, self.velocity = state["position"], state["velocity"]


def main(steps: int = 800) -> tuple[float, float]:
    config = TrainConfig(
        env="cart",
        algorithm="pebble",
        steps=steps,
        random_steps=100,
        pretrain_steps=100,
        eval_interval=200,
        threads=1,
        sac=SACConfig(hidden=(32, 32), batch_size=64, actor_learning_rate=3e-3, critic_learning_rate=3e-3),
        reward=RewardConfig(
            hidden=(32, 32), segment_length=10, label_budget=100, labels_per_session=25, session_interval=100
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = train(config, Path(folder, "run"), Console(quiet=True), Options(environment=Cart))
        summary = json.loads((run.path / "summary.json").read_text())
    random, last = summary["random_return"], summary["last_return"]
    print(f"true return of an episode: {random:.1f} by random actions, {last:.1f} by the policy, at most 20")
    return random, last


if __name__ == "__main__":
    main()
