"""Which pairs of segments the teacher is asked about: the six samplers of B-Pref.

Lee, Smith, Dragan and Abbeel, "B-Pref: Benchmarking Preference-Based Reinforcement Learning", NeurIPS Datasets and
Benchmarks 2021. All but `uniform` choose from a pool of uniform pairs, ten times as many as are asked for:

- disagreement: those on which the members' P(second preferred) have the largest standard deviation;
- entropy: those whose answers are the least certain, by the members' mean entropy;
- k-center: those that cover the pool, given the pairs that have labels: one after the other the pair that is farthest from
  the nearest labelled or chosen one, where a pair is the observations of both of its segments as one vector;
- k-center-disagreement and k-center-entropy: k-center among the better half of the pool.

Among equals the first is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.rewards import RewardEnsemble
from ..rl.rollout import EpisodeStore, Segments

POOL_RATIO = 10
CHUNK_PAIRS = 256


@dataclass(frozen=True)
class Queries:
    """M pairs of segments of L steps, not yet labelled."""

    first: Segments
    """Tensors (M, L, ·)."""
    second: Segments
    """Tensors (M, L, ·)."""

    def __len__(self) -> int:
        return len(self.first.true_rewards)

    @staticmethod
    def cat(parts: Sequence[Queries]) -> Queries:
        """The pairs of all parts, in their order; segments of one length."""
        first, second = (
            Segments(*map(torch.cat, zip(*(getattr(part, side) for part in parts), strict=True)))
            for side in ("first", "second")
        )
        return Queries(first, second)

    def select(self, indices: Tensor) -> Queries:
        """The pairs at `indices` (K,)."""
        return Queries(_index(self.first, indices), _index(self.second, indices))

    def centre(self, margin: int) -> Queries:
        """The same pairs without the first and the last `margin` steps of each segment."""
        length = self.first.true_rewards.shape[1]
        if not 0 <= 2 * margin < length:
            raise ValueError(f"margin must be at least 0 and leave a step of the segments' {length}, got {margin}")
        inner = (slice(None), slice(margin, length - margin))
        return Queries(_index(self.first, inner), _index(self.second, inner))


class Sampler(Protocol):
    """Chooses `num` pairs of segments of `length` steps from what the store holds.

    Args:
        ensemble: judges how much there is to learn from a pair.
        margin: steps at each end of a segment that the teacher does not see; pairs are chosen by the rest.
        labelled: the pairs that have labels, as `PreferenceDataset.segments`: (N, 2, `length`, do + da). None for none.
    """

    def __call__(
        self,
        store: EpisodeStore,
        num: int,
        length: int,
        generator: torch.Generator,
        ensemble: RewardEnsemble,
        *,
        margin: int = 0,
        labelled: Tensor | None = None,
    ) -> Queries: ...


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


def disagreement(ensemble: RewardEnsemble, queries: Queries) -> Tensor:
    """(M,), the standard deviation over the members of their P(second preferred) (Christiano et al. 2017)."""
    return preference_probs(ensemble, queries).std(0, correction=0)


def entropy(ensemble: RewardEnsemble, queries: Queries) -> Tensor:
    """(M,), the mean over the members of the entropy of their answer, in nats."""
    logits = _preference_logits(ensemble, queries)
    # −p log p − (1 − p) log(1 − p) without the cancellation of 1 − p, which would make all clear answers equal.
    entropies = torch.sigmoid(logits) * F.softplus(-logits) + torch.sigmoid(-logits) * F.softplus(logits)
    return entropies.mean(0)


def k_center(points: Tensor, centres: Tensor, num: int) -> Tensor:
    """Greedy k-center: indices (num,) of the points that are each the farthest from all centres and those before it.

    Gonzalez 1985: no point is left farther from a centre than twice what the best choice leaves. Without any centre the
    first point is chosen first. Distances are Euclidean, from matrix products in float64, whose rounding is below the
    differences between float32 numbers.

    Args:
        points: (M, …), as many numbers each as a centre has.
        centres: (N, …), N may be 0.
        num: at most M.
    """
    points = points.flatten(1).double()
    nearest = points.new_full((len(points),), torch.inf)
    if len(centres):
        for part in centres.split(CHUNK_PAIRS):
            nearest = torch.minimum(nearest, _distances(points, part.flatten(1).to(points)).amin(1))
    between = _distances(points, points)
    chosen: list[int] = []
    for _ in range(num):
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, between[chosen[-1]])
        nearest[chosen[-1]] = -1.0  # below every distance: never again, and the minimum keeps it
    return torch.tensor(chosen)


def preference_probs(ensemble: RewardEnsemble, queries: Queries, chunk: int = 64) -> Tensor:
    """Each member's P(second preferred): (members, M). At most `chunk` pairs are evaluated at once."""
    return torch.sigmoid(_preference_logits(ensemble, queries, chunk))


