"""Replay buffer whose rewards can be computed anew when the reward model changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError

FIRST_ROWS = 1024


class Batch(NamedTuple):
    """B transitions drawn from a `ReplayBuffer`, float32 unless said otherwise."""

    observations: Tensor
    """(B, do)"""
    actions: Tensor
    """(B, da)"""
    rewards: Tensor
    """(B,)"""
    next_observations: Tensor
    """(B, do)"""
    terminated: Tensor
    """(B,), 1 where the next observation is terminal; a time limit does not count."""
    indices: Tensor
    """(B,) int64, where each transition lies in `ReplayBuffer.observations`."""


class ReplayBuffer:
    """A ring of the last `capacity` transitions, uniform sampling with replacement.

    Each transition is one row (observation, action, reward, terminated, next observation), so that adding is
    one write and a batch one gather. Memory grows by doubling, up to `capacity` rows of 4·(2·do + da + 2)
    bytes.

    Args:
        capacity: how many transitions are kept; the oldest is overwritten first.
        obs_dim, act_dim: do and da.
        device: where the transitions are kept and drawn; on an agent's own GPU a batch needs no copy from the host.
    """

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, *, device: torch.device | str = "cpu") -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity, self.obs_dim, self.act_dim = capacity, obs_dim, act_dim
        self._reward_column = obs_dim + act_dim
        self._size = 0
        self._position = 0
        self._rows = torch.empty(0, 2 * obs_dim + act_dim + 2, device=device)
        self._allocate(min(capacity, FIRST_ROWS))

    def __len__(self) -> int:
        return self._size

    @property
    def observations(self) -> Tensor:
        """(size, do), a view of all stored observations, in ring order."""
        return self._rows[: self._size, : self.obs_dim]

    @property
    def rewards(self) -> Tensor:
        """(size,), a view of all stored rewards, in ring order."""
        return self._rows[: self._size, self._reward_column]

    def add(
        self,
        observation: np.ndarray,
        action: np.ndarray,
        reward: float,
        next_observation: np.ndarray,
        terminated: bool,
    ) -> None:
        """Store one transition: (do,), (da,), scalar, (do,), and whether the next observation is terminal.

        Raises:
            NonFiniteError: a NaN or an infinity in it; nothing is stored.
        """
        row = np.concatenate((observation, action, (reward, terminated), next_observation), dtype=np.float32)
        if row.shape != (self._rows.shape[1],):
            raise ValueError(
                f"observation, action and next_observation must have {self.obs_dim}, {self.act_dim} and "
                f"{self.obs_dim} entries, got shapes {np.shape(observation)}, {np.shape(action)} and "
                f"{np.shape(next_observation)}"
            )
        if not np.isfinite(row).all():
            raise NonFiniteError(
                f"A transition must be finite, got observation {observation}, action {action}, "
                f"reward {reward}, next observation {next_observation}"
            )
        if self._position == self._rows.shape[0]:
            self._allocate(min(self.capacity, 2 * self._position))
        if self._rows_numpy is not None:
            self._rows_numpy[self._position] = row
        else:
            self._rows[self._position].copy_(torch.from_numpy(row), non_blocking=True)
        self._size = max(self._size, self._position + 1)
        self._position = (self._position + 1) % self.capacity

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw `batch_size` transitions uniformly, with replacement; the generator draws on the buffer's device."""
        if self._size == 0:
            raise ValueError("The replay buffer is empty: add transitions before sampling")
        indices = torch.randint(self._size, (batch_size,), generator=generator, device=self._rows.device)
        rows = self._rows.index_select(0, indices)
        observations, actions, reward_terminated, next_observations = rows.split(
            (self.obs_dim, self.act_dim, 2, self.obs_dim), dim=1
        )
        rewards, terminated = reward_terminated.unbind(1)
        return Batch(observations, actions, rewards, next_observations, terminated, indices)

    def relabel(self, reward_fn: Callable[[Tensor, Tensor], Tensor], chunk: int = 8192) -> None:
        """Replace every stored reward by `reward_fn(observations (n, do), actions (n, da))`, (n,), n ≤ chunk.

        Raises:
            NonFiniteError: `reward_fn` returned a NaN or an infinity; all rewards stay as they were.
        """
        rewards = torch.empty(self._size, device=self._rows.device)
        with torch.no_grad():
            for start in range(0, self._size, chunk):
                rows = self._rows[start : min(start + chunk, self._size)]
                observations, actions, _ = rows.split((self.obs_dim, self.act_dim, self.obs_dim + 2), dim=1)
                rewards[start : start + chunk] = reward_fn(observations, actions)
        bad = int((~torch.isfinite(rewards)).sum())
        if bad:
            raise NonFiniteError(
                f"The reward function returned a NaN or an infinity for {bad} of {self._size} stored transitions"
            )
        self.rewards.copy_(rewards)

    def state_dict(self) -> dict[str, Any]:
        """The stored transitions (sharing memory with the buffer) and the ring's position."""
        return {"transitions": self._rows[: self._size], "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, from a buffer of the same capacity and sizes."""
        transitions = state["transitions"]
        size, width = transitions.shape
        if width != self._rows.shape[1] or size > self.capacity:
            raise ValueError(
                f"transitions must have {self._rows.shape[1]} columns and at most {self.capacity} rows, "
                f"got shape {tuple(transitions.shape)}"
            )
        transitions = transitions.to(self._rows.device, copy=True)
        self._size = 0
        self._allocate(min(self.capacity, max(size, FIRST_ROWS)))
        self._rows[:size] = transitions
        self._size, self._position = size, int(state["position"])

    def _allocate(self, num_rows: int) -> None:
        rows = self._rows.new_empty(num_rows, self._rows.shape[1])
        rows[: self._size] = self._rows[: self._size]
        self._rows = rows
        # NumPy writes a row in a tenth of torch's time.
        self._rows_numpy = rows.numpy() if rows.device.type == "cpu" else None
