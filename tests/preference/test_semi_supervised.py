"""SURF: its loss on numbers worked out by hand, crops, pseudo-labels, the pool, identical continuation."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from parl_core.errors import ConfigError, NonFiniteError
from parl_core.models.rewards import RewardEnsemble
from parl_core.ops import backend
from parl_core.preference.reward_learning import PreferenceDataset
from parl_core.preference.samplers import uniform
from parl_core.preference.semi_supervised import (
    SurfConfig,
    SurfLearner,
    UnlabelledPool,
    draw_crops,
    num_steps,
    pseudo_label,
)
from parl_core.rl.rollout import EpisodeStore

WINDOW, CROP = 9, 2
CONFIG = SurfConfig(crop=CROP, threshold=0.6, pool_capacity=100)


def make_store(lengths=(20, 25, 30), max_episodes=10, seed=0, store=None) -> EpisodeStore:
    """Episodes of 3 + 1 random numbers a step; the true reward is the first."""
    generator = torch.Generator().manual_seed(seed)
    store = EpisodeStore(max_episodes, 3, 1) if store is None else store
    for length in lengths:
        for row in torch.randn(length, 4, generator=generator):
            store.add(row[:3].numpy(), row[3:].numpy(), float(row[0]))
        store.end_episode()
    return store


def make_dataset(store: EpisodeStore, num=12) -> PreferenceDataset:
    dataset = PreferenceDataset(50, WINDOW, 3, 1)
    queries = uniform(store, num, WINDOW, torch.Generator().manual_seed(3))
    judged = slice(CROP, -CROP)
    dataset.append(
        queries,
        (queries.second.true_rewards[:, judged].sum(1) > queries.first.true_rewards[:, judged].sum(1)).float(),
    )
    return dataset


def make_pool(store: EpisodeStore, num=40, capacity=100) -> UnlabelledPool:
    pool = UnlabelledPool(capacity, WINDOW, 3, 1)
    pool.add_uniform(store, num, torch.Generator().manual_seed(4))
    return pool


def make_learner(config=CONFIG, seed=0, batch_size=8, learning_rate=1e-2) -> SurfLearner:
    torch.manual_seed(seed)
    ensemble = RewardEnsemble(3, 1, hidden=(8, 8), members=3)
    generator = torch.Generator().manual_seed(seed)
    return SurfLearner(ensemble, config, learning_rate=learning_rate, batch_size=batch_size, generator=generator)


def flat(ensemble: RewardEnsemble) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in ensemble.parameters()])


def constant_steps(*rows: float) -> tuple[PreferenceDataset, UnlabelledPool]:
    """One labelled and len(rows) − 1 unlabelled pairs: the first window all zeros, the second all `row`."""
    dataset, pool = PreferenceDataset(1, WINDOW, 1, 0), UnlabelledPool(10, WINDOW, 1, 0)
    dataset._segments[0, 0], dataset._segments[0, 1] = 0.0, rows[0]
    dataset._labels[0], dataset._size = 1.0, 1
    episodes = [torch.zeros(WINDOW, 1), *(torch.full((WINDOW, 1), row) for row in rows[1:])]
    lengths = torch.tensor([WINDOW] * len(rows))
    starts = torch.tensor([[0, WINDOW * i] for i in range(1, len(rows))])
    pool.load_state_dict(
        {"steps": torch.cat(episodes), "numbers": torch.arange(len(rows)), "lengths": lengths, "starts": starts}
        | {"next": len(rows) - 1}
    )
    return dataset, pool


def test_the_loss_on_numbers_worked_out_by_hand():
    """One member r(s) = tanh(w·s) at w = 1, no crop, so that a pair's logit is 9·tanh(s).

    Labelled: s = 0.1, logit .8970, label 1: CE = log(1 + e^−.8970) = .34202; dCE/dw = −(1 − σ)·9·.1·(1 − tanh²(.1))
    = −.28966·.89106 = −.25811. Unlabelled at threshold .99, which is a logit of 4.595: s = −1 has −6.8543, is kept with
    pseudo-label 0, CE = log(1 + e^−6.8543) = .0010544, slope σ(−6.8543)·9·(−1)·(1 − tanh²(1)) = .0010537·(−3.7798)
    = −.0039829; s = .5 has 4.1591 and s = 0 has 0: not kept. Divided by all three, with weight 2:
    dL/dw = −.25811 − 2·.0039829/3 = −.26076.
    """
    dataset, pool = constant_steps(0.1, -1.0, 0.5, 0.0)
    ensemble = RewardEnsemble(1, 0, hidden=(), members=1)
    with torch.no_grad():
        for param, value in zip(ensemble.parameters(), (1.0, 0.0), strict=True):
            param.fill_(value)
    config = SurfConfig(crop=0, weight=2.0, unlabelled_batch_ratio=3)
    learner = SurfLearner(ensemble, config, batch_size=1, learning_rate=0.5, generator=torch.Generator())
    seen = []

    def hook(gradient):
        seen.append(gradient.clone())
        return gradient

    fit = learner.fit(dataset, pool, reward_update=1, gradient_hook=hook)
    assert len(seen) == 1 and fit.epochs == 1 and fit.accuracy == 1.0
    assert fit.loss == pytest.approx(0.34202, abs=1e-5)
    assert fit.kept == pytest.approx(1 / 3)
    assert seen[0][0].item() == pytest.approx(-0.26076, abs=1e-5)
    # The bias: each step's reward has slope 1 − tanh² in it, and the first window's pulls the other way with slope 1.
    labelled = -0.28966 * 9 * ((1 - math.tanh(0.1) ** 2) - 1)
    pseudo = 0.0010537 * 9 * ((1 - math.tanh(1.0) ** 2) - 1)
    assert seen[0][1].item() == pytest.approx(labelled + 2 * pseudo / 3, abs=1e-5)
    assert ensemble.layers[0].weight.item() == pytest.approx(1.5, abs=1e-4)


def test_pseudo_labels_by_hand():
    """σ(4.5951) = .99: the probability of the member's own choice, whichever of the two it is."""
    logits = torch.tensor([4.60, 4.59, -4.60, -4.59, 0.0])
    labels, kept = pseudo_label(logits, 0.99)
    assert labels[:4].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert kept.tolist() == [True, False, True, False, False]
    assert pseudo_label(torch.tensor([math.log(3.0)], dtype=torch.float64), 0.75)[1].item()


