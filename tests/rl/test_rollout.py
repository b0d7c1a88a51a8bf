"""Episodes as segments, and evaluation."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch

from parl_core.envs.interface import Environment, Step
from parl_core.errors import NonFiniteError
from parl_core.rl.rollout import FIRST_ROWS, EpisodeStore, evaluate


def filled(lengths: list[int], running: int, max_episodes: int = 100) -> EpisodeStore:
    """Step t of episode e: observation (e, t), action (100 e + t), true reward t/2."""
    store = EpisodeStore(max_episodes, obs_dim=2, act_dim=1)
    for episode, length in enumerate([*lengths, running]):
        for t in range(length):
            store.add(np.array([episode, t]), np.array([100 * episode + t]), t / 2)
        if episode < len(lengths):
            store.end_episode()
    return store


def test_windows_are_uniform_over_episodes_and_starts():
    # The first two are dropped, the one of 3 steps is too short, the running one takes no part.
    store = filled([9, 9, 4, 3, 6], running=9, max_episodes=3)
    assert (store.num_episodes, store.num_steps) == (3, 22)
    segments = store.sample(6000, 4, torch.Generator().manual_seed(0))
    assert segments.observations.shape == (6000, 4, 2)
    assert segments.actions.shape == (6000, 4, 1)
    assert segments.true_rewards.shape == (6000, 4)
    episode, time = segments.observations.unbind(-1)
    assert (time.diff(dim=1) == 1).all()
    assert torch.equal(segments.actions.squeeze(-1), 100 * episode + time)
    assert torch.equal(segments.true_rewards, time / 2)
    counts = Counter(zip(episode[:, 0].tolist(), time[:, 0].tolist(), strict=True))
    expected = {(2.0, 0.0): 3000, (4.0, 0.0): 1000, (4.0, 1.0): 1000, (4.0, 2.0): 1000}
    assert counts.keys() == expected.keys()
    # Five standard deviations of a binomial count.
    assert all(abs(counts[key] - mean) < 5 * mean**0.5 for key, mean in expected.items())


def test_no_window_is_said_so():
    with pytest.raises(ValueError, match="no finished episode of at least 5 steps"):
        filled([4], running=9).sample(1, 5, torch.Generator())
    with pytest.raises(ValueError, match="no window of 5 steps"):
        filled([4], running=4).recent_trajectories(100, 5)


def test_recent_trajectories_are_cut_backwards_from_the_latest_step():
    store = filled([9, 7], running=5)
    recent = store.recent_trajectories(num_steps=14, length=3, dtype=torch.float64)
    assert recent.offsets.tolist() == [0, 3, 6, 9, 12]
    starts = recent.observations[recent.offsets[:-1]].tolist()
    assert starts == [[0, 6], [1, 1], [1, 4], [2, 2]]
    assert recent.actions.dtype == torch.float64
    assert torch.equal(recent.actions[:, 0], 100 * recent.observations[:, 0] + recent.observations[:, 1])
    assert store.recent_trajectories(3, 3).observations.tolist() == [[2, 2], [2, 3], [2, 4]]
    assert store.recent_trajectories(10**6, 3).num_trajectories == 3 + 2 + 1


@pytest.mark.parametrize(("steps", "episodes"), [(1, 1), (5, 1), (6, 2), (12, 2), (13, 3), (21, 3), (22, 3)])
def test_the_latest_episodes_that_hold_so_many_steps(steps, episodes):
    store = filled([9, 7, 3, 5], running=9)  # the one of 3 is too short to count, and so are its steps
    assert store.count_latest(steps, 4) == episodes
    assert store.count_latest(steps, 8) == 1
    assert store.count_latest(steps, 10) == 0


def test_windows_skip_the_very_episodes_that_the_latest_segments_come_from():
    """Also if some of the latest are too short for either."""
    store = filled([9, 7, 2, 6, 3, 1], running=9)
    for latest, left in ((1, {0.0, 1.0}), (2, {0.0})):
        drawn = store.sample(200, 4, torch.Generator().manual_seed(0), latest).observations[..., 0]
        windows = store.recent_trajectories(10**6, 4, skip_episodes=latest).observations[:, 0]
        assert set(windows.tolist()) == left
        assert set(drawn.flatten().tolist()) == {0.0, 1.0, 3.0} - left


@pytest.mark.parametrize("running", [0, 4, FIRST_ROWS + 5])
def test_a_loaded_store_continues_bit_for_bit(running):
    store, other = filled([9, 7], running, max_episodes=2), filled([3], 2, max_episodes=2)
    other.load_state_dict(copy.deepcopy(store.state_dict()))
    for each in (store, other):
        each.add(np.array([7, 8]), np.array([9]), 1.5)
        each.end_episode()
        each.add(np.array([1, 2]), np.array([3]), 2.5)
        assert (each.num_episodes, each.num_steps) == (2, 7 + running + 2)
    for a, b in zip(store.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    first, second = (each.sample(20, 1, torch.Generator().manual_seed(0)) for each in (store, other))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_environments_run_side_by_side():
    """As many stores of one environment each, whose episodes end when they end."""
    store = EpisodeStore(100, 2, 1, num_envs=3)
    lengths, expected = [FIRST_ROWS + 4, 7, 5], EpisodeStore(100, 2, 1)
    alone = [EpisodeStore(100, 2, 1) for _ in lengths]
    for t in range(FIRST_ROWS + 9):
        observations = np.stack([np.array([env, t]) for env in range(3)])
        actions, rewards = 100.0 * observations[:, :1], np.array([0.5, 1.5, 2.5]) * t
        store.add_batch(observations, actions, rewards)
        for env, length in enumerate(lengths):
            alone[env].add(observations[env], actions[env], rewards[env])
            if (t + 1) % length == 0:
                store.end_episode(env)
                alone[env].end_episode()
                expected._finished.append(alone[env]._finished[-1])
    assert all(torch.equal(a, b) for a, b in zip(store._finished, expected._finished, strict=True))
    running = [t for s in alone for t in s._running_episodes()]
    assert all(torch.equal(a, b) for a, b in zip(store._running_episodes(), running, strict=True))
    assert [len(steps) for steps in running] == [(FIRST_ROWS + 9) % length for length in lengths]
    assert store.num_steps == expected.num_steps + sum(map(len, running))
    other = EpisodeStore(100, 2, 1, num_envs=3)
    other.load_state_dict(copy.deepcopy(store.state_dict()))
    for each in (store, other):
        each.add_batch(np.ones((3, 2)), np.ones((3, 1)), np.ones(3))
        each.end_episode(1)
    for a, b in zip(store.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_running_episodes_give_windows_in_turns():
    store = EpisodeStore(100, 2, 1, num_envs=3)
    for t in range(4):
        store.add(np.array([7, t]), np.zeros(1), 0.0, env=1)
    store.end_episode(1)
    for env, length in enumerate([6, 1, 5]):
        for t in range(length):
            store.add(np.array([env, t]), np.zeros(1), 0.0, env=env)
    starts = store.recent_trajectories(100, 2).observations[::2].tolist()
    # Latest last: the ends of 0 and 2, the windows before those, what is left of 0, then the finished one.
    assert starts == [[7, 0], [7, 2], [0, 0], [2, 1], [0, 2], [2, 3], [0, 4]]
    assert store.recent_trajectories(5, 2).observations[::2].tolist() == [[2, 3], [0, 4]]
    assert store.recent_trajectories(100, 2, skip_episodes=0).num_trajectories == 7
    with pytest.raises(ValueError, match="no window"):
        store.recent_trajectories(100, 2, skip_episodes=1)


def test_what_a_store_cannot_be():
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        EpisodeStore(5, 2, 1, num_envs=0)
    with pytest.raises(ValueError, match="3 running episodes, got 2"):
        EpisodeStore(5, 2, 1, num_envs=3).load_state_dict(filled([4], 2).state_dict())


class Scripted(Environment):
    """Each episode gives the rewards of one list; success is reported at its second step only."""

    def __init__(self, episodes: list[list[float]], reports_success: bool = True) -> None:
        super().__init__("scripted", obs_dim=1, act_dim=1, horizon=10, reports_success=reports_success)
        self.episodes = iter(episodes)
        self.rewards: list[float] = []
        self.time = 0

    def reset(self) -> np.ndarray:
        self.rewards, self.time = next(self.episodes), 0
        return np.zeros(1, np.float32)

    def step(self, action) -> Step:
        self.time += 1
        done = self.time == len(self.rewards)
        observation = np.full(1, self.time, np.float32)
        return Step(observation, self.rewards[self.time - 1], False, done, self.time == 2)

    def _reset(self):
        raise NotImplementedError

    def _step(self, action):
        raise NotImplementedError

    def _state(self):
        return {}

    def _set_state(self, state):
        raise NotImplementedError


def test_evaluation_by_hand():
    seen = []

    def act(observation):
        seen.append(observation.item())
        return np.zeros(1, np.float32)

    result = evaluate(Scripted([[1, 2, 3], [10], [0, 5]]), act, episodes=3)
    assert seen == [0, 1, 2, 0, 0, 1]
    assert result.returns == (6, 10, 5)
    assert result.true_return == pytest.approx(7)
    assert result.true_return_std == pytest.approx(((1 + 9 + 4) / 3) ** 0.5)
    assert result.success_rate == pytest.approx(2 / 3)
    assert evaluate(Scripted([[1, 2]], reports_success=False), act, 1).success_rate is None


def test_a_non_finite_return_is_refused():
    with pytest.raises(NonFiniteError, match="scripted gave an episode the return nan"):
        evaluate(Scripted([[1, float("nan")]]), lambda _: np.zeros(1), 1)
