"""PEBBLE on walker-walk, the whole loop in the middle of a run: our `Trainer`, and a plain eager loop.

Everyone has the networks and the batches of the preset `cpu`, and in every block its shares of a run: an update for each
environment step, labels, epochs of reward learning and steps of evaluation in their proportion to those. Only the blocks
are shorter than the preset's intervals, and so are the episodes that are evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers.preference_loop import PreferenceLoop
from benchmarks.peers.soft_actor_critic import ACT_DIM, OBS_DIM, check_updates
from parl_core.envs.interface import Environment, Step
from parl_core.envs.registry import make_env
from parl_core.envs.vector import make_environments
from parl_core.ops import backend
from parl_core.training.config import TrainConfig
from parl_core.training.presets import preset
from parl_core.training.trainer import Evaluated, Ticked, Trainer
from parl_core.training.upper_level import SessionEnded

ENV = "dm_control/walker-walk"
WARM_UP = 1200
"""Environment steps before the first block: one episode, which the first labels are on, and what fills up the block."""
FIRST_LABELS = 650
"""Labels before the first block. One epoch on them, six steps, is the share of 400 environment steps in the reward learning
of the preset: runs of 80 000 steps, until the last of the 1000 labels, took 1102 and 1233 steps in 20 sessions."""
PROBED = 256
"""Transitions whose reward is compared with what the reward networks say."""
COUNTS = ("steps", "updates", "sessions", "labels", "epochs", "evaluations")
Run = Callable[[], Any]
"""Runs a block. Returns the `COUNTS` of it, then the parameters of actor, critics and rewards, and 1 for each of these that
holds: all parameters are finite; each tensor of them has moved; the replay holds the rewards of the latest networks."""


def configuration(steps: int, rounds: int) -> TrainConfig:
    """The preset with all intervals shortened to blocks of `steps`, in proportion."""
    config = preset(ENV, "pebble", "cpu")
    labels = config.reward.labels_per_session * steps // config.reward.session_interval
    return replace(
        config,
        steps=10**9,
        random_steps=WARM_UP,
        pretrain_steps=0,
        eval_interval=steps,
        eval_episodes=1,
        reward=replace(
            config.reward,
            session_interval=steps,
            labels_per_session=labels,
            max_epochs=1,
            accuracy_target=1.0,  # never exceeded: everyone's fits are equally long
            label_budget=FIRST_LABELS + rounds * labels,
        ),
    )


def evaluation_steps(steps: int) -> int:
    """The share of a block."""
    config = preset(ENV, "pebble", "cpu")
    return steps * config.eval_episodes * 1000 // config.eval_interval


def num_parameters(config: TrainConfig) -> tuple[int, int, int]:
    """Of the actor, of both critics together and of all reward networks together."""

    def count(*sizes: int) -> int:
        return sum((inputs + 1) * outputs for inputs, outputs in pairwise(sizes))

    hidden, reward = config.sac.hidden, config.reward
    both = OBS_DIM + ACT_DIM
    return (
        count(OBS_DIM, *hidden, 2 * ACT_DIM),
        2 * count(both, *hidden, 1),
        reward.members * count(both, *reward.hidden, 1),
    )


def expected(steps: int, rounds: int) -> list[int]:
    """The right answer of every block."""
    config = configuration(steps, rounds)
    counts = steps, steps, 1, config.reward.labels_per_session, config.reward.max_epochs, 1
    return [*counts, *num_parameters(config), 1, 1, 1]


def parl_core(steps: int, rounds: int, backend_name: str | None = None) -> Run:
    """`Trainer`."""
    config = configuration(steps, rounds)
    envs = make_environments(ENV, [0])
    trainer = Trainer(config, envs, CutShort(make_env(ENV, 1), evaluation_steps(steps)))
    events, seen = trainer.run(), dict.fromkeys(COUNTS, 0)

    def advance(until: int) -> None:
        with backend(backend_name) if backend_name else nullcontext():
            for event in events:
                if isinstance(event, SessionEnded):
                    seen["sessions"] += 1
                    seen["epochs"] += event.fit.epochs
                seen["evaluations"] += isinstance(event, Evaluated)
                if isinstance(event, Ticked) and event.step >= until:
                    return

    def counts() -> dict[str, int]:
        labels = len(trainer.upper.dataset)
        return {**seen, "steps": trainer.step, "updates": trainer.agent.num_updates, "labels": labels}

    def networks() -> list[list[Tensor]]:
        return _parameters(trainer.agent.actor, trainer.agent.critic, trainer.upper.reward)

    def stored() -> tuple[np.ndarray, np.ndarray]:
        batch = trainer.replay.sample(PROBED, torch.Generator().manual_seed(0))
        with torch.no_grad():
            return batch.rewards.numpy(), trainer.upper.reward(batch.observations, batch.actions).numpy()

    wanted = config.reward
    trainer.upper.config = replace(config, reward=replace(wanted, labels_per_session=FIRST_LABELS))
    advance(WARM_UP)
    trainer.upper.config = config
    if backend_name is None:
        check_updates(trainer)
    return _block(lambda: advance(trainer.step + steps), counts, networks, stored)


def eager_loop(steps: int, rounds: int) -> Run:
    """The same algorithm in plain torch and NumPy."""
    eval_env = CutShort(make_env(ENV, 1), evaluation_steps(steps))
    loop = PreferenceLoop(configuration(steps, rounds), make_env(ENV, 0), eval_env, FIRST_LABELS)
    loop.advance(WARM_UP)

    def counts() -> dict[str, int]:
        return {**{name: getattr(loop, name) for name in COUNTS}, "labels": len(loop.labels)}

    def networks() -> list[list[Tensor]]:
        return _parameters(loop.actor, nn.ModuleList(loop.critics), nn.ModuleList(loop.members))

    def stored() -> tuple[np.ndarray, np.ndarray]:
        replay = loop.replay
        rows = np.random.default_rng(0).integers(0, replay.size, PROBED)
        return replay.rewards[rows, 0], loop.reward(
            np.concatenate([replay.observations[rows], replay.actions[rows]], 1)
        )

    return _block(lambda: loop.advance(loop.steps + steps), counts, networks, stored)


class CutShort(Environment):
    """An environment whose episodes end after `horizon` steps."""

    def __init__(self, env: Environment, horizon: int) -> None:
        sizes: dict[str, Any] = {"obs_dim": env.obs_dim, "act_dim": env.act_dim}
        super().__init__(env.name, **sizes, horizon=horizon, reports_success=env.reports_success)
        self._env = env

    def _reset(self) -> Any:
        return self._env.reset()

    def _step(self, action: Any) -> Step:
        step = self._env.step(action)
        return step._replace(truncated=step.truncated or self._num_steps >= self.horizon)

    def _state(self) -> Any:
        return self._env.state()

    def _set_state(self, state: Mapping[str, Any]) -> None:
        self._env.set_state(state)


def _block(
    advance: Callable[[], None],
    counts: Callable[[], dict[str, int]],
    networks: Callable[[], list[list[Tensor]]],
    stored: Callable[[], tuple[np.ndarray, np.ndarray]],
) -> Run:
    def run() -> Any:
        before, old = counts(), [[tensor.clone() for tensor in tensors] for tensors in networks()]
        advance()
        after, new = counts(), networks()
        pairs = [pair for olds, news in zip(old, new, strict=True) for pair in zip(olds, news, strict=True)]
        finite = all(bool(torch.isfinite(tensor).all()) for _, tensor in pairs)
        moved = all(not torch.equal(one, other) for one, other in pairs)
        relabelled = np.allclose(*stored(), atol=1e-4)
        sizes = [sum(tensor.numel() for tensor in tensors) for tensors in new]
        return np.array([*(after[name] - before[name] for name in COUNTS), *sizes, finite, moved, relabelled])

    return run


def _parameters(*modules: nn.Module) -> list[list[Tensor]]:
    return [[param.detach() for param in module.parameters()] for module in modules]
