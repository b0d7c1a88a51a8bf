"""The bilevel loop: a policy is trained on a reward that is learned from preferences over what the policy does.

Lower level: one SAC update per environment step, on the replay relabelled with the current reward. Upper level: query
sessions, each asking a teacher about pairs of recent segments and fitting the reward to all labels so far; for `a-parl`
the fit also takes the hypergradient's implicit term. PEBBLE's schedule (Lee et al., ICML 2021): random actions, then
state-entropy exploration, then the first session, then a session every `session_interval` steps while labels last.
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
from ..errors import ConfigError
from ..models.rewards import RewardEnsemble
from ..preference.reward_learning import PreferenceDataset, RewardFit, RewardLearner
from ..preference.samplers import Queries, disagreement, uniform
from ..preference.teachers import OracleTeacher
from ..rl.replay import ReplayBuffer
from ..rl.rollout import EpisodeStore, Evaluation, evaluate
from ..rl.sac import SAC
from ..rl.state_entropy import StateEntropyReward
from .config import TrainConfig
from .implicit_term import ImplicitReport, ImplicitTerm, on_policy_queries
from .run_folder import Row

TICK = 20  # environment steps between two signs of life
RANDOM_POLICY_EPISODES = 10


@dataclass(frozen=True)
class Ticked:
    """A few more environment steps were taken."""

    step: int


@dataclass(frozen=True)
class SessionEnded:
    """The reward was fitted to new labels."""

    step: int
    labels: int
    fit: RewardFit
    implicit: ImplicitReport | None


@dataclass(frozen=True)
class Evaluated:
    """The policy was evaluated on the true reward: a row for metrics.csv."""

    row: Row


@dataclass(frozen=True)
class EpisodeEnded:
    """A training episode ended; the only moments at which `Trainer.state_dict` captures everything."""

    step: int
    true_return: float


Event = Ticked | SessionEnded | Evaluated | EpisodeEnded


class Trainer:
    """All that learns in one run, and the order in which it does.

    Args:
        config: a validated configuration.
        env, eval_env: two instances of the task, seeded independently; `seeds(config.seed)` gives their seeds.
    """

    def __init__(self, config: TrainConfig, env: Environment, eval_env: Environment) -> None:
        if config.learns_reward and config.reward.segment_length > env.horizon:
            raise ConfigError(
                f"reward.segment_length must be at most an episode of {config.env}, {env.horizon} steps, "
                f"got {config.reward.segment_length}"
            )
        self.config, self.env, self.eval_env = config, env, eval_env
        seed = seeds(config.seed)
        torch.manual_seed(seed["init"])  # the reward networks' initial weights; nothing later uses the global generator
        self.generator = torch.Generator().manual_seed(seed["loop"])
        self.agent = SAC(env.obs_dim, env.act_dim, config.sac, torch.Generator().manual_seed(seed["agent"]))
        self.replay = ReplayBuffer(config.replay_capacity, env.obs_dim, env.act_dim)
        self.episodes = EpisodeStore(config.reward.pool_episodes, env.obs_dim, env.act_dim)
        self.reward = RewardEnsemble(env.obs_dim, env.act_dim, config.reward.hidden, config.reward.members)
        self.learner = RewardLearner(
            self.reward,
            learning_rate=config.reward.learning_rate,
            batch_size=config.reward.batch_size,
            generator=torch.Generator().manual_seed(seed["reward"]),
        )
        sessions = 1 + config.steps // config.reward.session_interval
        self.dataset = PreferenceDataset(
            min(config.reward.label_budget, sessions * config.reward.labels_per_session),
            config.reward.segment_length,
            env.obs_dim,
            env.act_dim,
        )
        self.teacher = OracleTeacher()
        self.exploration = StateEntropyReward(
            torch.Generator().manual_seed(seed["exploration"]), max_references=config.entropy_references
        )
        self.implicit = ImplicitTerm(config.implicit, config.sac.discount)
        self.step = 0
        self.episodes_done = 0
        self.next_session = config.first_session
        self.last_session: SessionEnded | None = None
        self._critic_loss: Tensor | None = None

    @property
    def reward_ready(self) -> bool:
        """Whether the reward has been fitted at least once (or is the true one)."""
        return not self.config.learns_reward or len(self.dataset) > 0

    def run(self) -> Iterator[Event]:
        """Train until `config.steps`, yielding what happens. An episode under way at a resume begins anew."""
        config = self.config
        while self.step < config.steps:
            observation = self.env.reset()
            true_return, done = 0.0, False
            while not done and self.step < config.steps:
                action = self._act(observation)
                step = self.env.step(action)
                self.step += 1
                reward = self._reward(observation, action, step.reward)
                self.replay.add(observation, action, reward, step.observation, step.terminated)
                self.episodes.add(observation, action, step.reward)
                observation = step.observation
                true_return += step.reward
                done = step.terminated or step.truncated
                if done or self.step == config.steps:
                    self.episodes.end_episode()
                if self.step > config.random_steps and self.step % config.update_interval == 0:
                    self._update_agent()
                if self._session_due():
                    yield self._query_session()
                if self.step % config.eval_interval == 0 or self.step == config.steps:
                    yield self._evaluate()
                if self.step % TICK == 0:
                    yield Ticked(self.step)
            self.episodes_done += done
            yield EpisodeEnded(self.step, true_return)

    def evaluate_random_policy(self) -> Evaluation:
        """Uniformly random actions on the true reward: the floor that a run is held against."""
        return evaluate(self.eval_env, lambda _: self._random_action(), RANDOM_POLICY_EPISODES)

    def _act(self, observation: np.ndarray) -> np.ndarray:
        if self.step < self.config.random_steps:
            return self._random_action()
        return self.agent.act(observation)

    def _random_action(self) -> np.ndarray:
        return (torch.rand(self.env.act_dim, generator=self.generator) * 2 - 1).numpy()

    def _reward(self, observation: np.ndarray, action: np.ndarray, true_reward: float) -> float:
        if not self.config.learns_reward:
            return true_reward
        if not self.reward_ready:
            return 0.0  # exploration does not read it, and the first session relabels it
        with torch.inference_mode():
            row = torch.from_numpy(observation).unsqueeze(0), torch.from_numpy(action).unsqueeze(0)
            return float(self.reward(*row))

    def _update_agent(self) -> None:
        batch = self.replay.sample(self.config.sac.batch_size, self.generator)
        if not self.reward_ready:
            batch = batch._replace(
                rewards=self.exploration(batch.observations, batch.indices, self.replay.observations)
            )
        self._critic_loss = self.agent.update(batch)["critic_loss"]

    def _session_due(self) -> bool:
        config = self.config.reward
        if not self.config.learns_reward or self.step < self.next_session or len(self.dataset) >= config.label_budget:
            return False
        # A-PARL takes the upper and the lower data from different episodes.
        needed = 1 + (self._on_policy_share > 0)
        found = self.episodes.count_episodes(config.segment_length)
        if found < needed and not self.reward_ready and self.episodes.num_episodes == config.pool_episodes:
            raise ConfigError(
                f"reward.segment_length must be such that {needed} of the latest {config.pool_episodes} episodes (of "
                f"{self.config.env}) have that many steps, got {config.segment_length}, which {found} of them have"
            )
        return found >= needed

    def _query_session(self) -> SessionEnded:
        config = self.config.reward
        is_first = not self.reward_ready
        count = min(config.labels_per_session, config.label_budget - len(self.dataset))
        on_policy = max(1, round(self._on_policy_share * count)) if self._on_policy_share else 0
        recent = self._recent_episodes if on_policy else 0
        if on_policy < count:
            self._label(self._choose_queries(count - on_policy, is_first))
        if on_policy:
            win_rate = self.config.implicit.utility == "win-rate"
            self._label(
                on_policy_queries(
                    self.episodes, on_policy, config.segment_length, recent, self.generator, win_rate=win_rate
                )
            )
        hook = None
        if self.config.algorithm == "a-parl":
            recent_steps = self.config.implicit.recent_steps
            hook = self.implicit.gradient_hook(
                self.agent.actor,
                self.reward,
                self.episodes.recent_trajectories(recent_steps, config.segment_length, skip_episodes=recent),
                self.dataset.recent(on_policy or count),
                self.agent.temperature,
            )
        fit = self.learner.fit(
            self.dataset,
            max_epochs=config.max_epochs,
            accuracy_target=config.accuracy_target,
            gradient_hook=hook,
        )
        with torch.inference_mode():
            self.replay.relabel(self.reward)
        if is_first:
            self.agent.reset_critic()
            for _ in range(self.config.updates_after_reset):
                self._update_agent()
        while self.next_session <= self.step:
            self.next_session += config.session_interval
        self.last_session = SessionEnded(self.step, len(self.dataset), fit, self.implicit.report() if hook else None)
        return self.last_session

    @property
    def _on_policy_share(self) -> float:
        return self.config.implicit.on_policy_share if self.config.algorithm == "a-parl" else 0.0

    @property
    def _recent_episodes(self) -> int:
        """Episodes that the on-policy queries come from; at least as many are left for the lower level."""
        length = self.config.reward.segment_length
        wanted = self.episodes.count_latest(self.config.implicit.recent_steps, length)
        return min(wanted, self.episodes.count_episodes(length) // 2)

    def _label(self, queries: Queries) -> None:
        self.dataset.append(queries, self.teacher.label(queries.first.true_rewards, queries.second.true_rewards))

    def _choose_queries(self, count: int, is_first: bool) -> Queries:
        length = self.config.reward.segment_length
        if is_first or self.config.reward.sampler == "uniform":
            return uniform(self.episodes, count, length, self.generator)
        return disagreement(self.episodes, count, length, self.generator, self.reward)

    def _evaluate(self) -> Evaluated:
        result = evaluate(self.eval_env, lambda o: self.agent.act(o, deterministic=True), self.config.eval_episodes)
        session = self.last_session
        implicit = session.implicit if session else None
        row: Row = {
            "step": self.step,
            "true_return": result.true_return,
            "true_return_std": result.true_return_std,
            "success_rate": result.success_rate,
            "labels": len(self.dataset),
            "episodes": self.episodes_done,
            # NaN if all labels are ties: there is no accuracy then.
            "reward_accuracy": session.fit.accuracy if session and not math.isnan(session.fit.accuracy) else None,
            "reward_loss": session.fit.loss if session else None,
            "implicit_to_direct": implicit.implicit_to_direct if implicit else None,
            "solver_iterations": implicit.solver_iterations if implicit else None,
            "solver_residual": implicit.solver_residual if implicit else None,
            "unconverged_solves": implicit.unconverged_solves if implicit else None,
            "temperature": self.agent.temperature,
            "critic_loss": None if self._critic_loss is None else float(self._critic_loss),
        }
        return Evaluated(row)

    def state_dict(self) -> dict[str, Any]:
        """Everything an identical continuation needs, at an `EpisodeEnded`."""
        session = self.last_session
        return {
            "step": self.step,
            "episodes_done": self.episodes_done,
            "next_session": self.next_session,
            "last_session": None if session is None else _pack_session(session),
            "critic_loss": self._critic_loss,
            "generator": self.generator.get_state(),
            "env": self.env.rng_state(),
            "eval_env": self.eval_env.rng_state(),
            "agent": self.agent.state_dict(),
            "replay": self.replay.state_dict(),
            "episodes": self.episodes.state_dict(),
            "dataset": self.dataset.state_dict(),
            "learner": self.learner.state_dict(),
            "exploration": self.exploration.state_dict(),
            "implicit": self.implicit.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, from a run of the same configuration."""
        self.step = state["step"]
        self.episodes_done = state["episodes_done"]
        self.next_session = state["next_session"]
        self.last_session = _unpack_session(state["last_session"]) if state["last_session"] else None
        self._critic_loss = state["critic_loss"]
        self.generator.set_state(state["generator"])
        self.env.set_rng_state(state["env"])
        self.eval_env.set_rng_state(state["eval_env"])
        self.agent.load_state_dict(state["agent"])
        self.replay.load_state_dict(state["replay"])
        self.episodes.load_state_dict(state["episodes"])
        self.dataset.load_state_dict(state["dataset"])
        self.learner.load_state_dict(state["learner"])
        self.exploration.load_state_dict(state["exploration"])
        self.implicit.load_state_dict(state["implicit"])


def seeds(seed: int) -> dict[str, int]:
    """Independent seeds for everything random in a run, each below 2³²."""
    names = ("env", "eval_env", "init", "loop", "agent", "reward", "exploration")
    return dict(zip(names, np.random.SeedSequence(seed).generate_state(len(names)).tolist(), strict=True))


def _pack_session(session: SessionEnded) -> dict[str, Any]:
    implicit = session.implicit
    return {
        "step": session.step,
        "labels": session.labels,
        "fit": vars(session.fit),
        "implicit": None if implicit is None else vars(implicit),
    }


def _unpack_session(data: Mapping[str, Any]) -> SessionEnded:
    implicit = data["implicit"]
    return SessionEnded(
        data["step"],
        data["labels"],
        RewardFit(**data["fit"]),
        None if implicit is None else ImplicitReport(**implicit),
    )
