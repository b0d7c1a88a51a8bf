"""Which pairs of segments the teacher is asked about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.rewards import RewardEnsemble

if TYPE_CHECKING:
    from ..rl.rollout import EpisodeStore, Segments


@dataclass(frozen=True)
class Queries:
    """M pairs of segments of L steps, not yet labelled."""

    first: Segments
    """Tensors (M, L, ·)."""
    second: Segments
    """Tensors (M, L, ·)."""

    def __len__(self) -> int:
        return len(self.first.true_rewards)

    def select(self, indices: Tensor) -> Queries:
        """The pairs at `indices` (K,)."""
        return Queries(_select(self.first, indices), _select(self.second, indices))


def uniform(
    store: EpisodeStore, num: int, length: int, generator: torch.Generator, latest: int | None = None
) -> Queries:
    """`num` pairs whose segments of `length` steps are drawn uniformly and independently of each other.

    With `latest`, from that many latest episodes only.
    """
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    first, second = (store.sample(num, length, generator, latest) for _ in range(2))
    return Queries(first, second)


def disagreement(
    store: EpisodeStore,
    num: int,
    length: int,
    generator: torch.Generator,
    ensemble: RewardEnsemble,
    candidates: int | None = None,
) -> Queries:
    """The `num` of `candidates` uniform pairs (10·`num` if left out) on which the ensemble disagrees most.

    Disagreement is the standard deviation over the members of their P(second preferred) (Christiano et al.
    2017; Lee, Smith and Abbeel 2021). Most disputed first; among equals the one drawn earlier is taken.
    """
    candidates = 10 * num if candidates is None else candidates
    if candidates < num:
        raise ValueError(f"candidates must be at least num = {num}, got {candidates}")
    pool = uniform(store, candidates, length, generator)
    disputed = preference_probs(ensemble, pool).std(0, correction=0)
    return pool.select(disputed.argsort(descending=True, stable=True)[:num])


def preference_probs(ensemble: RewardEnsemble, queries: Queries, chunk: int = 64) -> Tensor:
    """Each member's P(second preferred): (members, M). At most `chunk` pairs are evaluated at once."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(queries), chunk):
            part = slice(start, start + chunk)
            first, second = (
                _member_returns(ensemble, segments.observations[part], segments.actions[part])
                for segments in (queries.first, queries.second)
            )
            parts.append(torch.sigmoid(second - first))
    return torch.cat(parts, dim=1)


def _select(segments: Segments, indices: Tensor) -> Segments:
    return segments._replace(**{name: tensor[indices] for name, tensor in segments._asdict().items()})


def _member_returns(ensemble: RewardEnsemble, observations: Tensor, actions: Tensor) -> Tensor:
    """(M, L, do), (M, L, da) -> (members, M)."""
    rewards = ensemble.member_rewards(observations.flatten(0, 1), actions.flatten(0, 1))
    return rewards.unflatten(1, observations.shape[:2]).sum(-1)