def _uniform(
    store: EpisodeStore,
    num: int,
    length: int,
    generator: torch.Generator,
    ensemble: RewardEnsemble,
    *,
    margin: int = 0,
    labelled: Tensor | None = None,
) -> Queries:
    return uniform(store, num, length, generator)


def _from_pool(
    store: EpisodeStore,
    num: int,
    length: int,
    generator: torch.Generator,
    ensemble: RewardEnsemble,
    *,
    margin: int = 0,
    labelled: Tensor | None = None,
    uncertainty: Callable[[RewardEnsemble, Queries], Tensor] | None = None,
    cover: bool = False,
) -> Queries:
    """Of 10·`num` uniform pairs the most uncertain, those that cover the pool, or those that cover its uncertain half."""
    pool = uniform(store, POOL_RATIO * num, length, generator)
    judged = pool.centre(margin)
    kept = torch.arange(len(pool))
    if uncertainty is not None:
        order = uncertainty(ensemble, judged).argsort(descending=True, stable=True)
        kept = order[: len(pool) // 2 if cover else num]
    if cover:
        points = torch.stack((judged.first.observations, judged.second.observations), dim=1)[kept]
        known = points[:0] if labelled is None else labelled[:, :, margin : length - margin, : points.shape[-1]]
        kept = kept[k_center(points, known, num)]
    return pool.select(kept)


SAMPLERS: dict[str, Sampler] = {
    "uniform": _uniform,
    "disagreement": partial(_from_pool, uncertainty=disagreement),
    "entropy": partial(_from_pool, uncertainty=entropy),
    "k-center": partial(_from_pool, cover=True),
    "k-center-disagreement": partial(_from_pool, uncertainty=disagreement, cover=True),
    "k-center-entropy": partial(_from_pool, uncertainty=entropy, cover=True),
}
"""The samplers by name."""


def _index(segments: Segments, index: Any) -> Segments:
    return segments._replace(**{name: tensor[index] for name, tensor in segments._asdict().items()})


def _preference_logits(ensemble: RewardEnsemble, queries: Queries, chunk: int = 64) -> Tensor:
    """Each member's return of the second segment less that of the first: (members, M)."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(queries), chunk):
            part = slice(start, start + chunk)
            first, second = (
                _member_returns(ensemble, segments.observations[part], segments.actions[part])
                for segments in (queries.first, queries.second)
            )
            parts.append(second - first)
    return torch.cat(parts, dim=1)


def _member_returns(ensemble: RewardEnsemble, observations: Tensor, actions: Tensor) -> Tensor:
    """(M, L, do), (M, L, da) -> (members, M)."""
    rewards = ensemble.member_rewards(observations.flatten(0, 1), actions.flatten(0, 1))
    return rewards.unflatten(1, observations.shape[:2]).sum(-1)


def _distances(points: Tensor, others: Tensor) -> Tensor:
    """(M, D), (N, D) -> (M, N)."""
    return torch.cdist(points, others, compute_mode="use_mm_for_euclid_dist")
