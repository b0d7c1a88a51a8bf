"""Trajectories and PreferencePairs: what they compute, and what they refuse in one sentence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import parl_core
from parl_core import NonFiniteError, PreferencePairs, Trajectories


def example(lengths=(2, 0, 3), **options) -> Trajectories:
    total = sum(lengths)
    offsets = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    return Trajectories(torch.randn(total, 4), torch.randn(total, 2), offsets, **options)


def test_ragged_bookkeeping_by_hand():
    trajectories = example(weights=torch.tensor([0.5, 0.25, 0.25]))
    assert (trajectories.num_steps, trajectories.num_trajectories) == (5, 3)
    assert trajectories.lengths.tolist() == [2, 0, 3] and trajectories.horizon == 3
    assert trajectories.trajectory_index.tolist() == [0, 0, 2, 2, 2]
    assert trajectories.time.tolist() == [0, 1, 0, 1, 2]
    assert trajectories.step_weights.tolist() == [0.5, 0.5, 0.25, 0.25, 0.25]
    assert trajectories.sum_steps(torch.tensor([1.0, 2, 3, 4, 5])).tolist() == [3, 0, 12]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=8))
def test_any_lengths(lengths):
    trajectories = example(tuple(lengths))
    values = torch.randn(trajectories.num_steps)
    pieces = values.split(lengths) if lengths else ()
    expected = torch.stack([piece.sum() for piece in pieces]) if lengths else torch.zeros(0)
    torch.testing.assert_close(trajectories.sum_steps(values), expected)
    assert trajectories.time.tolist() == [t for n in lengths for t in range(n)]
    assert trajectories.horizon == max(lengths, default=0)
    if lengths:
        assert float(trajectories.weights.sum()) == pytest.approx(1.0)


def test_default_weights_mark_a_sample():
    assert example().is_sample
    assert example().weights.tolist() == pytest.approx([1 / 3] * 3)
    assert not example(weights=torch.ones(3)).is_sample
    moved = example().to(torch.float64)
    assert moved.is_sample
    assert moved.observations.dtype == moved.weights.dtype == torch.float64


def test_to_keeps_integers():
    trajectories = Trajectories(torch.randn(2, 3), torch.tensor([0, 1]), torch.tensor([0, 2]))
    moved = trajectories.to(torch.float64)
    assert moved.actions.dtype == moved.offsets.dtype == torch.int64


@pytest.mark.filterwarnings("ignore::parl_core.HypergradientWarning")
def test_data_carry_no_graph_and_may_come_from_inference_mode():
    with torch.inference_mode():
        rollout = [torch.randn(5, 4), torch.rand(5, 2), torch.tensor([0, 2, 5])]
    trajectories = Trajectories(*rollout, weights=torch.ones(2, requires_grad=True))
    assert not trajectories.observations.is_inference()
    assert not trajectories.weights.requires_grad
    pairs = PreferencePairs(trajectories, trajectories, torch.zeros(2))
    policy, reward = parl_core.policies.GaussianPolicy(4, 2, (3,)), parl_core.rewards.RewardEnsemble(4, 2, (3,))
    result = parl_core.hypergradient(
        policy,
        reward,
        trajectories,
        pairs,
        loss=parl_core.PreferenceLoss(),
        discount=0.9,
        curvature=parl_core.ScoreHessian(temperature=0.1, damping=10.0),
        solver=parl_core.Dense(),
    )
    assert torch.isfinite(result.total).all()
    actions = torch.randn(5, 2, requires_grad=True).tanh()
    assert not Trajectories(torch.randn(5, 4), actions, torch.tensor([0, 5])).actions.requires_grad


def numbered(lengths, **options) -> Trajectories:
    """Observations and actions that tell which step they are."""
    total = sum(lengths)
    offsets = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    return Trajectories(torch.arange(total).reshape(-1, 1).double(), torch.arange(total) + 100, offsets, **options)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_select_takes_whole_trajectories_in_the_order_asked_for(lengths, data):
    index = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8))
    weights = torch.arange(1.0, len(lengths) + 1, dtype=torch.float64)
    whole = numbered(lengths, weights=weights)
    _ = whole.trajectory_index, whole.horizon  # kept, and not to come along
    chosen = whole.select(torch.tensor(index, dtype=torch.int64))
    steps = [range(int(whole.offsets[i]), int(whole.offsets[i + 1])) for i in index]
    expected = [t for r in steps for t in r]
    assert chosen.observations[:, 0].tolist() == expected
    assert chosen.actions.tolist() == [t + 100 for t in expected]
    assert chosen.lengths.tolist() == [lengths[i] for i in index]
    assert chosen.horizon == max(chosen.lengths.tolist(), default=0)
    assert chosen.trajectory_index.tolist() == [n for n, i in enumerate(index) for _ in range(lengths[i])]
    assert chosen.weights.tolist() == [i + 1 for i in index]
    assert not chosen.is_sample


def test_a_selection_of_a_sample_is_a_sample():
    chosen = numbered((2, 0, 3)).select(torch.tensor([2, 2, 0, 1]))
    assert chosen.is_sample
    assert chosen.weights.tolist() == [0.25] * 4
    assert chosen.to(torch.float32).weights.tolist() == [0.25] * 4


def test_with_weights_shares_the_data_and_is_no_longer_a_sample():
    trajectories = numbered((2, 0, 3))
    weighted = trajectories.with_weights(torch.tensor([1.0, 0.0, 2.0], requires_grad=True))
    assert weighted.observations.data_ptr() == trajectories.observations.data_ptr()
    assert weighted.weights.tolist() == [1, 0, 2] and weighted.weights.dtype == torch.float64
    assert not weighted.is_sample and not weighted.weights.requires_grad
    assert trajectories.is_sample and trajectories.weights.tolist() == [1 / 3] * 3
    with pytest.raises(ValueError, match=r"weights .* \(3,\)"):
        trajectories.with_weights(torch.ones(2))
    with pytest.raises(NonFiniteError, match="weights"):
        trajectories.with_weights(torch.full((3,), float("nan")))


def test_pairs_are_selected_and_weighted_pair_by_pair():
    pairs = PreferencePairs(numbered((2, 0, 3)), numbered((1, 4, 2)), torch.tensor([0.0, 0.5, 1.0]))
    chosen = pairs.select(torch.tensor([2, 1, 2, 2]))
    assert chosen.is_sample and chosen.weights.tolist() == [0.25] * 4
    assert chosen.labels.tolist() == [1, 0.5, 1, 1]
    assert chosen.first.lengths.tolist() == [3, 0, 3, 3] and chosen.second.lengths.tolist() == [2, 4, 2, 2]
    assert chosen.second.observations[:2, 0].tolist() == [5, 6]
    weighted = pairs.with_weights(torch.tensor([1.0, 2.0, 3.0]))
    assert weighted.first is pairs.first and not weighted.is_sample and pairs.is_sample
    assert weighted.select(torch.tensor([2, 0])).weights.tolist() == [3, 1]
    with pytest.raises(ValueError, match=r"weights must have shape \(M,\)"):
        pairs.with_weights(torch.ones(2))


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        ([0], TypeError, "index must be a torch.Tensor, got list"),
        (torch.tensor([0], dtype=torch.int32), ValueError, "index must be an int64 .* got int32"),
        (torch.tensor([True, False, True]), ValueError, "got bool"),
        (torch.tensor([0, 3]), ValueError, r"index must lie in \[0, 3\), got values from 0 to 3"),
        (torch.tensor([-1]), ValueError, "from -1 to -1"),
    ],
)
def test_bad_indices_are_named(index, error, words):
    trajectories = example()
    for data in (trajectories, PreferencePairs(trajectories, trajectories, torch.zeros(3))):
        with pytest.raises(error, match=words):
            data.select(index)


def test_token_ids_are_observations_too():
    tokens = torch.tensor([[2**24 + 1, 1], [3, 0]])  # float32 does not hold the first
    trajectories = Trajectories(tokens, torch.tensor([3, 4]), torch.tensor([0, 1, 2]))
    assert trajectories.weights.dtype == torch.get_default_dtype()
    for moved in (trajectories.to(torch.float64), trajectories.to(torch.float32), trajectories.to("cpu")):
        assert torch.equal(moved.observations, tokens)
        assert moved.observations.dtype == moved.actions.dtype == torch.int64
        assert moved.is_sample
    assert trajectories.to(torch.float64).weights.dtype == torch.float64
    own = trajectories.with_weights(torch.tensor([0.1, 0.9], dtype=torch.float64))
    assert own.weights.dtype == torch.float64
    labels = torch.tensor([0.3, 1.0], dtype=torch.float64)
    pairs = PreferencePairs(trajectories, trajectories, labels)
    assert pairs.labels.tolist() == [0.3, 1.0] and pairs.weights.dtype == torch.float64
    assert PreferencePairs(own, own, torch.tensor([0, 1])).labels.dtype == torch.get_default_dtype()
    assert pairs.with_weights(torch.ones(2)).to(torch.float64).weights.dtype == torch.float64
    with pytest.raises(ValueError, match="dtype must be a floating-point type, got "):
        example().to(torch.int32)


def test_sum_steps_is_differentiable():
    values = torch.randn(5, requires_grad=True)
    (example().sum_steps(values) * torch.tensor([2.0, 7.0, 3.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [2, 2, 3, 3, 3]


OBS, ACT, OFF = torch.zeros(3, 4), torch.zeros(3, 2), torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (([1.0], ACT, OFF), {}, TypeError, "observations must be a torch.Tensor, got list"),
        (
            (OBS[0], ACT, OFF),
            {},
            ValueError,
            r"observations must be a floating-point or integer tensor of shape \(T, do\)",
        ),
        ((OBS.bool(), ACT, OFF), {}, ValueError, "observations .* got bool"),
        ((OBS, ACT[:2], OFF), {}, ValueError, "actions must have shape .* T = 3"),
        ((OBS, ACT, OFF.int()), {}, ValueError, "offsets must be an int64 tensor .* got int32"),
        ((OBS, ACT, torch.tensor([0, 2])), {}, ValueError, "offsets must end at the number of steps, 3, got 2"),
        ((OBS, ACT, torch.tensor([1, 3])), {}, ValueError, "offsets must start at 0, got 1"),
        (
            (OBS, ACT, torch.tensor([0, 2, 1, 3])),
            {},
            ValueError,
            r"must not decrease, got offsets\[2\] = 1 after offsets\[1\] = 2",
        ),
        ((OBS, ACT, torch.zeros(0, dtype=torch.int64)), {}, ValueError, "offsets"),
        ((OBS, ACT, OFF), dict(weights=torch.ones(3)), ValueError, r"weights .* \(2,\)"),
        (
            (OBS, ACT, OFF),
            dict(weights=torch.tensor([1, float("nan")])),
            NonFiniteError,
            "weights must be finite, got nan",
        ),
        (
            (OBS.clone().fill_(float("inf")), ACT, OFF),
            {},
            NonFiniteError,
            r"observations must be finite, got inf at index \(0, 0\)",
        ),
        ((OBS, ACT.clone().fill_(float("nan")), OFF), {}, NonFiniteError, "actions"),
        ((OBS, ACT.to("meta"), OFF), {}, ValueError, "actions is on meta, but observations is on cpu"),
    ],
)
def test_bad_trajectories_are_named(arguments, options, error, words):
    with pytest.raises(error, match=words):
        Trajectories(*arguments, **options)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(first=3), TypeError, "first must be Trajectories, got int"),
        (dict(second=example((1, 1))), ValueError, "second must hold 3 segments as first does, got 2"),
        (dict(labels=torch.zeros(2)), ValueError, r"labels must have shape \(M,\) = \(3,\)"),
        (dict(labels=torch.tensor([0.0, 1.5, 0])), ValueError, r"labels must lie in \[0, 1\]"),
        (dict(labels=torch.tensor([0.0, float("nan"), 0])), NonFiniteError, "labels"),
        (dict(weights=torch.zeros(2)), ValueError, "weights"),
    ],
)
def test_bad_pairs_are_named(change, error, words):
    arguments = dict(first=example(), second=example(), labels=torch.zeros(3))
    with pytest.raises(error, match=words):
        PreferencePairs(**{**arguments, **change})


def test_complex_actions_are_refused():
    with pytest.raises(ValueError, match=r"actions must be real numbers, got complex64 of shape \(4, 1\)"):
        Trajectories(torch.zeros(4, 2), torch.zeros(4, 1, dtype=torch.complex64), torch.tensor([0, 4]))


@pytest.mark.parametrize("what", ["observations", "actions"])
@pytest.mark.parametrize("other", [torch.float64, torch.int64])
def test_pairs_of_mixed_dtypes_are_refused(what, other):
    def segment(**dtypes):
        observations = torch.zeros(4, 2, dtype=dtypes.get("observations", torch.float32))
        actions = torch.zeros(4, 1, dtype=dtypes.get("actions", torch.float32))
        return Trajectories(observations, actions, torch.tensor([0, 4]))

    with pytest.raises(ValueError, match=rf"second\.{what} must be torch\.float32 as those of first are, got {other}"):
        PreferencePairs(segment(), segment(**{what: other}), torch.tensor([1.0]))
    PreferencePairs(segment(**{what: other}), segment(**{what: other}), torch.tensor([1.0]))
