"""The bilevel loop: a policy is trained on a reward that is learned from preferences over what the policy does.

Lower level: SAC, one update per environment step, on the replay relabelled with the current reward. Upper level: query
sessions (`UpperLevel`). PEBBLE's schedule (Lee et al., ICML 2021): random actions, then state-entropy exploration, then the
first session, then a session every `session_interval` steps while labels last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..envs.interface import Environment
from ..envs.vector import Environments
from ..preference.label_sources import LabelSource
from ..preference.teachers import ScriptedTeacher
from ..rl.replay import ReplayBuffer
from ..rl.rollout import Evaluation, evaluate
from ..rl.sac import SAC
from ..rl.state_entropy import StateEntropyReward
from .config import TrainConfig
from .profile import Profile
from .run_folder import Row
from .upper_level import SessionEnded, UpperLevel

TICK = 20  # environment steps between two signs of life
RANDOM_POLICY_EPISODES = 10


@dataclass(frozen=True)
class Ticked:
    """A few more environment steps were taken. Whenever one comes, `Trainer.state_dict` captures everything."""

    step: int


@dataclass(frozen=True)
class Evaluated:
    """The policy was evaluated on the true reward: a row for metrics.csv."""

    row: Row


@dataclass(frozen=True)
class EpisodeEnded:
    """A training episode ended."""

    step: int
    true_return: float


Event = Ticked | SessionEnded | Evaluated | EpisodeEnded


class Trainer:
    """All that learns in one run, and the order in which it does.

    Args:
        config: a validated configuration.
        envs: `config.num_envs` instances of the task.
        eval_env: another one. `seeds` and `env_seeds` give the seeds of all.
        source: who labels; None: the scripted teacher of the configuration.
    """

    def __init__(
        self, config: TrainConfig, envs: Environments, eval_env: Environment, source: LabelSource | None = None
    ) -> None:
        self.config, self.envs, self.eval_env = config, envs, eval_env
        seed = seeds(config.seed)
        self.profile = Profile()
        self.generator = torch.Generator().manual_seed(seed["loop"])
        self.agent = SAC(envs.obs_dim, envs.act_dim, config.sac, torch.Generator().manual_seed(seed["agent"]))
        self.replay = ReplayBuffer(config.replay_capacity, envs.obs_dim, envs.act_dim)
        if source is None:
            source = ScriptedTeacher(
                config.teacher,
                segment_length=config.reward.segment_length,
                horizon=envs.horizon,
                generator=torch.Generator().manual_seed(seed["teacher"]),
                bpref_compat=config.bpref_compat,
            )
        self.upper = UpperLevel(config, envs.obs_dim, envs.act_dim, envs.horizon, seed, source, self.profile)
        self.exploration = StateEntropyReward(envs.obs_dim, bpref_compat=config.bpref_compat)
        self.step = 0
        self.episodes_done = 0
        self._observations: np.ndarray | None = None  # (n, do), where the environments stand; None before the start
        self._returns = np.zeros(config.num_envs)  # of the episodes under way
        self._lengths = np.zeros(config.num_envs, dtype=np.int64)
        self._critic_loss: Tensor | None = None

    @property
    def explores(self) -> bool:
        """Whether the policy is still trained on state entropy, for want of a learned reward."""
        return self.config.learns_reward and not self.upper.is_fitted

    def run(self) -> Iterator[Event]:
        """Train until `config.steps`, yielding what happens."""
        config = self.config
        if self._observations is None and self.step < config.steps:
            self._observations = self.envs.reset()
        while self.step < config.steps:
            before = self.step
            ended = self._advance()
            for _ in range(_multiples(max(before, config.random_steps), self.step, config.update_interval)):
                self._update_agent()
            if config.learns_reward and self.upper.session_due(self.step):
                session = self._query_session()
                if session is not None:
                    yield session
            if _multiples(before, self.step, config.eval_interval) or self.step >= config.steps:
                with self.profile.section("evaluation"):
                    evaluated = self._evaluate()
                yield evaluated
            yield from ended
            if _multiples(before, self.step, TICK) or self.step >= config.steps:
                yield Ticked(self.step)

    def evaluate_random_policy(self) -> Evaluation:
        """Uniformly random actions on the true reward: the floor that a run is held against."""
        return evaluate(self.eval_env, lambda _: self._random_actions(1)[0], RANDOM_POLICY_EPISODES)

    def _advance(self) -> list[EpisodeEnded]:
        """One step of every environment; returns the episodes that ended with it."""
        observations, profile = self._observations, self.profile
        assert observations is not None
        with profile.section("policy"):
            if self.step < self.config.random_steps:
                actions = self._random_actions(self.envs.num)
            else:
                actions = self.agent.act(observations)
        with profile.section("simulator"):
            steps = self.envs.step(actions)
        with profile.section("reward"):
            rewards = self._rewards(observations, actions, steps.rewards)
        with profile.section("replay"):
            rows = self.replay.add_batch(observations, actions, rewards, steps.observations, steps.terminated)
            self.upper.episodes.add_batch(observations, actions, steps.rewards)
        if self.explores:
            with profile.section("exploration"):
                self.exploration.add_batch(observations, rows)
        self.step += self.envs.num
        self._returns += steps.rewards
        self._lengths += 1
        self._observations = steps.observations
        over = np.flatnonzero(steps.terminated | steps.truncated)
        if len(over) == 0:
            return []
        ended = [self._end_episode(int(index)) for index in over]
        with profile.section("simulator"):
            self._observations = steps.observations.copy()
            self._observations[over] = self.envs.reset(over.tolist())
        return ended

    def _end_episode(self, index: int) -> EpisodeEnded:
        true_return, length = float(self._returns[index]), int(self._lengths[index])
        self._returns[index], self._lengths[index] = 0.0, 0
        self.episodes_done += 1
        self.upper.episodes.end_episode(index)
        self.upper.source.episode_ended(true_return, length)
        return EpisodeEnded(self.step, true_return)

    def _random_actions(self, num: int) -> np.ndarray:
        return (torch.rand(num, self.envs.act_dim, generator=self.generator) * 2 - 1).numpy()

    def _rewards(self, observations: np.ndarray, actions: np.ndarray, true_rewards: np.ndarray) -> np.ndarray:
        if not self.config.learns_reward:
            return true_rewards
        if not self.upper.is_fitted:
            return np.zeros(len(true_rewards))  # exploration does not read it, and the first session relabels it
        with torch.inference_mode():
            return self.upper.reward(torch.from_numpy(observations), torch.from_numpy(actions)).numpy()

    def _update_agent(self) -> None:
        with self.profile.section("replay"):
            batch = self.replay.sample(self.config.sac.batch_size, self.generator)
        if self.explores:
            with self.profile.section("exploration"):
                batch = batch._replace(rewards=self.exploration(batch.indices))
        with self.profile.section("SAC update"):
            self._critic_loss = self.agent.update(batch)["critic_loss"]

    def _query_session(self) -> SessionEnded | None:
        is_first = not self.upper.is_fitted
        session = self.upper.session(self.step, self.agent)
        if session is None:
            return None
        with self.profile.section("relabelling"), torch.inference_mode():
            self.replay.relabel(self.upper.reward, bpref_compat=self.config.bpref_compat)
        if is_first:
            self.agent.reset_critic()
            for _ in range(self.config.updates_after_reset):
                self._update_agent()
        return session

    def _evaluate(self) -> Evaluated:
        result = evaluate(self.eval_env, lambda o: self.agent.act(o, deterministic=True), self.config.eval_episodes)
        session = self.upper.last_session
        implicit = session.implicit if session else None
        row: Row = {
            "step": self.step,
            "true_return": result.true_return,
            "true_return_std": result.true_return_std,
            "success_rate": result.success_rate,
            "labels": len(self.upper.dataset),
            "queries": self.upper.queries,
            "episodes": self.episodes_done,
            # NaN if all labels are ties: there is no accuracy then.
            "reward_accuracy": session.fit.accuracy if session and not math.isnan(session.fit.accuracy) else None,
            "fresh_accuracy": session.fresh_accuracy if session else None,
            "reward_loss": session.fit.loss if session else None,
            "implicit_to_direct": implicit.implicit_to_direct if implicit else None,
            "implicit_signal": implicit.signal if implicit else None,
            "solver_iterations": implicit.solver_iterations if implicit else None,
            "solver_residual": implicit.solver_residual if implicit else None,
            "unconverged_solves": implicit.unconverged_solves if implicit else None,
            "temperature": self.agent.temperature,
            "critic_loss": None if self._critic_loss is None else float(self._critic_loss),
        }
        return Evaluated(row)

    def state_dict(self) -> dict[str, Any]:
        """Everything an identical continuation needs, the episodes under way included, at a `Ticked`."""
        return {
            "step": self.step,
            "episodes_done": self.episodes_done,
            "observations": self._observations,
            "returns": self._returns,
            "lengths": self._lengths,
            "critic_loss": self._critic_loss,
            "generator": self.generator.get_state(),
            "envs": self.envs.state(),
            "eval_env": self.eval_env.state(),
            "agent": self.agent.state_dict(),
            "replay": self.replay.state_dict(),
            "upper": self.upper.state_dict(),
            "exploration": self.exploration.state_dict() if self.explores else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, from a run of the same configuration.

        Environments that cannot be put back to where they stood begin new episodes; what is known of the old ones counts
        as episodes that were cut.
        """
        self.step = state["step"]
        self.episodes_done = state["episodes_done"]
        self._critic_loss = state["critic_loss"]
        self.generator.set_state(state["generator"])
        self.agent.load_state_dict(state["agent"])
        self.replay.load_state_dict(state["replay"])
        self.upper.load_state_dict(state["upper"])
        if state["exploration"] is not None:
            self.exploration.load_state_dict(state["exploration"])
        self.envs.set_state(state["envs"])
        self.eval_env.set_state(state["eval_env"])
        if self.envs.restores_state:
            self._observations = state["observations"]
            self._returns, self._lengths = state["returns"].copy(), state["lengths"].copy()
        else:
            self._observations = self.envs.reset()
            for index in np.flatnonzero(state["lengths"]).tolist():
                self.upper.episodes.end_episode(index)


def seeds(seed: int) -> dict[str, int]:
    """Independent seeds for everything random in a run but the environments it trains in, each below 2³²."""
    names = ("eval_env", "init", "loop", "agent", "reward", "queries", "teacher")
    return dict(zip(names, np.random.SeedSequence(seed).generate_state(len(names)).tolist(), strict=True))


def env_seeds(seed: int, num: int) -> list[int]:
    """Independent seeds for the environments that a run trains in, each below 2³²."""
    sequence = np.random.SeedSequence(seed, spawn_key=(0,))
    return [int(value) for value in sequence.generate_state(num)]


def _multiples(after: int, upto: int, interval: int) -> int:
    """How many multiples of `interval` lie in (after, upto]."""
    return max(upto // interval - after // interval, 0)
