"""Linearizations and rewards in chunks: the same numbers as in one piece, and no more memory than a chunk's."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, hessian, jacrev

import parl_core as parl
from parl_core.hypergrad.modules import evaluate_reward, reward_values, reward_vjp
from tests.hypergrad.sequences import F64, HistoryReward, data, sequence_policy

PRODUCTS = {
    "log_prob": lambda linear, w, v: linear.log_prob,
    "vjp": lambda linear, w, v: linear.vjp(w),
    "jvp": lambda linear, w, v: linear.jvp(v),
    "hvp": lambda linear, w, v: linear.hvp(w, v),
    "jvp_and_hvp": lambda linear, w, v: torch.cat(linear.jvp_and_hvp(w, v)),
    "fisher_vp": lambda linear, w, v: linear.fisher_vp(w, v),
    "scores": lambda linear, w, v: linear.scores(w),
}
RAGGED = (0, 3, 0, 1, 6, 2, 0)


class Recorder(nn.Module):
    """Passes calls on to a policy, noting the steps and offsets of each and keeping weak references to what it made."""

    def __init__(self, policy: nn.Module, sees_trajectories: bool) -> None:
        super().__init__()
        self.policy, self.calls, self.made = policy, [], []
        self.most_alive = 0
        if sees_trajectories:
            self.log_prob = self.with_offsets

    def log_prob(self, observations, actions):
        return self.note(len(observations), None, self.policy.log_prob(observations, actions))

    def with_offsets(self, observations, actions, offsets):
        return self.note(len(observations), offsets.tolist(), self.policy.log_prob(observations, actions))

    def note(self, steps, offsets, result):
        self.calls.append((steps, offsets))
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.made))
        self.made.append(weakref.ref(result))
        return result


def gaussian(seed=0):
    torch.manual_seed(seed)
    return parl.policies.GaussianPolicy(3, 2, hidden=(4,)).to(F64)


def trajectories_of(lengths, seed=1):
    torch.manual_seed(seed)
    offsets = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    total = sum(lengths)
    return parl.Trajectories(torch.randn(total, 3, dtype=F64), torch.randn(total, 2, dtype=F64), offsets)


@pytest.mark.parametrize("chunk_steps", [1, 2, 4, 5, 12, 100])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("kind", ["analytic", "log_prob only", "transformer"])
def test_chunks_change_nothing(kind, product, chunk_steps):
    if kind == "transformer":
        policy, trajectories = sequence_policy("transformer"), data("transformer", RAGGED)
    else:
        policy = gaussian() if kind == "analytic" else Recorder(gaussian(), sees_trajectories=False)
        trajectories = trajectories_of(RAGGED)
    whole = parl.linearize(policy, trajectories)
    parts = parl.linearize(policy, trajectories, chunk_steps=chunk_steps)
    torch.manual_seed(2)
    w, v = torch.randn(trajectories.num_steps, dtype=F64), torch.randn(whole.num_params, dtype=F64)
    for _ in range(2):
        call = PRODUCTS[product]
        torch.testing.assert_close(call(parts, w, v), call(whole, w, v), rtol=1e-12, atol=1e-12)
        w = -w  # another weight, which a cached graph must not outlive


@pytest.mark.parametrize(
    ("chunk_steps", "sees_trajectories", "expected"),
    [
        (5, False, [(5, None), (5, None), (2, None)]),
        (1, False, [(1, None)] * 12),
        (12, False, [(12, None)]),
        (5, True, [(4, [0, 0, 3, 3, 4]), (6, [0, 6]), (2, [0, 2, 2])]),  # a trajectory of 6 stays whole
        (1, True, [(3, [0, 0, 3, 3]), (1, [0, 1]), (6, [0, 6]), (2, [0, 2, 2])]),
        (7, True, [(4, [0, 0, 3, 3, 4]), (6, [0, 6]), (2, [0, 2, 2])]),
        (8, True, [(4, [0, 0, 3, 3, 4]), (8, [0, 6, 8, 8])]),
        (100, True, [(12, [0, 0, 3, 3, 4, 10, 12, 12])]),
    ],
)
def test_where_steps_are_cut(chunk_steps, sees_trajectories, expected):
    policy = Recorder(gaussian(), sees_trajectories)
    linear = parl.linearize(policy, trajectories_of(RAGGED), chunk_steps=chunk_steps)
    assert policy.calls[: len(expected)] == expected
    check = policy.calls[len(expected) :]
    assert check and all(call in expected or sees_trajectories for call in check)
    policy.calls.clear()
    linear.jvp_and_hvp(torch.ones(12, dtype=F64), torch.ones(linear.num_params, dtype=F64))
    assert policy.calls == expected


def test_scores_see_one_trajectory_at_a_time_and_cut_a_long_one():
    policy = Recorder(gaussian(), sees_trajectories=False)
    linear = parl.linearize(policy, trajectories_of(RAGGED), chunk_steps=4)
    policy.calls.clear()
    linear.scores()
    assert [steps for steps, _ in policy.calls] == [3, 1, 4, 2, 2]
    policy = Recorder(gaussian(), sees_trajectories=True)
    linear = parl.linearize(policy, trajectories_of(RAGGED), chunk_steps=4)
    policy.calls.clear()
    linear.scores()
    assert policy.calls == [(3, [0, 3]), (1, [0, 1]), (6, [0, 6]), (2, [0, 2])]


@pytest.mark.parametrize("product", ["vjp", "jvp", "jvp_and_hvp", "fisher_vp", "scores"])
def test_one_chunks_graph_is_held_at_a_time(product):
    """Weak references to the log-probabilities, with the garbage collector off: nothing waits for a cycle to be found."""
    policy = Recorder(gaussian(), sees_trajectories=False)
    linear = parl.linearize(policy, trajectories_of((7, 5)), chunk_steps=3)
    w, v = torch.ones(12, dtype=F64), torch.ones(linear.num_params, dtype=F64)
    policy.made.clear()
    policy.most_alive = 0
    gc.disable()
    try:
        PRODUCTS[product](linear, w, v)
        # At the next call the loop has let go of the last chunk, or still holds its output.
        assert policy.most_alive <= 1
        assert not any(ref() is not None for ref in policy.made)
    finally:
        gc.enable()
    assert len(policy.made) >= 4


def test_chunks_are_checked():
    policy, trajectories = gaussian(), trajectories_of((2, 3))
    for bad, error, words in ((0, ValueError, "at least 1, got 0"), (2.5, TypeError, "int or None, got float")):
        with pytest.raises(error, match=words):
            parl.linearize(policy, trajectories, chunk_steps=bad)
        with pytest.raises(error, match=words):
            reward_values(parl.rewards.RewardEnsemble(3, 2).to(F64), trajectories, chunk_steps=bad)


def ragged():
    return st.lists(st.integers(0, 5), max_size=6)


@settings(max_examples=25, deadline=None)
@given(lengths=ragged(), chunk_steps=st.none() | st.integers(1, 8), seed=st.integers(0, 1000))
def test_any_ragged_shape_against_dense_jacobians(lengths, chunk_steps, seed):
    torch.manual_seed(seed)
    policy = parl.policies.CategoricalPolicy(2, 3, hidden=(2,)).to(F64)
    total = sum(lengths)
    offsets = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    trajectories = parl.Trajectories(torch.randn(total, 2, dtype=F64), torch.randint(3, (total,)), offsets)
    params = {name: p.detach() for name, p in policy.named_parameters()}
    theta = nn.utils.parameters_to_vector(params.values())

    def logits(theta):
        pieces = theta.split([p.numel() for p in params.values()])
        state = {name: piece.view(p.shape) for (name, p), piece in zip(params.items(), pieces, strict=True)}
        return functional_call(
            policy.network, {k.removeprefix("network."): p for k, p in state.items()}, trajectories.observations
        )

    def log_prob(theta):
        return logits(theta).log_softmax(-1)[torch.arange(total), trajectories.actions]

    w, v = torch.randn(total, dtype=F64), torch.randn(len(theta), dtype=F64)
    linear = parl.linearize(policy, trajectories, chunk_steps=chunk_steps)
    if total:
        dense = jacrev(log_prob)(theta)
        slopes, probs = jacrev(lambda t: logits(t).log_softmax(-1))(theta), logits(theta).softmax(-1)
        second = hessian(lambda t: log_prob(t) @ w)(theta)
    else:
        dense, slopes, probs = (
            torch.zeros(0, len(v), dtype=F64),
            torch.zeros(0, 3, len(v), dtype=F64),
            torch.zeros(0, 3, dtype=F64),
        )
        second = torch.zeros(len(v), len(v), dtype=F64)
    rows = (w[:, None] * dense).split(lengths) if lengths else ()
    expected = {
        "log_prob": log_prob(theta),
        "vjp": dense.T @ w,
        "jvp": dense @ v,
        "hvp": second @ v,
        "jvp_and_hvp": torch.cat((dense @ v, second @ v)),
        "fisher_vp": torch.einsum("t,ta,tap,taq,q->p", w, probs, slopes, slopes, v),
        "scores": torch.stack([piece.sum(0) for piece in rows]) if lengths else torch.zeros(0, len(v), dtype=F64),
    }
    for name, product in PRODUCTS.items():
        torch.testing.assert_close(product(linear, w, v), expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("chunk_steps", [None, 1, 4, 100])
@pytest.mark.parametrize("kind", ["ensemble", "history"])
def test_rewards_in_chunks(kind, chunk_steps):
    torch.manual_seed(0)
    trajectories = trajectories_of(RAGGED) if kind == "ensemble" else data("gru", RAGGED)
    reward = (parl.rewards.RewardEnsemble(3, 2, (4,)) if kind == "ensemble" else HistoryReward()).to(F64)
    whole = evaluate_reward(reward, trajectories)
    values = reward_values(reward, trajectories, chunk_steps=chunk_steps)
    assert not values.requires_grad
    torch.testing.assert_close(values, whole.detach())
    coefficients, params = torch.randn(12, dtype=F64), list(reward.parameters())
    with torch.no_grad():
        gradient = reward_vjp(reward, trajectories, coefficients, params, chunk_steps=chunk_steps)
    expected = torch.autograd.grad(coefficients @ whole, params)
    torch.testing.assert_close(gradient, torch.cat([g.reshape(-1) for g in expected]))
    with pytest.raises(ValueError, match=r"coefficients must have shape \(T,\) = \(12,\), got \(3,\)"):
        reward_vjp(reward, trajectories, coefficients[:3], params)


@pytest.mark.parametrize("kind", ["ensemble", "history"])
def test_rewards_are_called_on_a_chunk_at_a_time(kind):
    if kind == "ensemble":
        reward, trajectories = parl.rewards.RewardEnsemble(3, 2, (4,)).to(F64), trajectories_of(RAGGED)
        expected = [(5, None), (5, None), (2, None)]
    else:
        reward, trajectories = HistoryReward().to(F64), data("gru", RAGGED)
        expected = [(4, [0, 0, 3, 3, 4]), (6, [0, 6]), (2, [0, 2, 2])]
    calls = []

    def note(module, args, kwargs):
        calls.append((len(args[0]), kwargs["offsets"].tolist() if kwargs else None))

    reward.register_forward_pre_hook(note, with_kwargs=True)
    reward_values(reward, trajectories, chunk_steps=5)
    reward_vjp(reward, trajectories, torch.ones(12, dtype=F64), list(reward.parameters()), chunk_steps=5)
    assert calls == expected * 2


def test_no_steps_have_no_rewards():
    reward, none = HistoryReward().to(F64), data("gru", (0, 0))
    assert evaluate_reward(reward, none).shape == reward_values(reward, none).shape == (0,)
    params = list(reward.parameters())
    assert not reward_vjp(reward, none, torch.zeros(0, dtype=F64), params).any()


def test_a_nan_in_a_later_chunk_is_found_at_its_step():
    class Reward(torch.nn.Module):
        def forward(self, observations, actions):
            return observations[:, 0]

    observations = torch.arange(10.0)[:, None]
    trajectories = parl.Trajectories(observations, observations, torch.tensor([0, 10]))
    trajectories.observations[7] = float("nan")
    with pytest.raises(parl.NonFiniteError, match=r"from step 6 on, must be finite, got nan at index \(1,\)"):
        reward_values(Reward(), trajectories, chunk_steps=3)