@pytest.mark.parametrize("threshold", [0.55, 0.75])
def test_steps_against_a_plain_rewrite(threshold):
    """Three steps with windows, masks and loops over members: crops in loss, centres in labels, own order and crops."""
    store = make_store()
    dataset, pool = make_dataset(store), make_pool(store)
    learner = make_learner(replace(CONFIG, threshold=threshold, weight=0.7))
    with torch.no_grad():  # sure of some pairs from the start
        for param in learner.ensemble.parameters():
            param.mul_(3.0)
    ensemble, generator = copy.deepcopy(learner.ensemble), torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(ensemble.parameters(), lr=1e-2)

    def orders(num):
        return torch.stack([torch.randperm(num, generator=generator) for _ in range(3)])

    def masked_logit(member, windows, starts, length):
        rewards = ensemble.member_rewards(windows[..., :3].flatten(0, 1), windows[..., 3:].flatten(0, 1))[member]
        time = torch.arange(WINDOW)
        masks = torch.stack([(time >= start) & (time < start + length) for start in starts])
        sums = (rewards.view(2, WINDOW) * masks).sum(1)
        return sums[1] - sums[0]

    # 12 labelled pairs in batches of 8: 8, 4, 8. 40 unlabelled ones in batches of 32: 32, 8, 32.
    assert num_steps(2, 12, 8) == 3
    correct, kept, losses = 0, [], []
    labelled = unlabelled = torch.empty(3, 0, dtype=torch.int64)
    for _ in range(3):
        labelled = labelled if labelled.shape[1] else orders(12)
        unlabelled = unlabelled if unlabelled.shape[1] else orders(40)
        batch, labelled = labelled[:, :8], labelled[:, 8:]
        others, unlabelled = unlabelled[:, :32], unlabelled[:, 32:]
        total = torch.zeros(())
        crops = [draw_crops(tuple(some.shape), WINDOW, CROP, generator) for some in (batch, others)]
        for member in range(3):
            for i, pair in enumerate(batch[member].tolist()):
                windows, label = dataset.segments[pair], dataset.labels[pair]
                logit = masked_logit(member, windows, crops[0][0][member, i], crops[0][1][member, i])
                loss = -label * F.logsigmoid(logit) - (1 - label) * F.logsigmoid(-logit)
                total = total + loss / batch.shape[1]
                losses.append(loss.item())
                correct += bool((logit > 0) == (label == 1))
            for i, pair in enumerate(others[member].tolist()):
                windows = pool.select(torch.tensor(pair))
                centre = masked_logit(member, windows, (CROP, CROP), WINDOW - 2 * CROP).detach()
                kept.append(bool(torch.sigmoid(centre.abs()) >= threshold))
                if kept[-1]:
                    logit = masked_logit(member, windows, crops[1][0][member, i], crops[1][1][member, i])
                    total = total + 0.7 * F.softplus(-logit if centre > 0 else logit) / others.shape[1]
        adam.zero_grad()
        total.backward()
        adam.step()
    fit = learner.fit(dataset, pool, reward_update=2)
    torch.testing.assert_close(flat(learner.ensemble), flat(ensemble), rtol=1e-4, atol=1e-5)
    assert fit.epochs == 2 and 0 < sum(kept) < len(kept)
    assert fit.accuracy == pytest.approx(correct / len(losses))
    assert fit.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert fit.kept == pytest.approx(sum(kept) / len(kept))


