"""How well the implicit term of a query session's data points where that of many more fresh trajectories points."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..envs.interface import Environment
from ..hypergrad import DirectOnly, PreferenceLoss, hypergradient
from ..models.policies import GaussianPolicy
from ..models.rewards import RewardEnsemble
from ..preference.reward_learning import PreferenceDataset
from ..preference.samplers import Queries
from ..rl.rollout import EpisodeStore, Segments
from ..training.config import ImplicitConfig
from ..training.implicit_term import ImplicitTerm, implicit_hypergradient, take_segments
from ..trajectories import PreferencePairs, Trajectories

REFERENCES = ("fisher", "score")
"""Curvatures of the reference. Fisher's is that of the lower level's optimum and always definite, so that its system has a
solution; the full Hessian is the curvature where the policy really is, where it may be indefinite. Each variant is held
against both, since neither is the truth away from the optimum."""
PAIRS_PER_SEGMENT = 4
"""Pairs of the reference that a fresh segment is in as the second."""


@dataclass(frozen=True)
class Alignment:
    """Of one curvature's estimate in one query session."""

    session: int
    """Number of the session, from 0."""
    curvature: str
    """Of the estimate."""
    cosine_fisher: float
    """With the reference by Fisher's curvature."""
    cosine_score: float
    """With the reference by the full Hessian."""
    signal: float
    """The weight that training would give the term if nothing were known but this session's data."""
    to_direct: float
    """‖implicit‖ / ‖direct‖, the direct term being the cross-entropy's on the same pairs."""
    seconds: float
    """Wall time of one refresh, the weight included."""
    reliability_fisher: float
    """Cosine between two halves of the reference by Fisher's curvature: near 0, the reference is noise itself."""
    reliability_score: float
    """The same by the full Hessian."""


