"""Query samplers against brute force: which pairs, by what, compared with what."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parl_core.models.rewards import RewardEnsemble
from parl_core.preference import samplers
from parl_core.preference.samplers import SAMPLERS, Queries, entropy, k_center, preference_probs, uniform
from parl_core.rl.rollout import EpisodeStore, Segments

NUM, LENGTH = 3, 6
POOL = 10 * NUM


def make_store(episodes: int = 6, length: int = 20) -> EpisodeStore:
    rng = np.random.default_rng(0)
    store = EpisodeStore(100, obs_dim=3, act_dim=2)
    for _ in range(episodes):
        for _ in range(length):
            store.add(rng.normal(size=3), rng.uniform(-1, 1, 2), rng.normal())
        store.end_episode()
    return store


def make_ensemble(members: int = 3) -> RewardEnsemble:
    torch.manual_seed(0)
    return RewardEnsemble(3, 2, hidden=(16,), members=members)


def draw(name: str, num: int = NUM, ensemble: RewardEnsemble | None = None, **options) -> Queries:
    generator = torch.Generator().manual_seed(3)
    return SAMPLERS[name](make_store(), num, LENGTH, generator, ensemble or make_ensemble(), **options)


def make_pool(num: int = POOL) -> Queries:
    return uniform(make_store(), num, LENGTH, torch.Generator().manual_seed(3))


def assert_same(mine: Queries, theirs: Queries) -> None:
    for one, other in zip((*mine.first, *mine.second), (*theirs.first, *theirs.second), strict=True):
        assert torch.equal(one, other)


def probs_by_hand(ensemble: RewardEnsemble, queries: Queries) -> np.ndarray:
    """(members, M), one step and one member at a time."""
    probs = np.empty((ensemble.num_members, len(queries)))
    for member, pair in np.ndindex(*probs.shape):
        sums = []
        for segments in (queries.first, queries.second):
            observations, actions = segments.observations[pair], segments.actions[pair]
            rewards = [
                ensemble.member_rewards(observations[t : t + 1], actions[t : t + 1])[member].item()
                for t in range(len(observations))
            ]
            sums.append(sum(rewards))
        probs[member, pair] = 1 / (1 + np.exp(sums[0] - sums[1]))
    return probs


def uncertainty_by_hand(name: str, probs: np.ndarray) -> np.ndarray:
    if name.endswith("disagreement"):
        return probs.std(axis=0)
    return -(probs * np.log(probs) + (1 - probs) * np.log(1 - probs)).mean(axis=0)


def vectors(queries: Queries) -> np.ndarray:
    """Observations of both segments of a pair, one after the other."""
    return np.stack(
        [
            np.concatenate([queries.first.observations[i].reshape(-1), queries.second.observations[i].reshape(-1)])
            for i in range(len(queries))
        ]
    )


def cover_by_hand(points: np.ndarray, centres: np.ndarray, num: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(num):
        known = [*centres, *points[chosen]]
        left = [i for i in range(len(points)) if i not in chosen]
        nearest = [min((np.linalg.norm(points[i] - centre) for centre in known), default=math.inf) for i in left]
        chosen.append(left[int(np.argmax(nearest))])
    return chosen


def test_uniform_pairs_are_what_the_store_draws():
    store = make_store()
    queries = uniform(store, 5, 4, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    first, second = store.sample(5, 4, generator), store.sample(5, 4, generator)
    assert_same(queries, Queries(first, second))
    assert not torch.equal(queries.first.observations, queries.second.observations)
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        uniform(store, 0, 4, generator)


def test_uniform_by_name_draws_no_more_than_it_needs():
    assert_same(draw("uniform", margin=2), make_pool(NUM))


def test_the_centre_is_what_lies_between_the_margins():
    rewards = torch.arange(10.0).reshape(2, 5)
    segments = Segments(rewards.unsqueeze(-1), -rewards.unsqueeze(-1), rewards)
    queries = Queries(segments, segments._replace(true_rewards=rewards + 100))
    centre = queries.centre(1)
    assert centre.first.true_rewards.tolist() == [[1, 2, 3], [6, 7, 8]]
    assert centre.second.true_rewards.tolist() == [[101, 102, 103], [106, 107, 108]]
    assert centre.first.observations[..., 0].tolist() == [[1, 2, 3], [6, 7, 8]]
    assert centre.second.actions[..., 0].tolist() == [[-1, -2, -3], [-6, -7, -8]]
    assert_same(queries.centre(0), queries)
    assert queries.centre(2).first.true_rewards.tolist() == [[2], [7]]
    for margin in (-1, 3):
        with pytest.raises(ValueError, match=f"leave a step of the segments' 5, got {margin}"):
            queries.centre(margin)


@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("name", ["disagreement", "entropy"])
def test_the_most_uncertain_of_ten_times_as_many_are_chosen(name, margin):
    ensemble, pool = make_ensemble(), make_pool()
    probs = probs_by_hand(ensemble, pool.centre(margin))
    np.testing.assert_allclose(preference_probs(ensemble, pool.centre(margin), chunk=7).numpy(), probs, rtol=1e-5)
    best = np.argsort(-uncertainty_by_hand(name, probs))[:NUM]
    chosen = draw(name, ensemble=ensemble, margin=margin)
    assert chosen.first.true_rewards.shape == (NUM, LENGTH)
    assert_same(chosen, pool.select(torch.from_numpy(best)))


def test_disagreement_and_entropy_are_different_things():
    """On pair 0 the members agree that it is open, on pair 1 they are sure of opposite answers."""
    ensemble = make_ensemble(members=2)
    answers = torch.tensor([[0.0, 8.0], [0.0, -8.0]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "_preference_logits", lambda *_: answers)
        spread, open_ = samplers.disagreement(ensemble, make_pool(2)), entropy(ensemble, make_pool(2))
    p = 1 / (1 + math.exp(-8))
    torch.testing.assert_close(spread, torch.tensor([0.0, p - 0.5]))
    torch.testing.assert_close(open_, torch.tensor([math.log(2), -p * math.log(p) - (1 - p) * math.log(1 - p)]))


def test_the_entropy_tells_answers_apart_that_are_all_but_certain():
    logits = torch.tensor([[30.0, -40.0, 35.0, 0.0, -30.0]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "_preference_logits", lambda *_: logits)
        found = entropy(make_ensemble(1), make_pool(5)).double()
    expected = torch.tensor([math.exp(-abs(z)) * (abs(z) + 1) for z in (30, -40, 35)], dtype=torch.float64)
    torch.testing.assert_close(found[:3], expected, rtol=1e-5, atol=0)
    assert found[3] == pytest.approx(math.log(2)) and found[0] == found[4]


def test_an_ensemble_of_one_disputes_nothing_and_the_first_drawn_are_taken():
    assert_same(draw("disagreement", ensemble=make_ensemble(members=1)), make_pool().select(torch.arange(NUM)))


@pytest.mark.parametrize("labelled", [0, 4])
@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("name", ["k-center", "k-center-disagreement", "k-center-entropy"])
def test_pairs_that_cover_are_those_of_brute_force(name, margin, labelled):
    ensemble, pool = make_ensemble(), make_pool()
    known = uniform(make_store(), 4, LENGTH, torch.Generator().manual_seed(8)).select(torch.arange(labelled))
    segments = torch.stack(
        [torch.cat((side.observations, side.actions), dim=-1) for side in (known.first, known.second)], dim=1
    )
    order = np.arange(POOL)
    if name != "k-center":
        order = np.argsort(-uncertainty_by_hand(name, probs_by_hand(ensemble, pool.centre(margin))))[: POOL // 2]
    points = vectors(pool.centre(margin))[order]
    centres = vectors(known.centre(margin)) if labelled else points[:0]
    best = order[cover_by_hand(points, centres, NUM)]
    chosen = draw(name, ensemble=ensemble, margin=margin, labelled=segments if labelled else None)
    assert_same(chosen, pool.select(torch.from_numpy(best)))


def test_k_center_by_hand():
    """On a line, centre at 0: 10 is the farthest; then 5, which lies 5 from both; then −4; 1 before 6, both 1 away."""
    points = torch.tensor([1.0, -4.0, 5.0, 6.0, 10.0]).unsqueeze(1)
    assert k_center(points, torch.zeros(1, 1), 5).tolist() == [4, 2, 1, 0, 3]
    assert k_center(points, torch.empty(0, 1), 2).tolist() == [0, 4]


def test_the_same_point_is_not_chosen_twice():
    assert k_center(torch.ones(4, 2), torch.ones(1, 2), 4).tolist() == [0, 1, 2, 3]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_k_center_is_brute_force_and_within_twice_the_best(num_points, num_centres, dim, seed):
    rng = np.random.default_rng(seed)
    points, centres = rng.normal(size=(num_points, dim)), rng.normal(size=(num_centres, dim))
    num = int(rng.integers(1, num_points + 1))
    chosen = k_center(torch.from_numpy(points), torch.from_numpy(centres), num).tolist()
    assert chosen == cover_by_hand(points, centres, num)

    def radius(choice: tuple[int, ...]) -> float:
        known = np.concatenate((centres, points[list(choice)]))
        return np.linalg.norm(points[:, None] - known, axis=-1).min(1).max()

    best = min(radius(choice) for choice in itertools.combinations(range(num_points), num))
    assert radius(tuple(chosen)) <= 2 * best + 1e-7  # rounding of distances near 0


def test_more_labelled_pairs_than_go_at_once():
    """The one centre near the far point is in the second and last chunk."""
    centres = torch.zeros(samplers.CHUNK_PAIRS + 1, 2)
    centres[-1] = 9.0
    assert k_center(torch.tensor([[1.0, 1.0], [9.0, 9.0], [3.0, 3.0]]), centres, 1).tolist() == [2]


def test_distances_far_from_the_origin_are_those_of_float32_points():
    """Steps of float32 at 4096 are 2⁻¹¹: points 1, 3 and 2 steps from the centre in 100 dimensions."""
    steps = torch.tensor([1.0, 3.0, 2.0]).unsqueeze(1)
    points = 4096 + steps * 2.0**-11 * torch.ones(100)
    assert k_center(points, torch.full((1, 100), 4096.0), 1).tolist() == [1]
    assert k_center(points, torch.full((1, 100), 4096.0), 3).tolist() == [1, 0, 2]
