"""The gradient of batches of pairs: native against the plain version, and that against slices and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from parl_core.models.rewards import RewardEnsemble
from parl_core.ops import backend
from parl_core.preference.pair_gradient import (
    PairBatch,
    _native_gradient,
    _reference_gradient,
    pair_gradient,
    pair_logits,
)


def make_batch(shape, num_rows, shortest, longest, *, share_kept=None, seed=0) -> PairBatch:
    """Random pairs of random lengths, some of them without a preference."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, shape, generator=generator)
    where = torch.rand(*shape, 2, generator=generator, dtype=torch.float64)
    labels = torch.rand(shape, generator=generator)
    labels[:, :2] = 0.5
    kept = None if share_kept is None else torch.rand(shape, generator=generator) < share_kept
    return PairBatch((where * (num_rows - lengths + 1)[..., None]).long(), lengths, labels, longest, kept)


def make_ensemble(hidden=(9, 7), dtype=torch.float64) -> RewardEnsemble:
    torch.manual_seed(1)
    return RewardEnsemble(3, 2, hidden, members=3).to(dtype)


def make_steps(num_rows=80, dtype=torch.float64, seed=5) -> torch.Tensor:
    return torch.randn(num_rows, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_same(found, expected):
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-13)
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("gradient", [_reference_gradient, _native_gradient])
def test_masked_windows_are_slices(gradient):
    """Pair by pair, member by member, on slices of the table, the last row of which belongs to some segments."""
    if gradient is _native_gradient:
        pytest.importorskip("parl_core._native")
    steps, ensemble = make_steps(20), make_ensemble()
    batch = make_batch((3, 6), 20, 1, 8, share_kept=0.6)
    batch.starts[0, 2, 1], batch.kept[0, 2] = 20 - batch.lengths[0, 2], True
    total, logits = torch.zeros((), dtype=torch.float64), torch.zeros(3, 6, dtype=torch.float64)
    for m in range(3):
        for i in range(6):
            if not batch.kept[m, i]:
                continue
            first, second = (
                ensemble.member_rewards(steps[s : s + batch.lengths[m, i], :3], steps[s : s + batch.lengths[m, i], 3:])
                for s in batch.starts[m, i].tolist()
            )
            logit, label = second[m].sum() - first[m].sum(), batch.labels[m, i].double()
            logits[m, i] = logit.detach()
            total = total - label * F.logsigmoid(logit) - (1 - label) * F.logsigmoid(-logit)
    gradients = torch.autograd.grad(total / 6, list(ensemble.parameters()))
    found = gradient(ensemble, steps, batch)
    torch.testing.assert_close(found.loss, total.detach() / 6)
    torch.testing.assert_close(found.logits, logits)
    torch.testing.assert_close(found.gradients, gradients)


