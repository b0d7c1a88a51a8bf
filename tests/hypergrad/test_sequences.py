"""Policies and rewards that see the history, against dense derivatives in float64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import hessian, jacobian

import parl_core as parl
from tests.hypergrad.sequences import F64, POLICIES, HistoryReward, as_function, data, sequence_policy

RAGGED = (3, 0, 1, 4)


@pytest.mark.parametrize("chunk_steps", [None, 1, 4])
@pytest.mark.parametrize("name", POLICIES)
def test_products_match_dense_derivatives(name, chunk_steps):
    policy, trajectories = sequence_policy(name), data(name, RAGGED)
    log_prob, theta = as_function(policy, trajectories)
    dense = jacobian(log_prob, theta)
    linear = parl.linearize(policy, trajectories, chunk_steps=chunk_steps)
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(trajectories.num_steps, generator=generator, dtype=F64)
    v = torch.randn(theta.numel(), generator=generator, dtype=F64)
    second = hessian(lambda t: log_prob(t) @ w, theta)
    torch.testing.assert_close(linear.log_prob, log_prob(theta))
    torch.testing.assert_close(linear.jvp(v), dense @ v)
    torch.testing.assert_close(linear.vjp(w), dense.T @ w)
    torch.testing.assert_close(linear.hvp(w, v), second @ v)
    both = linear.jvp_and_hvp(w, v)
    torch.testing.assert_close(both[0], dense @ v)
    torch.testing.assert_close(both[1], second @ v)
    rows = (w[:, None] * dense).split(trajectories.lengths.tolist())
    torch.testing.assert_close(linear.scores(w), torch.stack([piece.sum(0) for piece in rows]))
    torch.testing.assert_close(linear.fisher_vp(w, v), dense_fisher(name, policy, trajectories, w) @ v)


def dense_fisher(name, policy, trajectories, w):
    """(P, P): from actions taken for the GRU, otherwise over all actions of the policy's own steps."""
    log_prob, theta = as_function(policy, trajectories)
    if name == "gru":
        dense = jacobian(log_prob, theta)
        return dense.T @ (w[:, None] * dense)
    head, _ = as_function(policy, trajectories, "distribution_params")
    probs, slopes = head(theta).softmax(-1), jacobian(lambda t: head(t).log_softmax(-1), theta)  # (T, A), (T, A, P)
    if name.startswith("tokens"):
        slopes = slopes * trajectories.observations[:, 1, None, None]
    return torch.einsum("t,ta,tap,taq->pq", w, probs, slopes, slopes)


@pytest.mark.parametrize("name", ["gru", "transformer", "tokens"])
def test_trajectories_do_not_leak_into_each_other(name):
    policy, trajectories = sequence_policy(name), data(name, RAGGED)
    together = parl.linearize(policy, trajectories).log_prob
    for number, piece in enumerate(together.split(trajectories.lengths.tolist())):
        alone = trajectories.select(torch.tensor([number]))
        torch.testing.assert_close(parl.linearize(policy, alone).log_prob, piece)


@pytest.mark.parametrize("chunk_steps", [None, 2])
def test_no_steps_give_zeros_without_a_call(chunk_steps):
    policy, trajectories = sequence_policy("gru"), data("gru", (0, 0))
    linear = parl.linearize(policy, trajectories, chunk_steps=chunk_steps)
    none, v = torch.zeros(0, dtype=F64), torch.ones(linear.num_params, dtype=F64)
    assert linear.log_prob.shape == linear.jvp(v).shape == (0,)
    assert not linear.vjp(none).any() and not linear.hvp(none, v).any() and not linear.fisher_vp(none, v).any()
    assert linear.scores().shape == (2, linear.num_params) and not linear.scores().any()


@pytest.mark.parametrize("name", ["gru", "transformer", "tokens"])
def test_hypergradient_against_explicit_matrices(name):
    """b, H and C written out as sums over trajectories and steps, with S and ∇² log π from dense derivatives."""
    policy = sequence_policy(name)
    reward = HistoryReward(7 if name == "tokens" else None).to(F64)
    weights = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=F64)
    lower = data(name, RAGGED, weights=weights)
    uniform = torch.full((3,), 1 / 3, dtype=F64)
    first, second = data(name, (2, 1, 3), 2, weights=uniform), data(name, (1, 4, 0), 3, weights=uniform)
    labels = torch.tensor([1.0, 0.0, 1.0], dtype=F64)
    pairs = parl.PreferencePairs(first, second, labels, weights=torch.tensor([0.5, 0.2, 0.3], dtype=F64))
    damping = 5.0
    result = parl.hypergradient(
        policy, reward, lower, pairs, loss=parl.PreferenceLoss(), discount=1.0, baseline=False,
        curvature=parl.ScoreHessian(damping=damping), solver=parl.Dense(),
    )  # fmt: skip

    log_prob, theta = as_function(policy, lower)
    scores, curvatures = jacobian(log_prob, theta), jacobian(lambda t: jacobian(log_prob, t, create_graph=True), theta)
    rewards, nu = as_function(reward, lower, "forward")
    earned = rewards(nu)
    negative = damping * torch.eye(len(theta), dtype=F64)
    prefixes = torch.zeros_like(scores)
    for number, (start, end) in enumerate(zip(lower.offsets[:-1].tolist(), lower.offsets[1:].tolist(), strict=True)):
        for h in range(start, end):
            prefixes[h] = scores[start : h + 1].sum(0)
            inner = torch.outer(prefixes[h], prefixes[h]) + curvatures[start : h + 1].sum(0)
            negative -= weights[number] * earned[h] * inner

    def margin(n):
        return sum(
            sign * part.sum_steps(as_function(reward, part, "forward")[0](n))
            for sign, part in ((1, second), (-1, first))
        )

    def losses(n):
        return -(labels * margin(n).sigmoid().log() + (1 - labels) * (-margin(n)).sigmoid().log())

    sums = []
    for part in (first, second):
        dense = jacobian(as_function(policy, part)[0], theta)
        sums.append(torch.stack([rows.sum(0) for rows in dense.split(part.lengths.tolist())]))
    b = (pairs.weights * losses(nu)) @ (sums[0] + sums[1])
    responses = prefixes @ torch.linalg.solve(negative, b)
    implicit = jacobian(lambda n: (lower.step_weights * rewards(n)) @ responses, nu)
    torch.testing.assert_close(result.direct, jacobian(lambda n: pairs.weights @ losses(n), nu))
    torch.testing.assert_close(result.implicit, implicit)
    assert result.implicit.norm() > 1e-4


def test_preflight_tells_a_policy_with_offsets_that_the_rows_are_one_trajectory():
    seen = []

    class Watched(type(sequence_policy("transformer"))):
        def log_prob(self, observations, actions, offsets):
            seen.append(offsets.tolist())
            return super().log_prob(observations, actions, offsets)

    torch.manual_seed(0)
    policy, given = Watched().to(F64), data("transformer", (5,))
    report = parl.preflight(policy, given.observations, given.actions)
    assert report.called and report.ok, str(report)
    assert seen and all(offsets == [0, 5] for offsets in seen)
    seen.clear()
    assert parl.preflight(policy, given.observations, given.actions, torch.tensor([0, 2, 5])).called
    assert all(offsets == [0, 2, 5] for offsets in seen)
