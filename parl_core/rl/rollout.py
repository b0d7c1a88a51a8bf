"""What the agent has lived through lately, as segments to be judged; and evaluation on the true reward."""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping
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


class SegmentPositions(NamedTuple):
    """Where n segments lie."""

    episodes: Tensor
    """(n,) int64, which episode: finished ones are numbered from 0 in the order of their end, dropped ones included."""
    starts: Tensor
    """(n,) int64, the segment's first step in it."""


class EpisodeStore:
    """The last `max_episodes` finished episodes and the running ones, one for each environment.

    Args:
        max_episodes: how many finished episodes are kept.
        obs_dim, act_dim: sizes of an observation and an action.
        num_envs: n, how many episodes run at a time.
    """

    def __init__(self, max_episodes: int, obs_dim: int, act_dim: int, num_envs: int = 1) -> None:
        if max_episodes < 1:
            raise ValueError(f"max_episodes must be at least 1, got {max_episodes}")
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self.obs_dim, self.act_dim, self.num_envs = obs_dim, act_dim, num_envs
        self._widths = (obs_dim, act_dim, 1)
        self._finished: deque[Tensor] = deque(maxlen=max_episodes)
        self._num_ended = 0
        self._lengths = [0] * num_envs
        self._set_running([torch.empty(0, sum(self._widths))] * num_envs)

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
        """Steps that are kept, those of the running episodes included."""
        return sum(map(len, self._finished)) + sum(self._lengths)

    def add(self, observation: np.ndarray, action: np.ndarray, true_reward: float, env: int = 0) -> None:
        """Append one step to that environment's running episode: (do,), (da,), scalar."""
        length = self._lengths[env]
        if length == self._running.shape[1]:
            self._set_running(self._running_episodes())
        row = self._running_numpy[env, length]
        row[: self.obs_dim] = observation
        row[self.obs_dim : -1] = action
        row[-1] = true_reward
        self._lengths[env] = length + 1

    def add_batch(self, observations: np.ndarray, actions: np.ndarray, true_rewards: np.ndarray) -> None:
        """Append one step to each running episode: (n, do), (n, da), (n,)."""
        for env, (observation, action, reward) in enumerate(zip(observations, actions, true_rewards, strict=True)):
            self.add(observation, action, reward, env)

    def end_episode(self, env: int = 0) -> None:
        """That environment's episode is finished; the oldest one is dropped if there are too many."""
        self._finished.append(self._running[env, : self._lengths[env]].clone())
        self._lengths[env] = 0
        self._num_ended += 1

    def episode(self, number: int) -> Tensor:
        """(T, do + da + 1): observations, actions and true rewards of the episode that ended as the `number`-th, from 0."""
        place = number - self._first_kept
        if not 0 <= place < len(self._finished):
            raise ValueError(
                f"number must lie in [{self._first_kept}, {self._num_ended}), the episodes that are kept, got {number}"
            )
        return self._finished[place]

    def sample(self, num: int, length: int, generator: torch.Generator, latest: int | None = None) -> Segments:
        """Draw `num` segments of `length` steps: an episode uniformly, then a start in it uniformly.

        Finished episodes of at least `length` steps take part; of them only the last `latest`, if given.
        """
        numbers, starts = self.sample_positions(num, length, generator, latest)
        rows = torch.stack(
            [
                self.episode(number)[start : start + length]
                for number, start in zip(numbers.tolist(), starts.tolist(), strict=True)
            ]
        )
        observations, actions, true_rewards = rows.split(self._widths, dim=-1)
        return Segments(observations, actions, true_rewards.squeeze(-1))

    def sample_positions(
        self, num: int, length: int, generator: torch.Generator, latest: int | None = None
    ) -> SegmentPositions:
        """Where the segments lie that `sample` would draw."""
        numbers = [self._first_kept + i for i, episode in enumerate(self._finished) if len(episode) >= length]
        numbers = numbers if latest is None else numbers[-latest:]
        if not numbers:
            raise ValueError(
                f"There is no finished episode of at least {length} steps to draw segments from "
                f"(finished episodes: {len(self._finished)})"
            )
        which = torch.randint(len(numbers), (num,), generator=generator)
        where = torch.rand(num, generator=generator, dtype=torch.float64)
        room = torch.tensor([len(self.episode(number)) - length + 1 for number in numbers])
        return SegmentPositions(torch.tensor(numbers)[which], (where * room[which]).long())

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

        Each episode, the running ones included, is cut from its end backwards; what is left over at its beginning is
        skipped. Running episodes give a window in turns. Fewer windows come back when the store holds no more; oldest
        first. With `skip_episodes`, the running episodes and that many of the latest finished ones that hold a window are
        left out: those that `sample` draws from with the same number as `latest`.
        """
        finished = self._long_enough(length)[::-1]
        running = [] if skip_episodes else [_windows(episode, length) for episode in self._running_episodes()]
        in_turns = (window for turn in itertools.zip_longest(*running) for window in turn if window is not None)
        older = itertools.chain.from_iterable(_windows(episode, length) for episode in finished[skip_episodes:])
        windows = list(itertools.islice(itertools.chain(in_turns, older), num_steps // length))
        if not windows:
            raise ValueError(
                f"There is no window of {length} steps among the {self.num_steps} steps kept and the "
                f"{num_steps} asked for"
            )
        observations, actions, _ = torch.cat(windows[::-1]).to(dtype).split(self._widths, dim=-1)
        offsets = torch.arange(0, len(windows) * length + 1, length)
        return Trajectories(observations, actions, offsets)

    def state_dict(self) -> dict[str, Any]:
        """All steps, and the lengths of the episodes, those of the running ones last."""
        episodes = (*self._finished, *self._running_episodes())
        lengths = torch.tensor([len(episode) for episode in episodes])
        return {"steps": torch.cat(episodes), "lengths": lengths, "num_ended": torch.tensor(self._num_ended)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, from a store of the same sizes."""
        steps, lengths = state["steps"], state["lengths"].tolist()
        if steps.shape[1] != sum(self._widths):
            raise ValueError(f"steps must have {sum(self._widths)} columns, got shape {tuple(steps.shape)}")
        if len(lengths) < self.num_envs:
            raise ValueError(f"lengths must hold those of {self.num_envs} running episodes, got {len(lengths)} in all")
        episodes = [episode.clone() for episode in steps.split(lengths)]
        self._finished = deque(episodes[: -self.num_envs], maxlen=self._finished.maxlen)
        self._lengths = lengths[-self.num_envs :]
        self._set_running(episodes[-self.num_envs :])
        self._num_ended = int(state["num_ended"])

    @property
    def _first_kept(self) -> int:
        """The number of the oldest episode that is kept."""
        return self._num_ended - len(self._finished)

    def _long_enough(self, length: int) -> list[Tensor]:
        """Finished episodes of at least `length` steps, oldest first."""
        return [episode for episode in self._finished if len(episode) >= length]

    def _running_episodes(self) -> list[Tensor]:
        """Of each environment, views."""
        return [episode[:length] for episode, length in zip(self._running, self._lengths, strict=True)]

    def _set_running(self, episodes: list[Tensor]) -> None:
        """Take over these, with room for as many steps again."""
        room = max(FIRST_ROWS, 2 * max(map(len, episodes)))
        running = torch.empty(self.num_envs, room, sum(self._widths))
        for i, episode in enumerate(episodes):
            running[i, : len(episode)] = episode
        self._running, self._running_numpy = running, running.numpy()


def _windows(episode: Tensor, length: int) -> Iterator[Tensor]:
    """Stretches of `length` steps that do not overlap, the last one first."""
    for end in range(len(episode), length - 1, -length):
        yield episode[end - length : end]


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