@given(
    crop=st.integers(0, 6),
    rest=st.integers(1, 10),
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(3, 4), (1, 1), (2, 7)]),
)
@settings(max_examples=50, deadline=None)
def test_crops_lie_within_their_windows(crop, rest, seed, shape):
    window = 3 * crop + rest
    starts, lengths = draw_crops(shape, window, crop, torch.Generator().manual_seed(seed))
    assert starts.shape == (*shape, 2) and lengths.shape == shape
    assert ((lengths >= window - 3 * crop) & (lengths <= window - crop)).all()
    assert ((starts >= 0) & (starts + lengths[..., None] <= window)).all()


def test_crops_are_uniform_and_their_starts_independent():
    """Lengths 45 to 55 of windows of 60; under the shortest and the longest, all pairs of starts that fit.

    Three χ² tests, with one false alarm in a million each.
    """
    starts, lengths = draw_crops((200_000,), 60, 5, torch.Generator().manual_seed(0))

    def is_uniform(counts):
        expected = counts.sum() / counts.numel()
        statistic = ((counts - expected) ** 2 / expected).sum()
        # Wilson and Hilferty's normal approximation of χ².
        df = counts.numel() - 1
        z = ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
        return z < 4.75

    assert set(lengths.tolist()) == set(range(45, 56))
    assert is_uniform(torch.bincount(lengths - 45).double())
    short = starts[lengths == 45]
    assert is_uniform(torch.bincount(short[:, 0] * 16 + short[:, 1], minlength=256).double())
    long = starts[lengths == 55]
    assert is_uniform(torch.bincount(long[:, 0] * 6 + long[:, 1], minlength=36).double())
    with pytest.raises(ValueError, match="longer than 3·crop = 15"):
        draw_crops((3,), 15, 5, torch.Generator())


@pytest.mark.parametrize(
    ("reward_update", "labels", "steps"), [(1000, 100, 782), (1000, 1000, 7813), (20, 50, 8), (1, 128, 1), (1, 129, 2)]
)
def test_the_number_of_steps(reward_update, labels, steps):
    """⌈reward_update · labels / 128⌉, by hand."""
    assert num_steps(reward_update, labels, 128) == steps


def test_there_is_no_stop_rule():
    store = make_store()
    dataset, pool = make_dataset(store), make_pool(store)
    fit = make_learner().fit(dataset, pool, reward_update=200)
    assert fit.epochs == 150  # 300 steps of two batches in a pass
    assert fit.accuracy > 0.8 and fit.kept > 0.5


def test_backends_agree():
    store = make_store()
    dataset, pool = make_dataset(store), make_pool(store)
    pytest.importorskip("parl_core._native")
    learners = [make_learner(), make_learner()]
    fit = learners[0].fit(dataset, pool, reward_update=4)
    with backend("reference"):
        expected = learners[1].fit(dataset, pool, reward_update=4)
    assert fit.loss == pytest.approx(expected.loss, rel=1e-4) and fit.kept == pytest.approx(expected.kept)
    torch.testing.assert_close(flat(learners[0].ensemble), flat(learners[1].ensemble), rtol=1e-3, atol=1e-4)


def test_a_loaded_learner_and_pool_continue_bit_for_bit():
    store = make_store()
    dataset, pool, learner = make_dataset(store), make_pool(store, capacity=60), make_learner()
    learner.fit(dataset, pool, reward_update=3)
    other_store, other_pool, other = EpisodeStore(10, 3, 1), UnlabelledPool(60, WINDOW, 3, 1), make_learner(seed=1)
    other_store.load_state_dict(copy.deepcopy(store.state_dict()))
    other_pool.load_state_dict(pool.state_dict())
    other.load_state_dict(learner.state_dict())
    for each, each_pool in ((store, pool), (other_store, other_pool)):
        make_store((22, 33), seed=8, store=each)
        each_pool.add_uniform(each, 30, torch.Generator().manual_seed(9))
    fits = [learner.fit(dataset, pool, reward_update=3), other.fit(dataset, other_pool, reward_update=3)]
    assert fits[0] == fits[1]
    assert torch.equal(flat(learner.ensemble), flat(other.ensemble))
    for name, value in pool.state_dict().items():
        found = other_pool.state_dict()[name]
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
    with pytest.raises(ValueError, match="starts at most 10 rows"):
        UnlabelledPool(10, WINDOW, 3, 1).load_state_dict(pool.state_dict())


