"""PEBBLE's reward before any label is there: how far a state is from its neighbours among all states visited.

Lee, Smith and Abbeel, "PEBBLE", ICML 2021, section 4.1: a particle estimate of the entropy of the visited
states. As in the authors' experiments the reward is the plain distance to the k-th nearest neighbour, without
a logarithm, divided by the running standard deviation of all such distances.

Every state keeps the distances to its k nearest neighbours. A new state is compared once with all others, which gives
its own list and corrects theirs, so that a batch of rewards is a look-up, as exact as a search would be.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.registry import Op

BLOCK = 16  # states that lie side by side, coordinate by coordinate: see csrc/cpu/neighbours.h
FIRST_BLOCKS = 64
_CPU = torch.empty(0)


class RunningMoments:
    """Mean and variance of all values seen so far (Chan, Golub and LeVeque 1979).

    Args:
        bpref_compat: as the code of B-Pref (Lee et al. 2021) has it: the mean becomes that of the latest batch plus its
            share of the count; each batch's variance is the unbiased one; a variance of 1 counts for 1e-4 values.
    """

    def __init__(self, *, bpref_compat: bool = False) -> None:
        self.bpref_compat = bpref_compat
        self.count: float = 1e-4 if bpref_compat else 0
        self.mean = 0.0
        self._squared_deviations = float(self.count)

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
        squared_deviations = (values - mean).square().sum().item()
        if self.bpref_compat:
            squared_deviations *= count / max(count - 1, 1)
        self._squared_deviations += squared_deviations + shift**2 * self.count * count / total
        self.mean = mean + count / total if self.bpref_compat else self.mean + shift * count / total
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        """Three numbers."""
        return {"count": self.count, "mean": self.mean, "squared_deviations": self._squared_deviations}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.count, self.mean = state["count"], state["mean"]
        self._squared_deviations = state["squared_deviations"]


class StateEntropyReward:
    """Distance to the k-th nearest neighbour among all states added, divided by its running standard deviation.

    Adding one of R states costs R distances; replacing one, as a replay does once its ring is full, costs about k + 2
    times as many, since the lists that it was in are made anew. Distances are sums of squared differences in float32,
    never a matrix product, whose digits close neighbours would lose.

    Args:
        obs_dim: do, the size of an observation.
        k: which neighbour; the farthest one while there are fewer others.
        bpref_compat: the running moments of B-Pref: see `RunningMoments`.
    """

    def __init__(self, obs_dim: int, *, k: int = 5, bpref_compat: bool = False) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.obs_dim, self.k = obs_dim, k
        self.moments = RunningMoments(bpref_compat=bpref_compat)
        self._size = 0
        self._states = np.zeros((0, obs_dim, BLOCK), np.float32)
        self._nearest = np.empty((k, 0), np.float32)  # squared distances, ascending; infinite where there are fewer
        self._grow(FIRST_BLOCKS)

    def __len__(self) -> int:
        return self._size

    def add(self, observation: np.ndarray, row: int) -> None:
        """Take in the state (do,), finite, that the replay stores in `row`: a new row, or one whose state it replaces."""
        if not 0 <= row <= self._size:
            raise ValueError(f"row must be an old one or the next, 0 to {self._size}, got {row}")
        if np.shape(observation) != (self.obs_dim,):
            raise ValueError(f"observation must be of shape ({self.obs_dim},), got {np.shape(observation)}")
        block, lane = divmod(row, BLOCK)
        insert = _INSERT.kernel(_INSERT.select(_CPU, None))
        if row < self._size:
            stale = self._near(self._states[block, :, lane])
            self._states[block, :, lane] = observation
            insert(self._states, self._size, row, self._nearest, True)
            for other in stale[stale != row].tolist():
                insert(self._states, self._size, other, self._nearest, False)
            return
        if block == len(self._states):
            self._grow(2 * block)
        self._states[block, :, lane] = observation
        self._size += 1
        insert(self._states, self._size, row, self._nearest, True)

    def add_batch(self, observations: np.ndarray, rows: Sequence[int] | np.ndarray) -> None:
        """`add` of each of (n, do) states, in order."""
        for observation, row in zip(observations, rows, strict=True):
            self.add(observation, int(row))

    def __call__(self, indices: Tensor) -> Tensor:
        """Rows (B,) int64 -> their rewards (B,), float32, among all states there are now.

        Raises:
            ValueError: there are fewer than two states.
            IndexError: a row that was never added.
        """
        if self._size < 2:
            raise ValueError(f"A neighbour takes two states or more, got {self._size}")
        kth = torch.from_numpy(self._nearest[min(self.k, self._size - 1) - 1, : self._size])
        distances = kth.index_select(0, indices.cpu()).sqrt()
        self.moments.update(distances)
        return (distances / max(self.moments.std, torch.finfo(distances.dtype).eps)).to(indices.device)

    def state_dict(self) -> dict[str, Any]:
        """The states (R, do), the squared distances to their neighbours (k, R), and the running moments."""
        return {
            "observations": torch.from_numpy(self._rows().copy()),
            "nearest": torch.from_numpy(self._nearest[:, : self._size].copy()),
            "moments": self.moments.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, of the same sizes."""
        observations, nearest = np.asarray(state["observations"]), np.asarray(state["nearest"])
        size = len(observations)
        if observations.shape[1:] != (self.obs_dim,) or nearest.shape != (self.k, size):
            raise ValueError(
                f"observations and nearest must be of shapes (R, {self.obs_dim}) and ({self.k}, R), "
                f"got {observations.shape} and {nearest.shape}"
            )
        self._size = 0
        self._grow(max(FIRST_BLOCKS, -(-size // BLOCK)))
        blocks, lanes = np.divmod(np.arange(size), BLOCK)
        self._states[blocks, :, lanes] = observations
        self._nearest[:, :size] = nearest
        self._size = size
        self.moments.load_state_dict(state["moments"])

    def _near(self, state: np.ndarray) -> np.ndarray:
        """Rows that may have `state` in their lists: all that do, and those that a rounding error takes for such."""
        squared = np.square(self._rows() - state).sum(1)
        return np.flatnonzero(squared <= self._nearest[-1, : self._size] * 1.0001 + np.finfo(np.float32).tiny)

    def _rows(self) -> np.ndarray:
        """All states, (R, do)."""
        return self._states.transpose(0, 2, 1).reshape(-1, self.obs_dim)[: self._size]

    def _grow(self, num_blocks: int) -> None:
        states = np.zeros((num_blocks, self.obs_dim, BLOCK), np.float32)
        nearest = np.full((self.k, num_blocks * BLOCK), np.inf, np.float32)
        states[: -(-self._size // BLOCK)] = self._states[: -(-self._size // BLOCK)]
        nearest[:, : self._size] = self._nearest[:, : self._size]
        self._states, self._nearest = states, nearest


def _reference_insert(states: np.ndarray, num: int, row: int, nearest: np.ndarray, mutual: bool) -> None:
    """Write the list of the state in `row`; with `mutual` also enter it into the lists of the others.

    Args:
        states: (blocks, do, BLOCK), of which the first `num` count.
        num: how many.
        row: of the state.
        nearest: (k, blocks·BLOCK), squared distances, ascending along k.
        mutual: whether the others' lists do not know the state yet.
    """
    k = len(nearest)
    state = states[row // BLOCK, :, row % BLOCK]
    squared = np.square(states[: -(-num // BLOCK)] - state[:, None]).sum(1).reshape(-1)[:num]
    squared[row] = np.inf
    own = np.sort(np.partition(squared, k - 1)[:k] if k < num else squared)
    nearest[:, row] = np.inf
    nearest[: len(own), row] = own
    if mutual:
        (closer,) = np.nonzero(squared < nearest[-1, :num])
        lists = np.concatenate((nearest[:, closer], squared[None, closer]))
        nearest[:, closer] = np.sort(lists, axis=0)[:k]


_INSERT = Op("StateEntropyReward.add", _reference_insert)
_INSERT.register(
    "cpp",
    lambda: importlib.import_module("parl_core._native").find_neighbours,
    device_types=frozenset({"cpu"}),
    dtypes=frozenset({torch.float32}),
)
