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

    Each transition is one row (observation, action, reward, terminated, next observation), so that adding
    some is one write and a batch one gather. Memory grows by doubling, up to `capacity` rows of 4·(2·do + da + 2)
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
    ) -> int:
        """`add_batch` of one transition: (do,), (da,), scalar, (do,), and whether the next observation is terminal."""
        (row,) = self.add_batch(
            np.asarray(observation)[None],
            np.asarray(action)[None],
            np.array([reward]),
            np.asarray(next_observation)[None],
            np.array([terminated]),
        )
        return row

    def add_batch(
        self,
        observations: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        next_observations: np.ndarray,
        terminated: np.ndarray,
    ) -> range | list[int]:
        """Store n transitions, in order: (n, do), (n, da), (n,), (n, do), (n,).

        Returns:
            The rows that they are in: their places in `observations`.

        Raises:
            NonFiniteError: a NaN or an infinity in them; nothing is stored.
        """
        num, start = len(rewards), self._position
        shapes = tuple(map(np.shape, (observations, actions, rewards, next_observations, terminated)))
        if shapes != ((num, self.obs_dim), (num, self.act_dim), (num,), (num, self.obs_dim), (num,)):
            raise ValueError(
                f"observations, actions, rewards, next_observations and terminated must be of shapes "
                f"(n, {self.obs_dim}), (n, {self.act_dim}), (n,), (n, {self.obs_dim}) and (n,), got {shapes}"
            )
        if num > self.capacity:
            raise ValueError(f"rewards must have at most {self.capacity} entries, all that the ring holds, got {num}")
        rows = np.empty((num, self._rows.shape[1]), np.float32)
        column = self._reward_column
        rows[:, : self.obs_dim] = observations
        rows[:, self.obs_dim : column] = actions
        rows[:, column] = rewards
        rows[:, column + 1] = terminated
        rows[:, column + 2 :] = next_observations
        if not np.isfinite(rows).all():
            bad = rows[~np.isfinite(rows).all(1)][0]
            observation, action, scalars, next_observation = np.split(bad, (self.obs_dim, column, column + 2))
            raise NonFiniteError(
                f"A transition must be finite, got observation {observation}, action {action}, "
                f"reward {scalars[0]}, next observation {next_observation}"
            )
        end = start + num
        if end <= self.capacity:
            self._write(start, rows)
            self._position = end % self.capacity
            return range(start, end)
        room = self.capacity - start
        self._write(start, rows[:room])
        self._write(0, rows[room:])
        self._position = end - self.capacity
        return [*range(start, self.capacity), *range(self._position)]

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

    def relabel(
        self, reward_fn: Callable[[Tensor, Tensor], Tensor], chunk: int = 8192, *, bpref_compat: bool = False
    ) -> None:
        """Replace every stored reward by `reward_fn(observations (n, do), actions (n, da))`, (n,), n ≤ chunk.

        Args:
            reward_fn: the new reward.
            chunk: how many transitions it is given at once.
            bpref_compat: as the code of B-Pref (Lee et al. 2021) has it: only the rows before the one that is written next,
                which once the ring is full are those of its latest round, and none right after its end.

        Raises:
            NonFiniteError: `reward_fn` returned a NaN or an infinity; all rewards stay as they were.
        """
        size = self._position if bpref_compat else self._size
        rewards = torch.empty(size, device=self._rows.device)
        with torch.no_grad():
            for start in range(0, size, chunk):
                rows = self._rows[start : min(start + chunk, size)]
                observations, actions, _ = rows.split((self.obs_dim, self.act_dim, self.obs_dim + 2), dim=1)
                rewards[start : start + chunk] = reward_fn(observations, actions)
        bad = int((~torch.isfinite(rewards)).sum())
        if bad:
            raise NonFiniteError(
                f"The reward function returned a NaN or an infinity for {bad} of {size} stored transitions"
            )
        self.rewards[:size] = rewards

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

    def _write(self, start: int, rows: np.ndarray) -> None:
        end = start + len(rows)
        if end > self._rows.shape[0]:
            self._allocate(min(self.capacity, max(end, 2 * self._rows.shape[0])))
        if self._rows_numpy is not None:
            self._rows_numpy[start:end] = rows
        else:
            self._rows[start:end].copy_(torch.from_numpy(rows), non_blocking=True)
        self._size = max(self._size, end)

    def _allocate(self, num_rows: int) -> None:
        rows = self._rows.new_empty(num_rows, self._rows.shape[1])
        rows[: self._size] = self._rows[: self._size]
        self._rows = rows
        # NumPy writes a row in a tenth of torch's time.
        self._rows_numpy = rows.numpy() if rows.device.type == "cpu" else None
