"""check_hypergradient leaves everything as it was, whatever the caller's functions do, and refuses what it could not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import parl_core as parl
from tests.hypergrad.test_check import by_name
from tests.hypergrad.test_check_problems import contextual_bandit

F64 = torch.float64


def snapshot(problem):
    tensors = [*problem.policy.parameters(), *problem.policy.buffers(), *problem.reward.parameters()]
    return [t.detach().clone() for t in tensors]


def test_modes_flags_and_gradients_are_left_as_the_same_objects():
    problem = contextual_bandit()
    newton, policy, reward = problem.solve, problem.policy, problem.reward
    policy.frozen = nn.Parameter(torch.ones(1, dtype=F64), requires_grad=False)
    policy.dropout = nn.Dropout()
    policy.dropout.eval()
    slope = torch.full_like(policy.weight, 2.0)
    policy.weight.grad = slope
    calls = policy.calls

    def rough(policy, reward, nudge):
        policy.eval()
        policy.dropout.train()
        reward.requires_grad_(False)
        policy.requires_grad_(True)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        optimizer.zero_grad(set_to_none=False)
        (policy.weight.sum() + policy.frozen.sum()).backward()
        optimizer.step()
        newton(policy, reward, nudge)
        policy.calls = policy.calls + 1

    before = [policy.weight, policy.frozen, reward.weight]
    table = parl.check_hypergradient(dataclasses.replace(problem, solve=rough))
    assert by_name(table)["ScoreHessian"].relative_error < 1e-6
    assert policy.training and not policy.dropout.training
    assert all(a is b for a, b in zip(before, [policy.weight, policy.frozen, reward.weight], strict=True))
    assert [p.requires_grad for p in before] == [True, False, True]
    assert policy.weight.grad is slope and (slope == 2.0).all()
    assert policy.frozen.grad is None and policy.frozen.item() == 1.0
    assert policy.calls is calls and calls.item() == 0


def test_a_solve_that_adds_a_layer_is_refused_and_the_layer_removed():
    problem = contextual_bandit()
    with pytest.raises(ValueError, match=r"'extra\.weight' is another object"):
        parl.check_hypergradient(
            dataclasses.replace(problem, solve=lambda policy, *_: setattr(policy, "extra", nn.Linear(1, 1)))
        )
    assert [name for name, _ in problem.policy.named_parameters()] == ["weight"]


@pytest.mark.parametrize("role", ["policy", "reward"])
def test_a_solve_that_replaces_a_parameter_is_refused(role):
    """A new object would escape the check, which writes into the parameters it was given."""
    problem = contextual_bandit()
    newton = problem.solve

    def replacing(policy, reward, nudge):
        newton(policy, reward, nudge)
        module = {"policy": policy, "reward": reward}[role]
        module.weight = nn.Parameter(module.weight.detach().clone())

    before, values = [problem.policy.weight, problem.reward.weight], snapshot(problem)
    with pytest.raises(ValueError, match=f"solve must write into the parameters of {role}.*'weight' is another object"):
        parl.check_hypergradient(dataclasses.replace(problem, solve=replacing))
    assert all(a is b for a, b in zip(before, [problem.policy.weight, problem.reward.weight], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values, snapshot(problem), strict=True))


def test_everything_is_left_as_it_was():
    problem = contextual_bandit()
    newton = problem.solve

    def careless(policy, reward, nudge):
        newton(policy, reward, nudge)
        (policy.weight.sum() + reward.weight.sum()).backward()

    problem.solve = careless
    problem.policy.weight.grad = torch.ones_like(problem.policy.weight)
    before, state = snapshot(problem), torch.get_rng_state()
    parl.check_hypergradient(problem)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(problem), strict=True))
    assert torch.equal(problem.policy.weight.grad, torch.ones_like(problem.policy.weight))
    assert problem.reward.weight.grad is None
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("at", [1, 2, 7])
def test_everything_is_left_as_it_was_when_a_solve_raises(at):
    problem = contextual_bandit()
    newton, count = problem.solve, 0

    def failing(policy, reward, nudge):
        nonlocal count
        newton(policy, reward, nudge)
        count += 1
        if count == at:
            reward.requires_grad_(False)
            raise RuntimeError("the cluster is down")

    problem.solve = failing
    before = snapshot(problem)
    with pytest.raises(RuntimeError, match="the cluster is down"):
        parl.check_hypergradient(problem)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(problem), strict=True))
    assert problem.reward.weight.requires_grad


def test_bilevel_parameters_are_left_as_they_were_by_a_solve_in_place():
    game = parl.LinearQuadraticGame()
    inner = game.solve

    def in_place(x, y):
        y["y"].copy_(inner(x, y)["y"])
        x["x"].zero_()
        return y

    game.solve = in_place
    before = game.upper_params["x"].clone()
    assert by_name(parl.check_hypergradient(game))["CG"].relative_error < 1e-8
    assert torch.equal(game.upper_params["x"], before)
    assert not game.lower_params["y"].any()
