"""SURF's semi-supervised reward learning: pseudo-labels for unlabelled pairs, and time cropping.

Park et al., "SURF: Semi-supervised Reward Learning with Data Augmentation for Feedback-efficient Preference-based
Reinforcement Learning", ICLR 2022. What the paper leaves open is settled by the authors' program: the unlabelled pairs are
cropped too; a crop's length is drawn for each pair, and anew by each member; every member has an order of its own through
the labelled pairs and one through the unlabelled pairs, begun anew at each fit, whose last batches may be smaller.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, NonFiniteError
from ..models.rewards import RewardEnsemble
from .pair_gradient import PairBatch, pair_gradient, pair_logits
from .reward_learning import EnsembleLearner, Hook, PreferenceDataset, RewardFit, in_order

if TYPE_CHECKING:
    from ..rl.rollout import EpisodeStore


@dataclass(frozen=True)
class SurfConfig:
    """What SURF adds to PEBBLE."""

    inv_label_ratio: int = 10
    """Unlabelled pairs drawn in a session, for each of its queries."""
    unlabelled_batch_ratio: int = 4
    """Unlabelled pairs in a step, for each labelled one."""
    threshold: float = 0.99
    """A pseudo-label counts if the member gives its own choice at least this probability."""
    weight: float = 1.0
    """Of the unlabelled pairs' loss beside the labelled pairs'."""
    crop: int = 5
    """Steps that a window has before and after the segment the teacher sees, and the most by which a crop is longer or
    shorter than that segment."""
    pool_capacity: int = 500_000
    """Unlabelled pairs that are kept; then new ones take the places of the oldest."""

    def validate(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: one sentence that names the field.
        """
        for name in ("inv_label_ratio", "unlabelled_batch_ratio", "pool_capacity"):
            if getattr(self, name) < 1:
                raise ConfigError(f"surf.{name} must be at least 1, got {getattr(self, name)}")
        if self.crop < 0:
            raise ConfigError(f"surf.crop must be at least 0, got {self.crop}")
        # At one half or below both choices would count as confident.
        if not 0.5 < self.threshold <= 1.0:
            raise ConfigError(f"surf.threshold must lie in (0.5, 1], got {self.threshold}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(f"surf.weight must be finite and at least 0, got {self.weight}")


class UnlabelledPool:
    """Up to `capacity` pairs of windows of `length` steps; a new pair takes the place of the oldest.

    A pair is two row numbers of one table, which holds every episode once that a pair refers to, and drops it when none
    does any more: 16 bytes a pair, whatever the length.

    Args:
        capacity: pairs.
        length: of a window, in steps.
        obs_dim, act_dim: sizes of an observation and an action.
        device: of the table and the pairs.
    """

    def __init__(
        self, capacity: int, length: int, obs_dim: int, act_dim: int, *, device: torch.device | str = "cpu"
    ) -> None:
        if capacity < 1 or length < 1:
            raise ValueError(f"capacity and length must be at least 1, got {capacity} and {length}")
        self.capacity, self.length = capacity, length
        self._steps = torch.empty(0, obs_dim + act_dim, device=device)
        self._numbers = torch.empty(0, dtype=torch.int64)  # of the episodes in the table, as the store counts them
        self._lengths = torch.empty(0, dtype=torch.int64)
        self._starts = torch.empty(0, 2, dtype=torch.int64, device=device)
        self._next = 0  # where the next pair goes

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def steps(self) -> Tensor:
        """(T, do + da), the table of steps: what `starts` speaks of."""
        return self._steps

    def starts(self, indices: Tensor) -> Tensor:
        """(…, 2) int64, the first rows in `steps` of the windows of the pairs at `indices` (any shape)."""
        return self._starts[indices]

    def select(self, indices: Tensor) -> Tensor:
        """(…, 2, L, do + da), observations and actions of the windows of the pairs at `indices` (any shape)."""
        return self._steps[self.starts(indices)[..., None] + torch.arange(self.length, device=self._steps.device)]

    def add_uniform(self, store: EpisodeStore, num: int, generator: torch.Generator) -> None:
        """Add `num` pairs whose windows are drawn uniformly, and independently of each other, from finished episodes."""
        if not 1 <= num <= self.capacity:
            raise ValueError(f"num must lie in [1, {self.capacity}], the pool's capacity, got {num}")
        drawn = [store.sample_positions(num, self.length, generator) for _ in range(2)]
        self._append_episodes(store, torch.cat([each.episodes for each in drawn]).unique())
        first_rows = dict(zip(self._numbers.tolist(), self._first_rows.tolist(), strict=True))
        rows = [torch.tensor([first_rows[n] for n in each.episodes.tolist()]) + each.starts for each in drawn]
        added = torch.stack(rows, dim=1).to(self._starts.device)
        slots = (self._next + torch.arange(num, device=added.device)) % self.capacity
        size = min(max(len(self), self._next + num), self.capacity)
        starts = self._starts.new_empty(size, 2)
        starts[: len(self)] = self._starts
        starts[slots] = added
        self._starts, self._next = starts, (self._next + num) % self.capacity
        self._drop_unused_episodes()

    def state_dict(self) -> dict[str, Any]:
        """The pairs and the episodes they refer to, sharing memory with the pool."""
        return {
            "steps": self._steps,
            "numbers": self._numbers,
            "lengths": self._lengths,
            "starts": self._starts,
            "next": self._next,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, from a pool of the same sizes."""
        steps, starts = state["steps"], state["starts"]
        if steps.shape[1:] != self._steps.shape[1:] or len(starts) > self.capacity:
            raise ValueError(
                f"steps must have {self._steps.shape[1]} columns and starts at most {self.capacity} rows, "
                f"got shapes {tuple(steps.shape)} and {tuple(starts.shape)}"
            )
        device = self._steps.device
        self._steps, self._starts = steps.to(device, copy=True), starts.to(device, copy=True)
        self._numbers, self._lengths = state["numbers"].clone(), state["lengths"].clone()
        self._next = state["next"]

    @property
    def _first_rows(self) -> Tensor:
        """(episodes,), of each episode in the table."""
        return self._lengths.cumsum(0) - self._lengths

    def _append_episodes(self, store: EpisodeStore, numbers: Tensor) -> None:
        """Take over those of `numbers` that are not in the table."""
        new = numbers[~torch.isin(numbers, self._numbers)]
        if len(new) == 0:
            return
        episodes = [store.episode(number)[:, :-1] for number in new.tolist()]
        if not all(torch.isfinite(episode).all() for episode in episodes):
            raise NonFiniteError("The steps of an unlabelled pair must be finite, got a NaN or an infinity")
        self._steps = torch.cat((self._steps, *(episode.to(self._steps.device) for episode in episodes)))
        self._numbers = torch.cat((self._numbers, new))
        self._lengths = torch.cat((self._lengths, torch.tensor([len(episode) for episode in episodes])))

    def _drop_unused_episodes(self) -> None:
        device = self._steps.device
        first_rows = self._first_rows.to(device)
        episodes = torch.searchsorted(first_rows, self._starts, right=True) - 1
        used = torch.bincount(episodes.flatten(), minlength=len(first_rows)) > 0
        if used.all():
            return
        lengths = self._lengths.to(device)
        self._steps = self._steps[used.repeat_interleave(lengths)]
        dropped_before = (lengths * ~used).cumsum(0)
        self._starts = self._starts - dropped_before[episodes]
        self._numbers, self._lengths = self._numbers[used.cpu()], self._lengths[used.cpu()]


def num_steps(reward_update: int, num_labels: int, batch_size: int) -> int:
    """How many steps SURF takes in a session: as many as hold `reward_update` times the labelled pairs, rounded up."""
    return -(-reward_update * num_labels // batch_size)


class SurfLearner(EnsembleLearner):
    """Fits every member to the labels, and to those of its own guesses that it is sure of, with one Adam.

    Of each member's B labelled and its own B′ = B·`unlabelled_batch_ratio` unlabelled pairs, the loss is

        Σ CE(crop of a pair, its label) / B  +  weight · Σ [p ≥ threshold] CE(crop of a pair, its pseudo-label) / B′

    where p is the probability that the member gives its pseudo-label, the order it sees in the centres of the windows. The
    loss of a step is the sum over the members.

    Args:
        ensemble: the reward model; changed in place.
        config: thresholds, sizes and weights.
        learning_rate: Adam's.
        batch_size: labelled pairs in a step, for each member.
        generator: draws the members' orders and crops, on the CPU.
    """

    def __init__(
        self,
        ensemble: RewardEnsemble,
        config: SurfConfig,
        *,
        learning_rate: float = 3e-4,
        batch_size: int = 128,
        generator: torch.Generator,
    ) -> None:
        config.validate()
        super().__init__(ensemble, learning_rate=learning_rate, batch_size=batch_size, generator=generator)
        self.config = config

    def fit(
        self,
        dataset: PreferenceDataset,
        pool: UnlabelledPool,
        *,
        reward_update: int,
        gradient_hook: Hook | None = None,
    ) -> RewardFit:
        """Take `num_steps` steps; there is no stop rule.

        Args:
            dataset: the labelled pairs, windows of the judged segment with `config.crop` steps on either side, on the
                ensemble's device.
            pool: the unlabelled pairs, of windows as long.
            reward_update: how often each labelled pair is taken, on average.
            gradient_hook: called before each step with the loss gradient (P,), flat in the order of
                `ensemble.parameters()`; returns the gradient (P,) to step with.

        Raises:
            NonFiniteError: the loss or the hook's gradient is NaN or infinite; the ensemble is as after the
                last good step.
        """
        if len(dataset) == 0 or len(pool) == 0:
            raise ValueError(
                f"There must be labelled and unlabelled pairs to fit the reward to, got {len(dataset)} and {len(pool)}"
            )
        if reward_update < 1:
            raise ValueError(f"reward_update must be at least 1, got {reward_update}")
        if dataset.length != pool.length:
            raise ValueError(
                f"dataset and pool must hold windows of one length, got {dataset.length} and {pool.length} steps"
            )
        steps = num_steps(reward_update, len(dataset), self.batch_size)
        device = dataset.labels.device
        totals = torch.zeros(6, dtype=torch.float64)
        labelled = self._batches(len(dataset), self.batch_size, device)
        unlabelled = self._batches(len(pool), self.batch_size * self.config.unlabelled_batch_ratio, device)
        for indices, others in itertools.islice(zip(labelled, unlabelled, strict=True), steps):
            totals += self._step(dataset, indices, pool, others, gradient_hook)
        correct, decided, cross_entropy, pairs, kept, guessed = totals.tolist()
        return RewardFit(
            epochs=-(-steps // -(-len(dataset) // self.batch_size)),
            accuracy=correct / decided if decided else math.nan,
            loss=cross_entropy / pairs,
            kept=kept / guessed,
        )

    def _step(
        self, dataset: PreferenceDataset, indices: Tensor, pool: UnlabelledPool, others: Tensor, hook: Hook | None
    ) -> Tensor:
        """One step on labelled pairs (members, B) and unlabelled ones (members, B′): what `fit` sums for its report."""
        crop = self.config.crop
        labels = dataset.labels[indices]
        starts, lengths = self._crops(dataset.starts(indices), dataset.length)
        batch = PairBatch(starts, lengths, labels, longest=dataset.length - crop)
        loss, logits, gradients = pair_gradient(self.ensemble, dataset.steps, batch)

        windows = pool.starts(others)
        sure = pair_logits(self.ensemble, pool.steps, windows + crop, pool.length - 2 * crop)
        pseudo_labels, kept = pseudo_label(sure, self.config.threshold)
        starts, lengths = self._crops(windows, pool.length)
        batch = PairBatch(starts, lengths, pseudo_labels, longest=pool.length - crop, kept=kept)
        more = pair_gradient(self.ensemble, pool.steps, batch)

        weight = self.config.weight
        gradients = tuple(a.add(b, alpha=weight) for a, b in zip(gradients, more.gradients, strict=True))
        self._descend(loss + weight * more.loss, gradients, hook)
        return torch.tensor(
            [
                in_order(logits, labels).sum(),
                (labels != 0.5).sum(),
                loss * indices.shape[1],
                indices.numel(),
                kept.sum(),
                others.numel(),
            ],
            dtype=torch.float64,
        )

    def _batches(self, num: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
        """Each member's own orders of `num` pairs, one after another, in batches (members, B), without end."""
        while True:
            yield from self._draw_orders(num, device).split(batch_size, dim=1)

    def _crops(self, starts: Tensor, window: int) -> tuple[Tensor, Tensor]:
        moved, lengths = draw_crops(starts.shape[:-1], window, self.config.crop, self.generator)
        return starts + moved.to(starts.device), lengths.to(starts.device)


def pseudo_label(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """What logits of "the second is preferred" say, 0 or 1, and whether with at least the probability `threshold`."""
    return (logits > 0).to(logits.dtype), torch.sigmoid(logits.abs()) >= threshold


def draw_crops(
    shape: torch.Size | tuple[int, ...], window: int, crop: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A crop for each of some pairs of windows of S + 2·`crop` steps, on the CPU.

    Args:
        shape: of the pairs.
        window: steps of a window.
        crop: the length is uniform in {S − `crop`, …, S + `crop`}, the same for both windows of a pair.
        generator: draws first the lengths, then the starts.

    Returns:
        starts (*shape, 2), uniform over those that fit and independent of each other, and lengths (*shape), int64.
    """
    if window <= 3 * crop:
        raise ValueError(f"window must be longer than 3·crop = {3 * crop} steps, got {window}")
    lengths = torch.randint(window - 3 * crop, window - crop + 1, shape, generator=generator)
    where = torch.rand(*shape, 2, generator=generator, dtype=torch.float64)
    return (where * (window - lengths + 1)[..., None]).long(), lengths
