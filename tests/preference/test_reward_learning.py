"""The labelled pairs and the fit: a plain rewrite, the stop rule, the hook, identical continuation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from parl_core.errors import NonFiniteError
from parl_core.models.rewards import RewardEnsemble
from parl_core.preference.reward_learning import PreferenceDataset, RewardLearner, in_order
from parl_core.preference.samplers import Queries
from parl_core.rl.rollout import Segments

LENGTH = 5


def make_queries(num: int, seed: int = 0) -> Queries:
    """The true reward is the first observation plus half the first action."""
    generator = torch.Generator().manual_seed(seed)

    def segments() -> Segments:
        observations = torch.randn(num, LENGTH, 3, generator=generator)
        actions = 2 * torch.rand(num, LENGTH, 2, generator=generator) - 1
        return Segments(observations, actions, observations[..., 0] + 0.5 * actions[..., 0])

    return Queries(segments(), segments())


def make_dataset(num: int = 40, capacity: int = 100) -> PreferenceDataset:
    """Pair 3 is one segment twice: a tie by the labels, and by the logits to the last bit."""
    dataset = PreferenceDataset(capacity, LENGTH, obs_dim=3, act_dim=2)
    queries = make_queries(num)
    for first, second in zip(queries.first, queries.second, strict=True):
        second[3] = first[3]
    margin = queries.second.true_rewards.double().sum(1) - queries.first.true_rewards.double().sum(1)
    dataset.append(queries, (0.5 + 0.5 * margin.sign()).float())
    return dataset


def make_learner(seed: int = 0, batch_size: int = 16, learning_rate: float = 3e-3) -> RewardLearner:
    torch.manual_seed(seed)
    ensemble = RewardEnsemble(3, 2, hidden=(16, 16), members=3)
    generator = torch.Generator().manual_seed(seed)
    return RewardLearner(ensemble, learning_rate=learning_rate, batch_size=batch_size, generator=generator)


def flat(ensemble: RewardEnsemble) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in ensemble.parameters()])


def test_recent_gives_the_last_pairs():
    dataset = make_dataset(4)
    more = make_queries(3, seed=1)
    dataset.append(more, torch.tensor([0.0, 0.5, 1.0]))
    assert len(dataset) == 7
    pairs = dataset.recent(2, dtype=torch.float64)
    assert pairs.num_pairs == 2
    assert pairs.labels.tolist() == [0.5, 1.0]
    assert pairs.second.offsets.tolist() == [0, 5, 10]
    assert torch.equal(pairs.first.observations, more.first.observations[1:].reshape(10, 3).double())
    assert torch.equal(pairs.second.actions, more.second.actions[1:].reshape(10, 2).double())
    assert dataset.recent(100).num_pairs == 7


def test_bad_pairs_are_refused():
    dataset = make_dataset(4, capacity=6)
    with pytest.raises(ValueError, match="room for 2 more labelled pairs, got 3"):
        dataset.append(make_queries(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"shape \(M,\) = \(2,\) and lie in \[0, 1\]"):
        dataset.append(make_queries(2), torch.tensor([0.0, 1.5]))
    with pytest.raises(ValueError, match=r"\(2,\) and lie"):
        dataset.append(make_queries(2), torch.tensor([0.0, math.nan]))
    bad = make_queries(2)
    bad.second.actions[0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        dataset.append(bad, torch.ones(2))
    with pytest.raises(ValueError, match=r"5 steps of 4 \+ 2 numbers"):
        PreferenceDataset(6, LENGTH, obs_dim=4, act_dim=2).append(make_queries(2), torch.ones(2))
    assert len(dataset) == 4


def test_one_epoch_against_a_plain_rewrite():
    """Every member by itself, with its own order, its own Adam and a loop over pairs."""
    dataset, learner = make_dataset(10), make_learner(batch_size=4)
    assert dataset.labels[3] == 0.5
    reference = copy.deepcopy(learner.ensemble)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(10, generator=generator) for _ in range(3)]
    adam = torch.optim.Adam(reference.parameters(), lr=3e-3)
    pairs = dataset.recent(10)
    losses: list[float] = []
    correct = 0
    for start in (0, 4, 8):
        batch_losses = []
        for member, order in enumerate(orders):
            member_losses = []
            for i in order[start : start + 4].tolist():
                steps = slice(i * LENGTH, (i + 1) * LENGTH)
                first, second = (
                    reference.member_rewards(side.observations[steps], side.actions[steps])[member].sum()
                    for side in (pairs.first, pairs.second)
                )
                label = pairs.labels[i]
                member_losses.append(-label * F.logsigmoid(second - first) - (1 - label) * F.logsigmoid(first - second))
                correct += bool(label != 0.5 and (second > first) == (label == 1))
            losses += [loss.item() for loss in member_losses]
            batch_losses.append(torch.stack(member_losses).mean())
        adam.zero_grad()
        torch.stack(batch_losses).sum().backward()
        adam.step()
    fit = learner.fit(dataset, max_epochs=1, accuracy_target=1.0)
    torch.testing.assert_close(flat(learner.ensemble), flat(reference), rtol=1e-4, atol=1e-6)
    assert fit.epochs == 1
    assert fit.loss == pytest.approx(sum(losses) / 30, rel=1e-5)
    assert fit.accuracy == pytest.approx(correct / 27)


def test_the_fit_stops_at_the_target_and_orders_new_pairs():
    dataset, learner = make_dataset(100), make_learner()
    fit = learner.fit(dataset, max_epochs=200)
    assert fit.accuracy > 0.97 and 1 < fit.epochs < 200
    new = make_queries(1000, seed=7)
    with torch.no_grad():
        returns = [
            learner.ensemble(side.observations.flatten(0, 1), side.actions.flatten(0, 1)).view(1000, LENGTH).sum(1)
            for side in (new.first, new.second)
        ]
    truth = new.second.true_rewards.sum(1) > new.first.true_rewards.sum(1)
    # Not more: a bounded reward cannot follow an unbounded one, and tries to.
    assert ((returns[1] > returns[0]) == truth).float().mean() > 0.8


def test_ties_are_fitted_but_not_counted():
    dataset, learner = make_dataset(8), make_learner()
    dataset.labels[:] = 0.5
    fit = learner.fit(dataset, max_epochs=30)
    assert fit.epochs == 30 and math.isnan(fit.accuracy)
    assert fit.loss == pytest.approx(math.log(2), abs=0.05)


def test_the_hook_gets_the_gradient_and_decides_the_step():
    dataset, learner = make_dataset(10), make_learner(batch_size=100)
    pairs, ensemble = dataset.recent(10), copy.deepcopy(learner.ensemble)

    def member_returns(side):
        return ensemble.member_rewards(side.observations, side.actions).unflatten(1, (10, LENGTH)).sum(-1)

    logits = member_returns(pairs.second) - member_returns(pairs.first)
    loss = F.binary_cross_entropy_with_logits(logits, pairs.labels.expand(3, -1), reduction="sum") / 10
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(ensemble.parameters()))])
    seen = []

    def hook(gradient):
        seen.append(gradient.clone())
        return torch.ones_like(gradient)

    before = flat(learner.ensemble)
    learner.fit(dataset, max_epochs=1, gradient_hook=hook)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-6)
    # Adam's first step along a gradient of ones is −lr everywhere.
    torch.testing.assert_close(flat(learner.ensemble) - before, torch.full_like(before, -3e-3), rtol=1e-3, atol=0)

    plain, hooked = make_learner(1), make_learner(1)
    plain.fit(dataset, max_epochs=2)
    hooked.fit(dataset, max_epochs=2, gradient_hook=lambda gradient: gradient)
    assert torch.equal(flat(plain.ensemble), flat(hooked.ensemble))


def test_non_finite_numbers_stop_the_fit_before_the_step():
    dataset, learner = make_dataset(10), make_learner()
    before = flat(learner.ensemble)
    with pytest.raises(NonFiniteError, match="gradient_hook"):
        learner.fit(dataset, 1, gradient_hook=lambda gradient: gradient * torch.nan)
    with pytest.raises(ValueError, match="must return shape"):
        learner.fit(dataset, 1, gradient_hook=lambda gradient: gradient[:-1])
    assert torch.equal(flat(learner.ensemble), before)
    with torch.no_grad():
        next(learner.ensemble.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="loss became nan"):
        learner.fit(dataset, 1)
    with pytest.raises(ValueError, match="no labelled pairs"):
        learner.fit(PreferenceDataset(0, LENGTH, 3, 2), 1)


def test_a_loaded_learner_and_dataset_continue_bit_for_bit():
    dataset, learner = make_dataset(40), make_learner(0)
    learner.fit(dataset, max_epochs=2, accuracy_target=1.0)
    other_dataset, other = PreferenceDataset(60, LENGTH, 3, 2), make_learner(1)
    other_dataset.load_state_dict(copy.deepcopy(dataset.state_dict()))
    other.load_state_dict(learner.state_dict())
    for each in (dataset, other_dataset):
        each.append(make_queries(5, seed=2), torch.ones(5))
    fits = [learner.fit(dataset, 3, 1.0), other.fit(other_dataset, 3, 1.0)]
    assert fits[0] == fits[1]
    assert torch.equal(flat(learner.ensemble), flat(other.ensemble))
    with pytest.raises(ValueError, match="M at most 10"):
        PreferenceDataset(10, LENGTH, 3, 2).load_state_dict(dataset.state_dict())


@pytest.mark.gpu
def test_a_fit_on_a_gpu_is_that_on_the_cpu(device):
    dataset, learner = make_dataset(40), make_learner(0, learning_rate=1e-3)
    there, other = PreferenceDataset(40, LENGTH, 3, 2, device=device), make_learner(1, learning_rate=1e-3)
    there.load_state_dict(dataset.state_dict())
    other.ensemble.to(device)
    other.load_state_dict(learner.state_dict())
    expected, found = learner.fit(dataset, 3, 1.0), other.fit(there, 3, 1.0)
    assert found.epochs == expected.epochs and found.loss == pytest.approx(expected.loss, rel=1e-4)
    torch.testing.assert_close(flat(other.ensemble).cpu(), flat(learner.ensemble), rtol=1e-3, atol=1e-4)
    recent = there.recent(3)
    assert recent.labels.device.type == recent.first.offsets.device.type == device.type


def test_equal_labels_count_as_class_0_in_compat():
    """Logits 1, −1, 0 under labels 0, ½, 1, by hand."""
    logits = torch.tensor([1.0, -1.0, 0.0] * 3)
    labels = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0])
    order = in_order(logits, labels)
    assert order.tolist() == [False, True, False, False, False, False, True, False, False]
    compat = in_order(logits, labels, bpref_compat=True)
    assert compat.tolist() == [False, True, True, False, True, True, True, False, False]

    dataset = make_dataset(8)
    dataset.labels[:] = 0.5
    found = []
    for bpref_compat in (False, True):
        learner = make_learner(batch_size=8)
        learner.bpref_compat = bpref_compat
        ensemble, pairs = copy.deepcopy(learner.ensemble), dataset.recent(8)
        found.append(learner.fit(dataset, max_epochs=1))
    with torch.no_grad():
        returns = [
            ensemble.member_rewards(side.observations, side.actions).unflatten(1, (8, LENGTH)).sum(-1)
            for side in (pairs.first, pairs.second)
        ]
    first = int((returns[0] >= returns[1]).sum())
    assert math.isnan(found[0].accuracy) and found[1].accuracy == pytest.approx(first / 24)
    assert found[0].loss == found[1].loss