# Blocks of 128 rows: several pairs in one, one pair, and a pair that is longer than a block.
@pytest.mark.parametrize(
    ("shortest", "longest", "pairs"), [(1, 1, 40), (5, 5, 30), (1, 9, 50), (50, 50, 7), (45, 55, 9), (60, 100, 3)]
)
@pytest.mark.parametrize("share_kept", [None, 0.4])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_native_gradient_is_that_of_torch(isa, shortest, longest, pairs, share_kept, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        steps, ensemble = make_steps(200), make_ensemble((90, 70))
        batch = make_batch((3, pairs), 200, shortest, longest, share_kept=share_kept)
        assert_same(_native_gradient(ensemble, steps, batch), _reference_gradient(ensemble, steps, batch))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kept", [[0, 0, 0], [40, 0, 1], [0, 1, 40]])
def test_members_may_keep_nothing(isa, kept, threads):
    """Also less than there are threads. Gradients of an earlier call must not be left behind in the memory."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        steps, ensemble = make_steps(200), make_ensemble((90, 70))
        batch = make_batch((3, 40), 200, 45, 55)
        _native_gradient(ensemble, steps, batch)
        batch = batch._replace(kept=torch.arange(40) < torch.tensor(kept)[:, None])
        found = _native_gradient(ensemble, steps, batch)
        assert_same(found, _reference_gradient(ensemble, steps, batch))
    finally:
        torch.set_num_threads(before)
    for member, num in enumerate(kept):
        assert any(bool(gradient[member].any()) for gradient in found.gradients) == (num > 0)


def test_the_native_gradient_refuses_rows_that_are_not_there():
    native = pytest.importorskip("parl_core._native")
    assert native
    steps, ensemble = make_steps(20), make_ensemble()
    batch = make_batch((3, 4), 20, 5, 5)
    for start in (-1, 16):
        starts = batch.starts.clone()
        starts[2, 1, 1] = start
        with pytest.raises(ValueError, match=r"starts must lie in \[0, 15\] for 5 rows"):
            _native_gradient(ensemble, steps, batch._replace(starts=starts))
    for length in (0, 21):
        with pytest.raises(ValueError, match=r"lengths must lie in \[1, 20\]"):
            _native_gradient(ensemble, steps, batch._replace(lengths=torch.full((3, 4), length)))


def test_logits_are_those_of_slices():
    steps, ensemble = make_steps(30), make_ensemble()
    starts = make_batch((3, 7), 30, 4, 4).starts
    found = pair_logits(ensemble, steps, starts, 4, chunk=3)
    rewards = ensemble.member_rewards(steps[:, :3], steps[:, 3:]).detach()
    for m in range(3):
        for i, (first, second) in enumerate(starts[m].tolist()):
            expected = rewards[m, second : second + 4].sum() - rewards[m, first : first + 4].sum()
            torch.testing.assert_close(found[m, i], expected)


def test_the_native_gradient_leaves_what_it_does_not_know_to_torch(monkeypatch):
    native = pytest.importorskip("parl_core._native")
    steps, ensemble, batch = make_steps(), make_ensemble(), make_batch((3, 4), 80, 5, 5)
    monkeypatch.setattr(native, "ensemble_preference_gradient", lambda *_: pytest.fail("the native pass was taken"))
    with backend("reference"):
        pair_gradient(ensemble, steps, batch)
    ensemble.layers[0].register_forward_hook(lambda module, inputs, output: output)
    pair_gradient(ensemble, steps, batch)


class Doubled(RewardEnsemble):
    def member_rewards(self, observations, actions):
        return 2.0 * super().member_rewards(observations, actions)


class Scaled(RewardEnsemble):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = torch.nn.Parameter(torch.tensor(0.7))

    def member_rewards(self, observations, actions):
        return self.scale * super().member_rewards(observations, actions)


def replaced(ensemble):
    original = ensemble.member_rewards
    ensemble.member_rewards = lambda observations, actions: 3.0 * original(observations, actions)


def hooked(ensemble):
    next(ensemble.parameters()).register_hook(lambda gradient: -gradient)


@pytest.mark.parametrize(
    ("kind", "change"),
    [(Doubled, None), (Scaled, None), (RewardEnsemble, replaced), (RewardEnsemble, hooked)],
    ids=["subclass", "parameter", "replaced", "hook"],
)
def test_the_gradient_is_that_of_the_ensemble_as_it_is(kind, change):
    torch.manual_seed(0)
    ensemble = kind(3, 2, (8,))
    if change is not None:
        change(ensemble)
    steps, batch = make_steps(dtype=torch.float32), make_batch((3, 10), 80, 4, 4)
    found = _native_gradient(ensemble, steps, batch)
    expected = _reference_gradient(ensemble, steps, batch)
    torch.testing.assert_close(found, expected)


def test_a_frozen_layer_is_refused_as_in_torch():
    ensemble = RewardEnsemble(3, 2, (8,))
    ensemble.layers[0].requires_grad_(False)
    steps, batch = make_steps(dtype=torch.float32), make_batch((3, 10), 80, 4, 4)
    with pytest.raises(RuntimeError, match="does not require grad"):
        _native_gradient(ensemble, steps, batch)
