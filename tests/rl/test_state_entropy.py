"""Neighbour distances against scipy's k-d tree, running moments against numpy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from parl_core.rl.state_entropy import RunningMoments, StateEntropyReward, neighbour_distances


def cloud(count: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Clusters far from the origin: where distances by ‖a‖² − 2ab + ‖b‖² lose their digits.
    centres = 10 * torch.randn(4, 6, generator=generator)
    which = torch.randint(4, (count,), generator=generator)
    return centres[which] + scale * torch.randn(count, 6, generator=generator)


@pytest.mark.parametrize("chunk", [7, 100, 10**6])
@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_against_a_k_d_tree(chunk, scale):
    references = cloud(300, scale)
    references[50] = references[60]  # a visited state visited again is a neighbour at distance 0
    indices = torch.arange(40, 80)
    distances = neighbour_distances(references[indices], references, indices, k=5, chunk=chunk)
    exact = cKDTree(references.double().numpy()).query(references[indices].double().numpy(), k=6)[0][:, 5]
    np.testing.assert_allclose(distances.numpy(), exact, rtol=1e-5)


def test_an_observation_that_is_no_reference_has_nothing_to_exclude():
    references, observations = cloud(200), cloud(30, seed=1)
    distances = neighbour_distances(observations, references, torch.full((30,), -1), k=5, chunk=64)
    exact = cKDTree(references.double().numpy()).query(observations.double().numpy(), k=5)[0][:, 4]
    np.testing.assert_allclose(distances.numpy(), exact, rtol=1e-5)


def test_few_references_give_the_farthest():
    references = torch.tensor([[0.0], [1.0], [5.0]])
    assert neighbour_distances(references, references, torch.arange(3), k=5).tolist() == [5, 4, 5]
    with pytest.raises(ValueError, match="at least one row besides"):
        neighbour_distances(references[:1], references[:1], torch.zeros(1, dtype=torch.int64), k=5)


def test_the_reward_is_the_distance_over_the_running_deviation():
    states = cloud(100)
    reward = StateEntropyReward(torch.Generator())
    seen = []
    for start in (0, 30):
        indices = torch.arange(start, start + 25)
        distances = neighbour_distances(states[indices], states, indices, k=5)
        seen.append(distances)
        expected = distances / torch.cat(seen).double().std(correction=0).float()
        torch.testing.assert_close(reward(states[indices], indices, states), expected)


def test_identical_states_give_zero_and_no_nan():
    states = torch.ones(20, 3)
    indices = torch.arange(4)
    assert StateEntropyReward(torch.Generator())(states[:4], indices, states).tolist() == [0, 0, 0, 0]


def test_a_subset_of_references_excludes_the_state_itself_too():
    states, indices = cloud(100), torch.arange(100)
    reward = StateEntropyReward(torch.Generator().manual_seed(3), k=2, max_references=60)
    chosen = torch.randperm(100, generator=torch.Generator().manual_seed(3))[:60]
    rewards = reward(states, indices, states) * reward.moments.std
    for i in range(100):
        others = states[chosen[chosen != i]]
        torch.testing.assert_close(rewards[i], (others - states[i]).norm(dim=1).sort().values[1])
    with pytest.raises(ValueError, match="max_references must be greater than k = 5, got 5"):
        StateEntropyReward(torch.Generator(), max_references=5)


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


def test_a_loaded_reward_continues_bit_for_bit():
    states, indices = cloud(100), torch.arange(20)
    one, two = (StateEntropyReward(torch.Generator().manual_seed(s), max_references=50) for s in (0, 1))
    one(states[:20], indices, states)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(one(states[:20], indices, states), two(states[:20], indices, states))
