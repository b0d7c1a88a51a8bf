"""PEBBLE's reward before any label is there: how far a state is from its neighbours among all states visited.

Lee, Smith and Abbeel, "PEBBLE", ICML 2021, section 4.1: a particle estimate of the entropy of the visited
states. As in the authors' experiments the reward is the plain distance to the k-th nearest neighbour, without
a logarithm, divided by the running standard deviation of all such distances.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class RunningMoments:
    """Mean and variance of all values seen so far (Chan, Golub and LeVeque 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squared_deviations = 0.0

    @property
    def std(self) -> float:
        """Standard deviation (population form); 0 before the first value."""
        return math.sqrt(self._squared_deviations / self.count) if self.count else 0.0

    def update(self, values: Tensor) -> None:
        """Take in a tensor of values, of any shape."""
        values = values.double()
        count = values.numel()
        mean = values.mean().item()
        shift = mean - self.mean
        total = self.count + count
        self._squared_deviations += (values - mean).square().sum().item()
        self._squared_deviations += shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        """Three numbers."""
        return {"count": self.count, "mean": self.mean, "squared_deviations": self._squared_deviations}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.count, self.mean = state["count"], state["mean"]
        self._squared_deviations = state["squared_deviations"]


def neighbour_distances(
    observations: Tensor, references: Tensor, own_indices: Tensor, k: int, chunk: int = 16384
) -> Tensor:
    """Euclidean distance of each observation to its k-th nearest reference, itself excluded: (B,).

    Args:
        observations: (B, do).
        references: (R, do).
        own_indices: (B,) int64, the observation's own row in `references`, or −1 where it is not among them.
        k: which neighbour; the farthest one where there are fewer.
        chunk: how many references are compared at once; bounds the memory to B·chunk distances.
    """
    num_others = len(references) - (own_indices >= 0).long()
    if not (num_others > 0).all():
        raise ValueError("references must hold at least one row besides the observation itself")
    nearest = observations.new_empty(len(observations), 0)
    for start in range(0, len(references), chunk):
        part = references[start : start + chunk]
        # A matrix product would be faster, but the distances of close neighbours would be mere rounding.
        distances = torch.cdist(observations, part, compute_mode="donot_use_mm_for_euclid_dist")
        own = own_indices - start
        rows = ((own >= 0) & (own < len(part))).nonzero().squeeze(1)
        distances[rows, own[rows]] = math.inf
        nearest = torch.cat((nearest, distances.topk(min(k, len(part)), largest=False).values), dim=1)
        nearest = nearest.sort().values[:, :k]
    return nearest.gather(1, (num_others.clamp(max=k) - 1).unsqueeze(1)).squeeze(1)


class StateEntropyReward:
    """Distance to the k-th nearest neighbour in the replay, divided by its running standard deviation.

    Args:
        generator: draws the references where `max_references` limits them.
        k: which neighbour.
        max_references: compare with a uniform random subset of this many observations, for small machines.
            Distances grow by about (R/max_references)^(1/do), which the standard deviation mostly undoes.
    """

    def __init__(self, generator: torch.Generator, k: int = 5, max_references: int | None = None) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if max_references is not None and max_references <= k:
            raise ValueError(f"max_references must be greater than k = {k}, got {max_references}")
        self.generator, self.k, self.max_references = generator, k, max_references
        self.moments = RunningMoments()

    def __call__(self, observations: Tensor, indices: Tensor, replay_observations: Tensor) -> Tensor:
        """(B, do), their rows in the replay (B,), all observations of the replay (R, do) -> (B,)."""
        references, own_indices = replay_observations, indices
        total = len(replay_observations)
        if self.max_references is not None and total > self.max_references:
            chosen = torch.randperm(total, generator=self.generator)[: self.max_references]
            references = replay_observations[chosen]
            row_of = torch.full((total,), -1).index_copy_(0, chosen, torch.arange(self.max_references))
            own_indices = row_of[indices]
        distances = neighbour_distances(observations, references, own_indices, self.k)
        self.moments.update(distances)
        return distances / max(self.moments.std, torch.finfo(distances.dtype).eps)

    def state_dict(self) -> dict[str, Any]:
        """The running moments and the generator."""
        return {"moments": self.moments.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.moments.load_state_dict(state["moments"])
        self.generator.set_state(state["generator"])
