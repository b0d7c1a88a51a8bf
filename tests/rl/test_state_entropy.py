"""Neighbour distances against a brute-force search in double precision, running moments against numpy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from parl_core.ops import available_backends, backend
from parl_core.rl.replay import ReplayBuffer
from parl_core.rl.state_entropy import BLOCK, FIRST_BLOCKS, RunningMoments, StateEntropyReward

BACKENDS = [name for name in ("reference", "cpp") if name in available_backends()]


def cloud(count: int, scale: float = 1.0, seed: int = 0, dim: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    # Clusters far from the origin: where distances by ‖a‖² − 2ab + ‖b‖² lose their digits.
    centres = 10 * rng.normal(size=(4, dim))
    states = centres[rng.integers(4, size=count)] + scale * rng.normal(size=(count, dim))
    if count > 30:
        states[20] = states[30]  # a visited state visited again is a neighbour at distance 0
    return states.astype(np.float32)


def exact(states: np.ndarray, k: int = 5) -> np.ndarray:
    """Of each state, the distance to its k-th nearest other."""
    distances = cdist(states.astype(np.float64), states.astype(np.float64))
    np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, min(k, len(states) - 1) - 1]


def distances_of(reward: StateEntropyReward) -> np.ndarray:
    """What it would hand out for all states, before the division."""
    rewards = copy.deepcopy(reward)
    found = rewards(torch.arange(len(reward))).double().numpy()
    return found * max(rewards.moments.std, np.finfo(np.float32).eps)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("scale", "dim"), [(1.0, 1), (0.02, 6), (1.0, 39)])
def test_every_state_knows_its_neighbours_at_every_moment(isa, name, scale, dim):
    states = cloud(70, scale, dim=dim)
    reward = StateEntropyReward(dim)
    with backend(name):
        for row, state in enumerate(states):
            reward.add(state, row)
            if row > 0:
                np.testing.assert_allclose(distances_of(reward), exact(states[: row + 1]), rtol=1e-5, atol=1e-30)
    assert len(reward) == 70


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(capacity=st.integers(2, 40), count=st.integers(2, 90), k=st.integers(1, 7), distinct=st.integers(1, 60))
def test_rows_that_are_overwritten_leave_no_trace(name, capacity, count, k, distinct):
    """States that come again and again, so that many lists hold ties."""
    rng = np.random.default_rng(count)
    states = cloud(distinct, seed=distinct, dim=2)[rng.integers(distinct, size=count)]
    reward, ring = StateEntropyReward(2, k=k), np.empty((0, 2), np.float32)
    with backend(name):
        for i, state in enumerate(states):
            row = i % capacity
            ring = np.concatenate((ring[:row], state[None], ring[row + 1 :]))
            reward.add(state, row)
    if len(ring) > 1:
        np.testing.assert_allclose(distances_of(reward), exact(ring, k), rtol=1e-5, atol=1e-30)


def test_growing_keeps_what_is_there(isa):
    states = cloud(FIRST_BLOCKS * BLOCK + 50)
    reward = StateEntropyReward(6)
    reward.add_batch(states, range(len(states)))
    np.testing.assert_allclose(distances_of(reward), exact(states), rtol=1e-5, atol=1e-30)


def test_the_rows_are_those_of_the_replay():
    replay, reward = ReplayBuffer(20, obs_dim=3, act_dim=1), StateEntropyReward(3, k=2)
    for seed in range(7):
        states = cloud(4, seed=seed, dim=3)
        rows = replay.add_batch(states, np.zeros((4, 1)), np.zeros(4), states, np.zeros(4, bool))
        reward.add_batch(states, rows)
    np.testing.assert_allclose(distances_of(reward), exact(replay.observations.numpy(), 2), rtol=1e-5)


def test_few_states_give_the_farthest():
    reward = StateEntropyReward(1)
    with pytest.raises(ValueError, match="two states or more, got 0"):
        reward(torch.tensor([0]))
    reward.add_batch(np.array([[0.0], [1.0], [5.0]]), range(3))
    np.testing.assert_allclose(distances_of(reward), [5, 4, 5])


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        StateEntropyReward(1, k=0)
    reward = StateEntropyReward(2)
    with pytest.raises(ValueError, match="0 to 0, got 1"):
        reward.add(np.zeros(2), 1)
    with pytest.raises(ValueError, match=r"observation must be of shape \(2,\), got \(3,\)"):
        reward.add(np.zeros(3), 0)
    reward.add_batch(np.zeros((2, 2)), range(2))
    with pytest.raises(IndexError):
        reward(torch.tensor([2]))
    with pytest.raises(ValueError, match=r"\(R, 3\) and \(5, R\), got \(2, 2\) and \(5, 2\)"):
        StateEntropyReward(3).load_state_dict(reward.state_dict())


def test_the_reward_is_the_distance_over_the_running_deviation():
    states = cloud(100)
    reward = StateEntropyReward(6)
    reward.add_batch(states, range(100))
    distances, seen = exact(states), []
    for start in (0, 30):
        indices = torch.arange(start, start + 25)
        seen.append(distances[indices])
        expected = distances[indices] / np.concatenate(seen).std()
        np.testing.assert_allclose(reward(indices), expected, rtol=1e-5)


def test_identical_states_give_zero_and_no_nan():
    reward = StateEntropyReward(3)
    reward.add_batch(np.ones((20, 3)), range(20))
    assert reward(torch.arange(4)).tolist() == [0, 0, 0, 0]


def test_running_moments_against_numpy():
    moments = RunningMoments()
    assert moments.std == 0
    rng = np.random.default_rng(0)
    parts = [rng.normal(1e3, 0.1, size) for size in (1, 7, 64, 1000)]
    for part in parts:
        moments.update(torch.from_numpy(part))
    values = np.concatenate(parts)
    assert moments.mean == pytest.approx(values.mean(), rel=1e-14)
    assert moments.std == pytest.approx(values.std(), rel=1e-8)


def test_the_moments_of_bpref_by_hand():
    """Batches (1, 3) and (2, 6, 7): unbiased variances 2 and 7. The mean is the latest batch's plus its share."""
    moments = RunningMoments(bpref_compat=True)
    assert (moments.mean, moments.std) == (0, 1)
    moments.update(torch.tensor([1.0, 3.0]))
    first = 2.0001
    assert moments.mean == pytest.approx(2 + 2 / first)
    variance = (1e-4 * 1 + 2 * 2 + 2**2 * 1e-4 * 2 / first) / first
    assert moments.std == pytest.approx(variance**0.5)
    moments.update(torch.tensor([2.0, 6.0, 7.0]))
    second = 5.0001
    assert moments.mean == pytest.approx(5 + 3 / second)
    shift = 5 - (2 + 2 / first)
    assert moments.std**2 == pytest.approx((first * variance + 3 * 7 + shift**2 * first * 3 / second) / second)
    assert StateEntropyReward(1, bpref_compat=True).moments.std == 1


@pytest.mark.parametrize("bpref_compat", [False, True])
def test_a_loaded_reward_continues_bit_for_bit(bpref_compat):
    states = cloud(130)
    one, two = (StateEntropyReward(6, bpref_compat=bpref_compat) for _ in range(2))
    one.add_batch(states[:100], range(100))
    one(torch.arange(20))
    two.add_batch(states[:3], range(3))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for reward in (one, two):
        reward.add_batch(states[100:120], range(100, 120))
        reward.add_batch(states[120:], range(10))
    indices = torch.arange(120)
    assert torch.equal(one(indices), two(indices))
    assert torch.equal(one.state_dict()["nearest"], two.state_dict()["nearest"])
    assert torch.equal(one.state_dict()["observations"], two.state_dict()["observations"])


def test_what_it_stored_is_its_own():
    reward = StateEntropyReward(1)
    reward.add_batch(np.array([[0.0], [1.0], [5.0]]), range(3))
    state = reward.state_dict()
    reward.add(np.array([0.5]), 0)
    assert state["observations"].tolist() == [[0], [1], [5]]
    assert state["nearest"][:2].tolist() == [[1, 1, 16], [25, 16, 25]]
