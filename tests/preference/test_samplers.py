"""Query samplers: independence of the two segments, and disagreement against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from parl_core.models.rewards import RewardEnsemble
from parl_core.preference.samplers import Queries, disagreement, preference_probs, uniform
from parl_core.rl.rollout import EpisodeStore


def make_store(episodes: int = 6, length: int = 20) -> EpisodeStore:
    rng = np.random.default_rng(0)
    store = EpisodeStore(100, obs_dim=3, act_dim=2)
    for _ in range(episodes):
        for _ in range(length):
            store.add(rng.normal(size=3), rng.uniform(-1, 1, 2), rng.normal())
        store.end_episode()
    return store


def make_ensemble() -> RewardEnsemble:
    torch.manual_seed(0)
    return RewardEnsemble(3, 2, hidden=(16,), members=3)


def brute_force_prob(ensemble: RewardEnsemble, queries: Queries, member: int, pair: int) -> float:
    sums = []
    for segments in (queries.first, queries.second):
        rewards = [
            ensemble.member_rewards(segments.observations[pair, t : t + 1], segments.actions[pair, t : t + 1])[member]
            for t in range(segments.observations.shape[1])
        ]
        sums.append(sum(r.item() for r in rewards))
    return 1 / (1 + np.exp(sums[0] - sums[1]))


def test_uniform_pairs_are_what_the_store_draws():
    store = make_store()
    queries = uniform(store, 5, 4, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    first, second = store.sample(5, 4, generator), store.sample(5, 4, generator)
    for mine, drawn in zip((*queries.first, *queries.second), (*first, *second), strict=True):
        assert torch.equal(mine, drawn)
    assert not torch.equal(queries.first.observations, queries.second.observations)
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        uniform(store, 0, 4, generator)


def test_the_most_disputed_are_chosen():
    store, ensemble = make_store(), make_ensemble()
    chosen = disagreement(store, 4, 5, torch.Generator().manual_seed(3), ensemble)
    pool = uniform(store, 40, 5, torch.Generator().manual_seed(3))
    probs = np.array([[brute_force_prob(ensemble, pool, m, i) for i in range(40)] for m in range(3)])
    np.testing.assert_allclose(preference_probs(ensemble, pool, chunk=7).numpy(), probs, rtol=1e-5)
    best = np.argsort(-probs.std(axis=0))[:4]
    for mine, drawn in zip((*chosen.first, *chosen.second), (*pool.first, *pool.second), strict=True):
        assert torch.equal(mine, drawn[torch.from_numpy(best)])


def test_an_ensemble_of_one_disputes_nothing_and_the_first_drawn_are_taken():
    store, ensemble = make_store(), RewardEnsemble(3, 2, hidden=(4,), members=1)
    chosen = disagreement(store, 2, 5, torch.Generator().manual_seed(3), ensemble, candidates=9)
    pool = uniform(store, 9, 5, torch.Generator().manual_seed(3))
    assert torch.equal(chosen.first.actions, pool.first.actions[:2])
    with pytest.raises(ValueError, match="candidates must be at least num = 2, got 1"):
        disagreement(store, 2, 5, torch.Generator(), ensemble, candidates=1)