class AlignmentProbe(ImplicitTerm):
    """In the place of a run's implicit term, leaves the gradient as it is and measures what each curvature would give.

    Args:
        config: of the variants, but for the curvature.
        discount: γ of the lower level.
        curvatures: the variants.
        sessions: numbers of the query sessions to measure in, from 0.
        env: an environment of its own, for fresh trajectories.
        label: of pairs of segments, as `LabelSource.label`.
        episodes: the run's, for the win rate's older segments.
        reference_steps: fresh steps of a reference.
        generator: draws fresh actions and pairs.
    """

    def __init__(
        self,
        config: ImplicitConfig,
        discount: float,
        *,
        curvatures: Sequence[str],
        sessions: Sequence[int],
        env: Environment,
        label: Callable[[Segments, Segments], Tensor],
        episodes: EpisodeStore,
        reference_steps: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(replace(config, curvature="none"), discount)
        self.found: list[Alignment] = []
        self._variants = {name: replace(config, curvature=name) for name in curvatures}
        self._references = {name: replace(config, curvature=name) for name in REFERENCES}
        self._sessions, self._session = frozenset(sessions), 0
        self._env, self._label, self._episodes = env, label, episodes
        self._steps, self._generator = reference_steps, generator

    def gradient_hook(
        self,
        policy: GaussianPolicy,  # type: ignore[override]
        reward: RewardEnsemble,
        lower: Trajectories,
        upper: PreferencePairs,
        temperature: float,
    ) -> None:
        """Measure, if it is one of the sessions for it."""
        if self._session in self._sessions:
            self._measure(policy, reward, lower, upper, temperature)
        self._session += 1

    def _measure(
        self,
        policy: GaussianPolicy,
        reward: RewardEnsemble,
        lower: Trajectories,
        upper: PreferencePairs,
        temperature: float,
    ) -> None:
        length = lower.horizon
        fresh = fresh_segments(policy, self._env, self._steps, length, self._generator)
        references, reliability = {}, {}
        for name, config in self._references.items():
            references[name], reliability[name] = self._reference(config, policy, reward, fresh, temperature)
        direct = hypergradient(
            policy, reward, lower, upper, loss=PreferenceLoss(), discount=self.discount, estimator=DirectOnly()
        ).direct
        for name, config in self._variants.items():
            start = time.perf_counter()
            estimate, signal = ImplicitTerm(config, self.discount).refresh(policy, reward, lower, upper, temperature)
            seconds = time.perf_counter() - start
            self.found.append(
                Alignment(
                    session=self._session,
                    curvature=name,
                    cosine_fisher=cosine(estimate.implicit, references["fisher"]),
                    cosine_score=cosine(estimate.implicit, references["score"]),
                    signal=signal,
                    to_direct=float(estimate.implicit.norm() / direct.norm().clamp_min(1e-30)),
                    seconds=seconds,
                    reliability_fisher=reliability["fisher"],
                    reliability_score=reliability["score"],
                )
            )

    def _reference(
        self,
        config: ImplicitConfig,
        policy: GaussianPolicy,
        reward: RewardEnsemble,
        fresh: Segments,
        temperature: float,
    ) -> tuple[Tensor, float]:
        """The implicit term (R,) of all fresh segments, half of them for each level, and the cosine of two halves'."""
        groups = torch.arange(len(fresh.true_rewards)).tensor_split(4)
        upper = [take_segments(fresh, group) for group in groups[:2]]
        lower = [take_segments(fresh, group) for group in groups[2:]]

        def term(judged: Segments, windows: Segments) -> Tensor:
            pairs = self._pairs(judged, config.utility == "win-rate")
            return implicit_hypergradient(
                config, policy, reward, trajectories(windows), pairs, temperature, self.discount
            ).implicit

        halves = [term(judged, windows) for judged, windows in zip(upper, lower, strict=True)]
        both = (Segments(*map(torch.cat, zip(*parts, strict=True))) for parts in (upper, lower))
        return term(*both), cosine(*halves)

    def _pairs(self, fresh: Segments, win_rate: bool) -> PreferencePairs:
        """Labelled pairs in which each fresh segment is the second as often as any other."""
        number, length = fresh.true_rewards.shape
        others = fresh
        if win_rate:
            others = self._episodes.latest_segments(self._episodes.count_episodes(length), length)
        draws = torch.randint(len(others.true_rewards), (PAIRS_PER_SEGMENT * number,), generator=self._generator)
        first = take_segments(others, draws)
        second = take_segments(fresh, torch.arange(number).repeat(PAIRS_PER_SEGMENT))
        labels = self._label(first, second)
        answered = (~labels.isnan()).nonzero().squeeze(1)
        dataset = PreferenceDataset(len(answered), length, fresh.observations.shape[2], fresh.actions.shape[2])
        dataset.append(Queries(first, second).select(answered), labels[answered])
        return dataset.recent(len(dataset))


def fresh_segments(
    policy: GaussianPolicy, env: Environment, num_steps: int, length: int, generator: torch.Generator
) -> Segments:
    """What the policy does in `num_steps` steps and those to the end of the episode, cut into segments of `length` steps."""
    store = EpisodeStore(num_steps, env.obs_dim, env.act_dim)
    while store.num_steps < num_steps:
        observation, done = env.reset(), False
        while not done:
            with torch.no_grad():
                action = policy.sample(torch.from_numpy(observation).unsqueeze(0), generator)[0].squeeze(0).numpy()
            step = env.step(action)
            store.add(observation, action, step.reward)
            observation, done = step.observation, step.terminated or step.truncated
        store.end_episode()
    return store.latest_segments(store.num_episodes, length)


def trajectories(segments: Segments) -> Trajectories:
    """Segments (n, L, ·) as n trajectories."""
    number, length = segments.true_rewards.shape
    offsets = torch.arange(0, number * length + 1, length)
    return Trajectories(segments.observations.flatten(0, 1), segments.actions.flatten(0, 1), offsets)


def cosine(first: Tensor, second: Tensor) -> float:
    """Between two vectors (R,); 0 if one of them is 0."""
    return float(torch.cosine_similarity(first.double(), second.double(), dim=0, eps=1e-300))