def test_the_pool_holds_the_windows_that_the_sampler_draws():
    store = make_store()
    pool = make_pool(store, 25)
    queries = uniform(store, 25, WINDOW, torch.Generator().manual_seed(4))
    expected = [torch.cat((side.observations, side.actions), -1) for side in (queries.first, queries.second)]
    assert torch.equal(pool.select(torch.arange(25)), torch.stack(expected, 1))
    assert pool.select(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 2, WINDOW, 4)


def test_the_pool_against_a_list_of_copies():
    """A ring of pairs, through sessions with new episodes, some of which the store and then the pool drop."""
    store, pool = make_store((12, 9, 30), max_episodes=4), UnlabelledPool(20, WINDOW, 3, 1)
    ring: list[torch.Tensor | None] = [None] * 20
    slots = itertools.cycle(range(20))
    for session, num in enumerate((7, 9, 8, 20, 3)):
        drawn = uniform(store, num, WINDOW, torch.Generator().manual_seed(session))
        pool.add_uniform(store, num, torch.Generator().manual_seed(session))
        for i in range(num):
            sides = [torch.cat((s.observations[i], s.actions[i]), -1) for s in (drawn.first, drawn.second)]
            ring[next(slots)] = torch.stack(sides)
        held = [pair for pair in ring if pair is not None]
        assert len(pool) == len(held)
        assert torch.equal(pool.select(torch.arange(len(pool))), torch.stack(held))
        first_rows = torch.cat((torch.zeros(1, dtype=torch.int64), pool._lengths.cumsum(0)))
        assert first_rows[-1] == len(pool.steps)
        # Each episode once, and none that no pair refers to.
        assert len(pool._numbers.unique()) == len(pool._numbers)
        refers = torch.bucketize(pool.starts(torch.arange(len(pool))), first_rows[1:], right=True)
        assert set(refers.flatten().tolist()) == set(range(len(pool._numbers)))
        make_store((15, 40, 8), seed=session + 1, store=store)
    assert pool._numbers.min() > 2  # the first episodes are gone
    with pytest.raises(ValueError, match=r"num must lie in \[1, 20\]"):
        pool.add_uniform(store, 21, torch.Generator())


def test_half_a_million_pairs_take_16_bytes_each():
    store, pool = make_store((200, 300)), UnlabelledPool(500_000, 60, 3, 1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        pool.add_uniform(store, 300_000, generator)
    assert len(pool) == 500_000 and pool._next == 100_000
    tensors = [value for value in pool.state_dict().values() if isinstance(value, torch.Tensor)]
    assert sum(t.untyped_storage().nbytes() for t in tensors) <= 16 * 500_000 + 500 * 4 * 4 + 2 * 16


def test_steps_that_are_not_finite_are_refused():
    store = make_store((20,))
    store.episode(0)[3, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="unlabelled pair must be finite"):
        make_pool(store)
    store.episode(0)[3, 1] = 0.0
    with pytest.raises(ValueError, match="kept, got 1"):
        store.episode(1)


def test_what_cannot_be_fitted_is_refused():
    store = make_store()
    dataset, pool, learner = make_dataset(store), make_pool(store), make_learner()
    with pytest.raises(ValueError, match="got 0 and 40"):
        learner.fit(PreferenceDataset(0, WINDOW, 3, 1), pool, reward_update=1)
    with pytest.raises(ValueError, match="got 12 and 0"):
        learner.fit(dataset, UnlabelledPool(1, WINDOW, 3, 1), reward_update=1)
    with pytest.raises(ValueError, match="reward_update must be at least 1"):
        learner.fit(dataset, pool, reward_update=0)
    longer = UnlabelledPool(5, WINDOW + 1, 3, 1)
    longer.add_uniform(store, 5, torch.Generator())
    with pytest.raises(ValueError, match="one length, got 9 and 10"):
        learner.fit(dataset, longer, reward_update=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"inv_label_ratio": 0},
        {"unlabelled_batch_ratio": 0},
        {"pool_capacity": 0},
        {"crop": -1},
        {"threshold": 0.5},
        {"threshold": math.nan},
        {"weight": -1.0},
        {"weight": math.inf},
    ],
)
def test_a_configuration_that_cannot_work_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"surf.{next(iter(wrong))} must"):
        replace(SurfConfig(), **wrong).validate()
    SurfConfig().validate()
