"""What the agent has lived through lately, as segments to be judged; and evaluation on the true reward."""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..trajectories import Trajectories

if TYPE_CHECKING:
    from ..envs.interface import Environment

FIRST_ROWS = 1024


class Segments(NamedTuple):
    """n stretches of L consecutive steps of one episode each, float32."""

    observations: Tensor
    """(n, L, do)"""
    actions: Tensor
    """(n, L, da)"""
    true_rewards: Tensor
    """(n, L), of the environment; for teachers and logs, never for learning."""


class EpisodeStore:
    """The last `max_episodes` finished episodes and the running one.

    Args:
        max_episodes: how many finished episodes are kept.
        obs_dim, act_dim: sizes of an observation and an action.
    """

    def __init__(self, max_episodes: int, obs_dim: int, act_dim: int) -> None:
        if max_episodes < 1:
            raise ValueError(f"max_episodes must be at least 1, got {max_episodes}")
        self.obs_dim, self.act_dim = obs_dim, act_dim
        self._widths = (obs_dim, act_dim, 1)
        self._finished: deque[Tensor] = deque(maxlen=max_episodes)
        self._running = torch.empty(FIRST_ROWS, sum(self._widths))
        self._running_numpy = self._running.numpy()
        self._running_length = 0

    @property
    def num_episodes(self) -> int:
        """Finished episodes that are kept."""
        return len(self._finished)

    def count_episodes(self, length: int) -> int:
        """Finished episodes of at least `length` steps."""
        return len(self._long_enough(length))

    def count_latest(self, num_steps: int, length: int) -> int:
        """How many of the latest finished episodes of at least `length` steps it takes to hold `num_steps` of theirs.

        All of them if they hold fewer.
        """
        held = itertools.accumulate(len(episode) for episode in reversed(self._long_enough(length)))
        return min(1 + sum(total < num_steps for total in held), self.count_episodes(length))

    @property
    def num_steps(self) -> int:
        """Steps that are kept, those of the running episode included."""
        return sum(map(len, self._finished)) + self._running_length

    def add(self, observation: np.ndarray, action: np.ndarray, true_reward: float) -> None:
        """Append one step of the running episode: (do,), (da,), scalar."""
        if self._running_length == len(self._running):
            self._set_running(self._running, 2 * len(self._running))
        row = self._running_numpy[self._running_length]
        row[: self.obs_dim] = observation
        row[self.obs_dim : -1] = action
        row[-1] = true_reward
        self._running_length += 1

    def end_episode(self) -> None:
        """The running episode is finished; the oldest one is dropped if there are too many."""
        self._finished.append(self._running[: self._running_length].clone())
        self._running_length = 0

    def sample(self, num: int, length: int, generator: torch.Generator, latest: int | None = None) -> Segments:
        """Draw `num` segments of `length` steps: an episode uniformly, then a start in it uniformly.

        Finished episodes of at least `length` steps take part; of them only the last `latest`, if given.
        """
        episodes = self._long_enough(length)
        episodes = episodes if latest is None else episodes[-latest:]
        if not episodes:
            raise ValueError(
                f"There is no finished episode of at least {length} steps to draw segments from "
                f"(finished episodes: {len(self._finished)})"
            )
        which = torch.randint(len(episodes), (num,), generator=generator).tolist()
        where = torch.rand(num, generator=generator, dtype=torch.float64).tolist()
        starts = [int(u * (len(episodes[i]) - length + 1)) for i, u in zip(which, where, strict=True)]
        rows = torch.stack([episodes[i][start : start + length] for i, start in zip(which, starts, strict=True)])
        observations, actions, true_rewards = rows.split(self._widths, dim=-1)
        return Segments(observations, actions, true_rewards.squeeze(-1))

    def latest_segments(self, latest: int, length: int) -> Segments:
        """All of the last `latest` finished episodes of at least `length` steps, cut into segments that share no step.

        Each episode is cut from its end backwards; what is left over at its beginning is skipped. Oldest first.
        """
        episodes = self._long_enough(length)[-latest:]
        rows = torch.cat([episode[len(episode) % length :].unflatten(0, (-1, length)) for episode in episodes])
        observations, actions, true_rewards = rows.split(self._widths, dim=-1)
        return Segments(observations, actions, true_rewards.squeeze(-1))

    def recent_trajectories(
        self, num_steps: int, length: int, dtype: torch.dtype = torch.float32, *, skip_episodes: int = 0
    ) -> Trajectories:
        """The most recent steps, cut into windows of `length` steps that do not overlap: `num_steps // length` of them.

        Each episode, the running one included, is cut from its end backwards; what is left over at its beginning is
        skipped. Fewer windows come back when the store holds no more; oldest first. With `skip_episodes`, the running
        episode and that many of the latest finished ones that hold a window are left out: those that `sample` draws from
        with the same number as `latest`.
        """
        finished = self._long_enough(length)[::-1]
        episodes = finished[skip_episodes:] if skip_episodes else [self._running[: self._running_length], *finished]
        windows: list[Tensor] = []
        for episode in episodes:
            for end in range(len(episode), length - 1, -length):
                if (len(windows) + 1) * length > num_steps:
                    break
                windows.append(episode[end - length : end])
        if not windows:
            raise ValueError(
                f"There is no window of {length} steps among the {self.num_steps} steps kept and the "
                f"{num_steps} asked for"
            )
        observations, actions, _ = torch.cat(windows[::-1]).to(dtype).split(self._widths, dim=-1)
        offsets = torch.arange(0, len(windows) * length + 1, length)
        return Trajectories(observations, actions, offsets)

    def state_dict(self) -> dict[str, Any]:
        """All steps, and the lengths of the episodes, the running one last."""
        episodes = (*self._finished, self._running[: self._running_length])
        return {"steps": torch.cat(episodes), "lengths": torch.tensor([len(episode) for episode in episodes])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, from a store of the same sizes."""
        steps = state["steps"]
        if steps.shape[1] != sum(self._widths):
            raise ValueError(f"steps must have {sum(self._widths)} columns, got shape {tuple(steps.shape)}")
        *finished, running = steps.clone().split(state["lengths"].tolist())
        self._finished = deque(finished, maxlen=self._finished.maxlen)
        self._set_running(running, max(len(running), FIRST_ROWS))
        self._running_length = len(running)

    def _long_enough(self, length: int) -> list[Tensor]:
        """Finished episodes of at least `length` steps, oldest first."""
        return [episode for episode in self._finished if len(episode) >= length]

    def _set_running(self, rows: Tensor, num_rows: int) -> None:
        self._running = torch.empty(num_rows, sum(self._widths))
        self._running[: len(rows)] = rows
        self._running_numpy = self._running.numpy()


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted true returns of some episodes."""

    true_return: float
    """Mean over the episodes."""
    true_return_std: float
    """Standard deviation over the episodes (population form: 0 for one episode)."""
    success_rate: float | None
    """Share of episodes with success at any step; None where the environment does not report success."""
    returns: tuple[float, ...]
    """Each episode's return."""


def evaluate(env: Environment, act: Callable[[np.ndarray], np.ndarray], episodes: int) -> Evaluation:
    """Run `act` (observation (do,) -> action (da,)) for some episodes.

    Success counts when it is reported at any step, since a robot may pass through the goal.

    Raises:
        NonFiniteError: an episode's return is NaN or infinite.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    returns, successes = [], 0
    for _ in range(episodes):
        observation = env.reset()
        true_return, success, done = 0.0, False, False
        while not done:
            step = env.step(act(observation))
            observation = step.observation
            true_return += step.reward
            success |= step.success
            done = step.terminated or step.truncated
        if not np.isfinite(true_return):
            raise NonFiniteError(f"The environment {env.name} gave an episode the return {true_return}")
        returns.append(true_return)
        successes += success
    return Evaluation(
        true_return=statistics.fmean(returns),
        true_return_std=statistics.pstdev(returns),
        success_rate=successes / episodes if env.reports_success else None,
        returns=tuple(returns),
    )
