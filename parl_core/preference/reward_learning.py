"""Labelled pairs, and a reward ensemble fitted to them by the Bradley–Terry cross-entropy.

Christiano et al. 2017, "Deep Reinforcement Learning from Human Preferences"; the settings are those of PEBBLE
(Lee, Smith and Abbeel 2021).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..models.rewards import RewardEnsemble
from ..optim import adam_step
from ..trajectories import PreferencePairs, Trajectories
from .pair_gradient import PairBatch, pair_gradient
from .samplers import Queries


class PreferenceDataset:
    """Up to `capacity` labelled pairs of segments of `length` steps, in the order of their labelling, on `device`."""

    def __init__(
        self, capacity: int, length: int, obs_dim: int, act_dim: int, *, device: torch.device | str = "cpu"
    ) -> None:
        if capacity < 0 or length < 1:
            raise ValueError(f"capacity must be at least 0 and length at least 1, got {capacity} and {length}")
        self.capacity, self.length, self.obs_dim, self.act_dim = capacity, length, obs_dim, act_dim
        self._segments = torch.empty(capacity, 2, length, obs_dim + act_dim, device=device)
        self._labels = torch.empty(capacity, device=device)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def labels(self) -> Tensor:
        """(size,), probability that the second segment of each pair is preferred."""
        return self._labels[: self._size]

    def append(self, queries: Queries, labels: Tensor) -> None:
        """Add M labelled pairs; labels (M,) in [0, 1] are the probabilities that the second is preferred."""
        num = len(queries)
        if labels.shape != (num,) or not ((labels >= 0) & (labels <= 1)).all():
            raise ValueError(f"labels must have shape (M,) = ({num},) and lie in [0, 1], got {labels}")
        if self._size + num > self.capacity:
            raise ValueError(f"There is room for {self.capacity - self._size} more labelled pairs, got {num}")
        first = torch.cat((queries.first.observations, queries.first.actions), dim=-1)
        second = torch.cat((queries.second.observations, queries.second.actions), dim=-1)
        segments = torch.stack((first, second), dim=1)
        if segments.shape[1:] != self._segments.shape[1:]:
            raise ValueError(
                f"segments must have {self.length} steps of {self.obs_dim} + {self.act_dim} numbers, "
                f"got shapes {tuple(queries.first.observations.shape)} and "
                f"{tuple(queries.first.actions.shape)}"
            )
        if not torch.isfinite(segments).all():
            raise NonFiniteError("The segments of a labelled pair must be finite, got a NaN or an infinity")
        self._segments[self._size : self._size + num] = segments
        self._labels[self._size : self._size + num] = labels
        self._size += num

    def select(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs at `indices` (any shape): observations (…, 2, L, do), actions (…, 2, L, da), labels (…)."""
        segments = self.segments[indices]
        observations, actions = segments.split((self.obs_dim, self.act_dim), dim=-1)
        return observations, actions, self.labels[indices]

    def recent(self, num: int, dtype: torch.dtype = torch.float32) -> PreferencePairs:
        """The last `num` labelled pairs, or as many as there are, oldest first."""
        start = max(self._size - num, 0)
        device = self._labels.device
        observations, actions, labels = self.select(torch.arange(start, self._size, device=device))
        offsets = torch.arange(0, len(labels) * self.length + 1, self.length, device=device)
        first, second = (
            Trajectories(
                observations[:, which].flatten(0, 1).to(dtype),
                actions[:, which].flatten(0, 1).to(dtype),
                offsets,
            )
            for which in (0, 1)
        )
        return PreferencePairs(first, second, labels)

    @property
    def segments(self) -> Tensor:
        """(size, 2, L, do + da), observations and actions of the steps of each pair's segments."""
        return self._segments[: self._size]

    @property
    def steps(self) -> Tensor:
        """(size·2·L, do + da), the steps of all segments one after another: what `starts` speaks of."""
        return self.segments.flatten(0, 2)

    def starts(self, indices: Tensor) -> Tensor:
        """(…, 2) int64, the first rows in `steps` of the segments of the pairs at `indices` (any shape)."""
        first = 2 * self.length * indices
        return torch.stack((first, first + self.length), dim=-1)

    def state_dict(self) -> dict[str, Any]:
        """The labelled pairs, sharing memory with the dataset."""
        return {"segments": self.segments, "labels": self.labels}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, from a dataset whose segments have the same sizes."""
        segments = state["segments"]
        if segments.shape[1:] != self._segments.shape[1:] or len(segments) > self.capacity:
            raise ValueError(
                f"segments must have shape (M, {', '.join(map(str, self._segments.shape[1:]))}) "
                f"with M at most {self.capacity}, got {tuple(segments.shape)}"
            )
        self._size = len(segments)
        self._segments[: self._size] = segments
        self._labels[: self._size] = state["labels"]


Hook = Callable[[Tensor], Tensor]
"""From a loss gradient (P,), flat in the order of `ensemble.parameters()`, to the gradient (P,) to step with."""


@dataclass(frozen=True)
class RewardFit:
    """How one fit of an ensemble ended."""

    epochs: int
    """Epochs run; in semi-supervised fits passes over the labelled pairs, the last of them perhaps unfinished."""
    accuracy: float
    """Share of the last epoch's pairs ordered as labelled, mean over the members, each batch judged before
    its step; in semi-supervised fits of all steps' cropped pairs. Pairs without a preference (label 0.5) do not
    count; NaN if there are no others."""
    loss: float
    """Cross-entropy of the labelled pairs in those steps, mean over pairs and members, in nats."""
    kept: float | None = None
    """Share of the unlabelled pairs of all steps that were confident enough to be learned from, mean over the members;
    None where there are none."""


class EnsembleLearner:
    """An ensemble with the Adam and the random numbers of its fits: what all ways to fit it have in common.

    Args:
        ensemble: the reward model; changed in place.
        learning_rate: Adam's.
        batch_size: labelled pairs in a step, for each member.
        generator: draws the members' orders, on the CPU.
    """

    def __init__(
        self, ensemble: RewardEnsemble, *, learning_rate: float, batch_size: int, generator: torch.Generator
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.ensemble, self.batch_size, self.generator = ensemble, batch_size, generator
        self._params = list(ensemble.parameters())
        self.optimizer = torch.optim.Adam(self._params, lr=learning_rate, fused=True)

    def state_dict(self) -> dict[str, Any]:
        """Everything an identical continuation needs: ensemble, optimiser, generator."""
        return {
            "ensemble": self.ensemble.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, from a learner of the same sizes."""
        self.ensemble.load_state_dict(state["ensemble"])
        # The optimiser would keep the very tensors it is given, and then change them in place.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.generator.set_state(state["generator"])

    def _draw_orders(self, num: int, device: torch.device) -> Tensor:
        """(members, num): each member's own order of `num` pairs."""
        orders = [torch.randperm(num, generator=self.generator) for _ in range(self.ensemble.num_members)]
        return torch.stack(orders).to(device)

    def _descend(self, loss: Tensor, gradients: tuple[Tensor, ...], gradient_hook: Hook | None) -> None:
        """One step of Adam along the gradients of a loss."""
        if not torch.isfinite(loss):
            raise NonFiniteError(f"The reward model's loss became {loss.item()}; lower its learning rate")
        if gradient_hook is not None:
            gradients = self._apply_hook(gradient_hook, gradients)
        for param, gradient in zip(self._params, gradients, strict=True):
            param.grad = gradient
        adam_step(self.optimizer)

    def _apply_hook(self, gradient_hook: Hook, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        hooked = gradient_hook(flat)
        if hooked.shape != flat.shape:
            raise ValueError(f"gradient_hook must return shape {tuple(flat.shape)}, got {tuple(hooked.shape)}")
        if not torch.isfinite(hooked).all():
            raise NonFiniteError("gradient_hook returned a gradient with a NaN or an infinity in it")
        parts = hooked.detach().to(flat.dtype).split([param.numel() for param in self._params])
        return tuple(part.view_as(param) for part, param in zip(parts, self._params, strict=True))


class RewardLearner(EnsembleLearner):
    """Fits every member of an ensemble to the same labels, each in an order of its own, with one Adam.

    The loss of a batch is the sum over the members of each one's mean cross-entropy, where the logit of "the
    second is preferred" is the difference of the member's rewards summed over the segments.

    Args:
        ensemble: the reward model; changed in place.
        learning_rate: Adam's.
        batch_size: pairs in a step, for each member.
        generator: draws the members' orders, on the CPU.
        bpref_compat: judge accuracy as B-Pref does (Lee et al. 2021, "B-Pref"), where a pair without a preference is
            one whose first segment is preferred, and so is a tie of the rewards.
    """

    def __init__(
        self,
        ensemble: RewardEnsemble,
        *,
        learning_rate: float = 3e-4,
        batch_size: int = 128,
        generator: torch.Generator,
        bpref_compat: bool = False,
    ) -> None:
        super().__init__(ensemble, learning_rate=learning_rate, batch_size=batch_size, generator=generator)
        self.bpref_compat = bpref_compat

    def fit(
        self,
        dataset: PreferenceDataset,
        max_epochs: int,
        accuracy_target: float = 0.97,
        gradient_hook: Hook | None = None,
    ) -> RewardFit:
        """Run epochs over all labelled pairs until the mean accuracy exceeds `accuracy_target`.

        Args:
            dataset: the labelled pairs, on the ensemble's device.
            max_epochs: at most so many epochs.
            accuracy_target: stop after the first epoch with a higher accuracy.
            gradient_hook: called before each step with the loss gradient (P,), flat in the order of
                `ensemble.parameters()`; returns the gradient (P,) to step with.

        Raises:
            NonFiniteError: the loss or the hook's gradient is NaN or infinite; the ensemble is as after the
                last good step.
        """
        if len(dataset) == 0:
            raise ValueError("There are no labelled pairs to fit the reward to")
        if max_epochs < 1:
            raise ValueError(f"max_epochs must be at least 1, got {max_epochs}")
        members, device = self.ensemble.num_members, dataset.labels.device
        num_judged = len(dataset) if self.bpref_compat else int((dataset.labels != 0.5).sum())
        epochs, accuracy = 0, float("nan")
        while epochs < max_epochs and not accuracy > accuracy_target:
            epochs += 1
            order = self._draw_orders(len(dataset), device)
            total_loss = torch.zeros((), device=device)
            total_correct = torch.zeros((), dtype=torch.int64, device=device)
            for indices in order.split(self.batch_size, dim=1):
                labels, lengths = dataset.labels[indices], torch.full_like(indices, dataset.length)
                batch = PairBatch(dataset.starts(indices), lengths, labels, longest=dataset.length)
                loss, logits, gradients = pair_gradient(self.ensemble, dataset.steps, batch)
                self._descend(loss, gradients, gradient_hook)
                total_loss += loss * indices.shape[1]
                total_correct += in_order(logits, labels, bpref_compat=self.bpref_compat).sum()
            accuracy = total_correct.item() / (members * num_judged) if num_judged else float("nan")
        return RewardFit(epochs, accuracy, total_loss.item() / (members * len(dataset)))


def in_order(logits: Tensor, labels: Tensor, *, bpref_compat: bool = False) -> Tensor:
    """Which pairs the logits order as the labels do, of the same shape; a tie of either is not in order.

    With `bpref_compat` a tie of either counts as the first segment being preferred.
    """
    if bpref_compat:
        return (logits > 0) == (labels > 0.5)
    return (logits.sign() == (labels - 0.5).sign()) & (labels != 0.5)
