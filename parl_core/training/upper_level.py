"""The upper level of a run: queries, their labels, and the reward that is fitted to them.

A query session asks the label source about pairs of recent segments and fits the reward to all labels so far (PEBBLE, Lee,
Smith and Abbeel, ICML 2021); SURF (Park et al., ICLR 2022) fits to pseudo-labels too; A-PARL (Chakraborty et al., ICLR
2024) adds the hypergradient's implicit term.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..errors import ConfigError
from ..models.rewards import RewardEnsemble
from ..preference.label_sources import LabelSource, check_labels
from ..preference.reward_learning import PreferenceDataset, RewardFit, RewardLearner, in_order
from ..preference.samplers import SAMPLERS, Queries, uniform
from ..preference.schedules import labels_in_session
from ..preference.semi_supervised import SurfLearner, UnlabelledPool
from ..rl.rollout import EpisodeStore
from ..rl.sac import SAC
from .config import TrainConfig
from .implicit_term import ImplicitReport, ImplicitTerm, on_policy_queries
from .profile import Profile


@dataclass(frozen=True)
class SessionEnded:
    """The reward was fitted to new labels."""

    step: int
    queries: int
    """Put to the label source so far, those it skipped included."""
    labels: int
    """Answers so far."""
    fit: RewardFit
    implicit: ImplicitReport | None
    fresh_accuracy: float | None
    """Share of this session's decided labels that the reward had foretold before it was fitted to them; None if there was
    nothing to foretell or nothing had been learned yet."""


class UpperLevel:
    """The reward, its labels, and the episodes that queries are drawn from.

    Args:
        config: a validated configuration.
        obs_dim, act_dim, horizon: of the environment.
        seeds: of "init" (the networks' weights), "reward" (orders of batches) and "queries".
        source: who labels.
        profile: whose clocks run.
    """

    def __init__(
        self,
        config: TrainConfig,
        obs_dim: int,
        act_dim: int,
        horizon: int,
        seeds: Mapping[str, int],
        source: LabelSource,
        profile: Profile,
    ) -> None:
        if config.learns_reward and config.query_length > horizon:
            margin = f" and {config.query_margin} steps of surf.crop on either side" if config.query_margin else ""
            raise ConfigError(
                f"reward.segment_length must be at most an episode of {config.env}, {horizon} steps{margin}, "
                f"got {config.reward.segment_length}"
            )
        self.config, self.source, self.profile = config, source, profile
        self.generator = torch.Generator().manual_seed(seeds["queries"])
        self.episodes = EpisodeStore(config.reward.pool_episodes, obs_dim, act_dim, config.num_envs)
        torch.manual_seed(seeds["init"])  # the ensemble's initial weights; nothing later uses the global generator
        self.reward = RewardEnsemble(obs_dim, act_dim, config.reward.hidden, config.reward.members)
        # Whatever the schedule, a session asks about at least one pair and no run about more than its budget.
        self.dataset = PreferenceDataset(
            config.reward.label_budget if config.learns_reward else 0, config.query_length, obs_dim, act_dim
        )
        options: dict[str, Any] = {
            "learning_rate": config.reward.learning_rate,
            "batch_size": config.reward.batch_size,
            "generator": torch.Generator().manual_seed(seeds["reward"]),
        }
        self.learner: SurfLearner | RewardLearner
        if config.algorithm == "surf":
            self.learner = SurfLearner(self.reward, config.surf, **options)
        else:
            self.learner = RewardLearner(self.reward, bpref_compat=config.bpref_compat, **options)
        self.pool = UnlabelledPool(config.surf.pool_capacity, config.query_length, obs_dim, act_dim)
        self.implicit = ImplicitTerm(config.implicit, config.sac.discount)
        self.queries = 0
        self.next_session = config.first_session
        self.last_session: SessionEnded | None = None

    @property
    def is_fitted(self) -> bool:
        """Whether the reward was fitted at least once."""
        return self.last_session is not None

    def session_due(self, step: int) -> bool:
        """Whether queries are to be asked now.

        Raises:
            ConfigError: the episodes are too short for segments, and have been for as many as are kept.
        """
        config = self.config.reward
        if step < self.next_session or self.queries >= config.label_budget:
            return False
        # A-PARL takes the upper and the lower data from different episodes.
        needed = 1 + (self._on_policy_share > 0)
        length = self.config.query_length
        found = self.episodes.count_episodes(length)
        if found < needed and not self.is_fitted and self.episodes.num_episodes == config.pool_episodes:
            raise ConfigError(
                f"reward.segment_length must be such that {needed} of the latest {config.pool_episodes} episodes (of "
                f"{self.config.env}) have that many steps, got {length}, which {found} of them have"
            )
        return found >= needed

    def session(self, step: int, agent: SAC) -> SessionEnded | None:
        """Ask, and fit the reward to all labels; None if there is not a single label yet."""
        config = self.config.reward
        total = self.config.steps
        wanted = labels_in_session(config.schedule, config.labels_per_session, min(step, total), total)
        count = min(wanted, config.label_budget - self.queries)
        on_policy = max(1, round(self._on_policy_share * count)) if self._on_policy_share else 0
        recent = self._recent_episodes if on_policy else 0
        with self.profile.section("queries"):
            queries = self._choose_queries(count - on_policy, on_policy, recent)
            answers = self._ask(queries)
            if self.config.algorithm == "surf":
                # Of more than the pool holds, all but the last would be overwritten at once.
                unlabelled = min(count * self.config.surf.inv_label_ratio, self.pool.capacity)
                self.pool.add_uniform(self.episodes, unlabelled, self.generator)
        while self.next_session <= step:
            self.next_session += config.session_interval
        if len(self.dataset) == 0:
            if self.config.bpref_compat:
                raise ConfigError(
                    "bpref_compat: the teacher skipped all queries of the first session, where B-Pref's code fails"
                )
            return None
        # The upper gradient is taken on the on-policy labels, the last, or on all of the session's if there are none such.
        upper = answers.labels[-on_policy:] if on_policy else answers.labels
        fit, implicit = self._fit(agent, int((~upper.isnan()).sum()), recent)
        foretold = answers.foretold if self.is_fitted else None
        self.last_session = SessionEnded(step, self.queries, len(self.dataset), fit, implicit, foretold)
        return self.last_session

    @property
    def _on_policy_share(self) -> float:
        return self.config.implicit.on_policy_share if self.config.algorithm == "a-parl" else 0.0

    @property
    def _recent_episodes(self) -> int:
        """Episodes that the on-policy queries come from; at least as many are left for the lower level."""
        length = self.config.query_length
        wanted = self.episodes.count_latest(self.config.implicit.recent_steps, length)
        return min(wanted, self.episodes.count_episodes(length) // 2)

    def _choose_queries(self, count: int, on_policy: int, recent: int) -> Queries:
        """`count` of the sampler's, then `on_policy` ones that the implicit term is taken on."""
        length = self.config.query_length
        chosen = []
        if count and not self.is_fitted:
            chosen.append(uniform(self.episodes, count, length, self.generator))
        elif count:
            sampler = SAMPLERS[self.config.reward.sampler]
            margin, labelled = self.config.query_margin, self.dataset.segments
            chosen.append(
                sampler(self.episodes, count, length, self.generator, self.reward, margin=margin, labelled=labelled)
            )
        if on_policy:
            win_rate = self.config.implicit.utility == "win-rate"
            chosen.append(
                on_policy_queries(self.episodes, on_policy, length, recent, self.generator, win_rate=win_rate)
            )
        return Queries.cat(chosen)

    def _ask(self, queries: Queries) -> _Answers:
        """Have the queries labelled and keep those that were answered."""
        judged = queries.centre(self.config.query_margin)
        labels = check_labels(self.source.label(judged.first, judged.second), len(queries))
        self.queries += len(queries)
        answered = (~labels.isnan()).nonzero().squeeze(1)
        if len(answered):
            self.dataset.append(queries.select(answered), labels[answered])
        decided = (~labels.isnan() & (labels != 0.5)).nonzero().squeeze(1)
        if len(decided) == 0:
            return _Answers(labels, None)
        with torch.inference_mode():
            first, second = (
                self.reward(part.observations[decided].flatten(0, 1), part.actions[decided].flatten(0, 1))
                .view(len(decided), -1)
                .sum(1)
                for part in (judged.first, judged.second)
            )
        return _Answers(labels, float(in_order(second - first, labels[decided]).float().mean()))

    def _fit(self, agent: SAC, upper_labels: int, skip_episodes: int) -> tuple[RewardFit, ImplicitReport | None]:
        config, hook = self.config.reward, None
        if self.config.algorithm == "a-parl" and upper_labels:
            recent_steps = self.config.implicit.recent_steps
            hook = self.implicit.gradient_hook(
                agent.actor,
                self.reward,
                self.episodes.recent_trajectories(recent_steps, config.segment_length, skip_episodes=skip_episodes),
                self.dataset.recent(upper_labels),
                agent.temperature,
            )
        with self.profile.section("reward learning"):
            if isinstance(self.learner, SurfLearner):
                return self.learner.fit(self.dataset, self.pool, reward_update=config.max_epochs), None
            timed = None if hook is None else self.profile.timed("hypergradient", hook)
            fit = self.learner.fit(self.dataset, config.max_epochs, config.accuracy_target, timed)
        return fit, self.implicit.report() if hook else None

    def state_dict(self) -> dict[str, Any]:
        """Everything an identical continuation needs."""
        session = self.last_session
        state = {
            "generator": self.generator.get_state(),
            "episodes": self.episodes.state_dict(),
            "dataset": self.dataset.state_dict(),
            "learner": self.learner.state_dict(),
            "pool": self.pool.state_dict(),
            "implicit": self.implicit.state_dict(),
            "queries": self.queries,
            "next_session": self.next_session,
            "last_session": None if session is None else dataclasses.asdict(session),
        }
        remember = getattr(self.source, "state_dict", None)
        return {**state, "source": remember()} if remember else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, from a run of the same configuration.

        Raises:
            ConfigError: the label source is of another kind than that run's.
        """
        self.generator.set_state(state["generator"])
        self.episodes.load_state_dict(state["episodes"])
        self.dataset.load_state_dict(state["dataset"])
        self.learner.load_state_dict(state["learner"])
        self.pool.load_state_dict(state["pool"])
        self.implicit.load_state_dict(state["implicit"])
        self.queries, self.next_session = state["queries"], state["next_session"]
        self.last_session = _session(state["last_session"]) if state["last_session"] else None
        if ("source" in state) != hasattr(self.source, "state_dict"):
            raise ConfigError(
                "The label source must be the one that the run was begun with, which had "
                f"{'a' if 'source' in state else 'no'} state_dict: {type(self.source).__name__} is another"
            )
        if "source" in state:
            cast(Any, self.source).load_state_dict(state["source"])


class _Answers(NamedTuple):
    """What came of some queries."""

    labels: Tensor
    """(M,), NaN where a query was skipped."""
    foretold: float | None
    """Share of those with a preference that the reward orders alike; None if there are none."""


def _session(data: Mapping[str, Any]) -> SessionEnded:
    implicit = data["implicit"]
    return SessionEnded(
        **{
            **data,
            "fit": RewardFit(**data["fit"]),
            "implicit": None if implicit is None else ImplicitReport(**implicit),
        }
    )
