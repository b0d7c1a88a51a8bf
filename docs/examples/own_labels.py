"""PEBBLE with labels of your own: an object with `label` and `episode_ended`, here one that asks on the terminal.

Run it with `--ask` to be asked yourself; else a script answers, which likes the right.
"""

import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from parl_core.rl.sac import SACConfig
from parl_core.training.config import RewardConfig, TrainConfig
from parl_core.training.train import Options, train

ANSWERS = {"a": 0.0, "b": 1.0, "=": 0.5, "?": float("nan")}  # the probability that B is preferred; NaN: not judged


class Terminal:
    """Shows where two segments end, and asks which is better."""

    def __init__(self, ask=input):
        self.ask = ask

    def label(self, first, second):
        """Two batches of segments, observations (M, L, do) and actions (M, L, da), to M labels."""
        ends = torch.stack([first.observations[:, -1, 0], second.observations[:, -1, 0]], dim=1)
        return torch.tensor([self.answer(a, b) for a, b in ends.tolist()])

    def answer(self, a, b):
        return ANSWERS[self.ask(f"A ends at {a:+.2f}, B at {b:+.2f}. Which is better? a, b, = (equal), ? (skip): ")]

    def episode_ended(self, true_return, length):
        """Told of every episode; this source has no use for it."""


def likes_the_right(question):
    a, b = map(float, re.findall(r"[+-]\d+\.\d+", question))
    return "=" if a == b else "ab"[b > a]


class Rail:
    """A point that moves by its action. Its reward is never shown to who learns; the evaluations report it."""

    obs_dim, act_dim, horizon = 1, 1, 20

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)

    def reset(self):
        self.position = self.random.uniform(-1, 1)
        return [self.position]

    def step(self, action):
        self.position = np.clip(self.position + 0.2 * action[0], -1, 1)
        return [self.position], self.position, False, False


def main(ask=likes_the_right, steps: int = 600) -> float:
    config = TrainConfig(
        env="rail",
        algorithm="pebble",
        steps=steps,
        random_steps=100,
        pretrain_steps=100,
        eval_interval=200,
        threads=1,
        sac=SACConfig(hidden=(32, 32), batch_size=64, actor_learning_rate=3e-3, critic_learning_rate=3e-3),
        reward=RewardConfig(
            hidden=(32, 32), segment_length=5, label_budget=60, labels_per_session=20, session_interval=100
        ),
    )
    options = Options(environment=Rail, label_source=Terminal(ask))
    with tempfile.TemporaryDirectory() as folder:
        run = train(config, Path(folder, "run"), Console(quiet=True), options)
        mean_position = float(run.rows[-1]["true_return"]) / Rail.horizon
    print(f"mean position of the policy in the end, between -1 (left) and 1 (right): {mean_position:.2f}")
    return mean_position


if __name__ == "__main__":
    main(input if "--ask" in sys.argv else likes_the_right)
