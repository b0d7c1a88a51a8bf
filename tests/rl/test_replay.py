"""Replay buffer: the ring, the gather, relabelling, and an identical continuation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from parl_core.errors import NonFiniteError
from parl_core.rl.replay import FIRST_ROWS, ReplayBuffer
from tests.host_reads import no_host_reads


def filled(capacity: int, count: int, device: torch.device | str = "cpu") -> ReplayBuffer:
    """Transition i: (i, −i), action 10 i, reward i, then (i+1, −i−1), terminal if 3 divides i."""
    return fill(ReplayBuffer(capacity, obs_dim=2, act_dim=1, device=device), count)


def fill(replay: ReplayBuffer, count: int) -> ReplayBuffer:
    for i in range(count):
        replay.add(np.array([i, -i]), np.array([10 * i]), float(i), np.array([i + 1, -i - 1]), i % 3 == 0)
    return replay


@pytest.mark.parametrize(("count", "kept"), [(3, {0, 1, 2}), (5, {0, 1, 2, 3, 4}), (13, {8, 9, 10, 11, 12})])
def test_the_last_transitions_are_kept_and_sampled_whole(count, kept):
    replay = filled(5, count)
    batch = replay.sample(400, torch.Generator().manual_seed(0))
    i = batch.rewards
    assert set(i.tolist()) == kept
    assert torch.equal(batch.observations, torch.stack((i, -i), 1))
    assert torch.equal(batch.actions, 10 * i.unsqueeze(1))
    assert torch.equal(batch.next_observations, torch.stack((i + 1, -i - 1), 1))
    assert torch.equal(batch.terminated, (i % 3 == 0).float())
    assert torch.equal(replay.observations[batch.indices], batch.observations)


def test_growing_keeps_what_is_there():
    count = 3 * FIRST_ROWS + 7
    replay = filled(10**9, count)
    assert len(replay) == count
    assert torch.equal(replay.rewards, torch.arange(float(count)))


@pytest.mark.parametrize("count", [4, 7, 19])
def test_relabel_reaches_every_transition_also_after_the_ring_wraps(count):
    replay = filled(7, count)
    chunks = []

    def reward(observations, actions):
        chunks.append(len(actions))
        return observations[:, 1] + 2 * actions[:, 0]

    replay.relabel(reward, chunk=3)
    assert max(chunks) <= 3
    assert torch.equal(replay.rewards, 19 * replay.observations[:, 0])
    replay.add(np.array([50, -50]), np.array([500]), 0.25, np.array([51, -51]), False)
    assert 0.25 in replay.rewards.tolist()


@pytest.mark.parametrize(
    ("count", "reached"),
    [(4, [0, 1, 2, 3]), (7, []), (10, [0, 1, 2]), (14, [])],
)
def test_relabel_as_in_bpref_stops_at_the_place_written_next(count, reached):
    """Also by three transitions at a time; a full round is as if nothing were stored."""
    replay = filled(7, count)
    kept = replay.rewards.clone()
    replay.relabel(lambda observations, actions: observations[:, 0] - 100, chunk=2, bpref_compat=True)
    assert (replay.rewards < 0).nonzero().flatten().tolist() == reached
    assert torch.equal(replay.rewards[len(reached) :], kept[len(reached) :])


@pytest.mark.parametrize("sizes", [[1, 3, 2], [5, 5, 5], [4, 4, 4, 1], [2] * 11, [FIRST_ROWS - 3, 5, 4 * FIRST_ROWS]])
@pytest.mark.parametrize("capacity", [5, 10**6])
def test_some_at_a_time_is_as_one_at_a_time(capacity, sizes):
    sizes = sizes if capacity > 5 or max(sizes) <= 5 else [5, 3, 4]
    batched, start, row = ReplayBuffer(capacity, 2, 1), 0, 0
    for size in sizes:
        i = np.arange(start, start + size)
        states = np.stack((i, -i), 1)
        rows = batched.add_batch(states, 10 * i[:, None], i.astype(float), np.add(states, [1, -1]), i % 3 == 0)
        assert list(rows) == [(row + j) % capacity for j in range(size)]
        start, row = start + size, row + size
    single = filled(capacity, start)
    assert torch.equal(batched._rows[: len(batched)], single._rows[: len(single)])
    assert batched.state_dict()["position"] == single.state_dict()["position"]
    with pytest.raises(ValueError, match=f"at most {capacity} entries"):
        n = capacity + 1
        batched.add_batch(*(np.broadcast_to(0.0, s) for s in ((n, 2), (n, 1), n, (n, 2), n)))


def test_a_non_finite_reward_leaves_the_buffer_as_it_was():
    replay = filled(5, 5)

    def reward(observations, actions):
        return torch.where(observations[:, 0] == 4, torch.nan, -1.0)

    with pytest.raises(NonFiniteError, match="1 of 5"):
        replay.relabel(reward, chunk=2)
    assert replay.rewards.tolist() == [0, 1, 2, 3, 4]


def test_a_bad_transition_is_refused():
    replay = filled(5, 2)
    with pytest.raises(NonFiniteError, match="reward nan"):
        replay.add(np.zeros(2), np.zeros(1), float("nan"), np.zeros(2), False)
    with pytest.raises(ValueError, match=r"\(n, 2\), \(n, 1\), .* got \(\(1, 3\), \(1, 1\)"):
        replay.add(np.zeros(3), np.zeros(1), 0.0, np.zeros(2), False)
    good = (np.zeros((2, 2)), np.zeros((2, 1)), np.zeros(2), np.zeros((2, 2)), np.zeros(2))
    for i, part in enumerate(good):
        with pytest.raises(ValueError, match="must be of shapes"):
            replay.add_batch(*good[:i], part[:1], *good[i + 1 :])
        bad = part + 0
        bad.flat[-1] = np.inf
        with pytest.raises(NonFiniteError):
            replay.add_batch(*good[:i], bad, *good[i + 1 :])
    assert len(replay) == 2
    with pytest.raises(ValueError, match="empty"):
        filled(5, 0).sample(1, torch.Generator())


def test_rows_past_numpy_are_the_same():
    """As they are written on a GPU."""
    replay = filled(5, 0)
    replay._rows_numpy = None
    assert torch.equal(fill(replay, 13)._rows, filled(5, 13)._rows)


def test_on_a_device_everything_is_on_it(device):
    replay, generator = filled(5, 13, device), torch.Generator(device).manual_seed(0)
    with no_host_reads():
        batch = replay.sample(400, generator)
    assert {part.device.type for part in batch} == {device.type}
    assert set(batch.rewards.tolist()) == {8, 9, 10, 11, 12}
    assert torch.equal(batch.actions, 10 * batch.rewards.unsqueeze(1))
    replay.relabel(lambda observations, actions: observations[:, 1] + 2 * actions[:, 0], chunk=3)
    assert torch.equal(replay.rewards, 19 * replay.observations[:, 0])
    other = filled(5, 0)
    other.load_state_dict(replay.state_dict())
    assert torch.equal(other.rewards, replay.rewards.cpu())
    replay.load_state_dict(other.state_dict())
    assert replay.rewards.device.type == device.type
    replay.rewards.zero_()
    assert other.rewards.all()


@pytest.mark.parametrize("count", [0, 4, 7, 19])
def test_a_loaded_buffer_continues_bit_for_bit(count):
    replay, other = filled(7, count), filled(7, 2)
    state = copy.deepcopy(replay.state_dict())
    assert len(state["transitions"]) == min(count, 7)
    other.load_state_dict(state)
    for buffer in (replay, other):
        buffer.add(np.ones(2), np.ones(1), 0.5, np.ones(2), True)
    first, second = (b.sample(64, torch.Generator().manual_seed(1)) for b in (replay, other))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(ValueError, match="at most 3 rows"):
        ReplayBuffer(3, 2, 1).load_state_dict(filled(7, 5).state_dict())
