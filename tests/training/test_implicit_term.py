"""What A-PARL adds to the reward gradient, step by step."""

from __future__ import annotations

import pytest
import torch

import parl_core as parl
from parl_core.models.policies import GaussianPolicy
from parl_core.models.rewards import RewardEnsemble
from parl_core.training.config import ImplicitConfig
from parl_core.training.implicit_term import ImplicitTerm

DAMPING_RATIO = 2.0
TEMPERATURE = 0.1


def setting():
    torch.manual_seed(0)
    policy, reward = GaussianPolicy(3, 2, (4,), squash=True), RewardEnsemble(3, 2, (5,), members=2)

    def windows(number: int) -> parl.Trajectories:
        steps = number * 5
        offsets = torch.arange(0, steps + 1, 5)
        return parl.Trajectories(torch.randn(steps, 3), torch.rand(steps, 2) * 1.8 - 0.9, offsets)

    return (
        policy,
        reward,
        windows(6),
        parl.PreferencePairs(windows(4), windows(4), torch.tensor([0.0, 1, 1, 0])),
    )


def expected_implicit(policy, reward, lower, upper) -> torch.Tensor:
    result = parl.hypergradient(
        policy,
        reward,
        lower,
        upper,
        loss=parl.PreferenceLoss(),
        discount=0.9,
        curvature=parl.Fisher(TEMPERATURE, damping=DAMPING_RATIO * TEMPERATURE),
        solver=parl.CG(rtol=1e-5, max_iterations=200),
    )
    return 2 * result.implicit  # two members


def hook_of(**changes):
    policy, reward, lower, upper = setting()
    options = dict(damping_ratio=DAMPING_RATIO, rtol=1e-5, max_iterations=200, max_ratio=1e9)
    term = ImplicitTerm(ImplicitConfig(**{**options, **changes}), discount=0.9)
    return term, term.gradient_hook(policy, reward, lower, upper, TEMPERATURE), (policy, reward, lower, upper)


def test_the_term_is_the_public_hypergradients():
    term, hook, data = hook_of(share=0.5)
    gradient = torch.randn(sum(p.numel() for p in data[1].parameters()))
    torch.testing.assert_close(hook(gradient) - gradient, 0.5 * expected_implicit(*data), rtol=1e-3, atol=1e-4)
    report = term.report()
    assert report is not None
    assert report.solver_residual <= 2e-5  # rtol, or the rounding of float32
    assert report.solver_iterations >= 1
    assert report.unconverged_solves == 0


def test_solves_that_do_not_converge_are_counted():
    term, hook, data = hook_of(max_iterations=1, rtol=1e-6, refresh_interval=1)
    for _ in range(3):
        hook(torch.ones(sum(p.numel() for p in data[1].parameters())))
    report = term.report()
    assert report is not None
    assert report.unconverged_solves >= 1
    assert report.solver_residual > 1e-6


def test_a_long_term_is_shortened_to_the_ratio():
    _, hook, data = hook_of(max_ratio=0.25)
    gradient = torch.randn(sum(p.numel() for p in data[1].parameters())) * 1e-3
    added = hook(gradient) - gradient
    assert float(added.norm() / gradient.norm()) == pytest.approx(0.25, rel=1e-3)
    assert float(torch.cosine_similarity(added, expected_implicit(*data), dim=0)) > 0.999


def test_it_is_refreshed_on_schedule_and_warm_started():
    term, hook, data = hook_of(refresh_interval=3)
    gradient = torch.zeros(sum(p.numel() for p in data[1].parameters())) + 1.0
    first = hook(gradient)
    with torch.no_grad():
        for parameter in data[1].parameters():
            parameter.mul_(1.5)
    assert torch.equal(hook(gradient), first)
    assert torch.equal(hook(gradient), first)
    assert not torch.equal(hook(gradient), first)
    same = ImplicitTerm(term.config, discount=0.9)
    same.load_state_dict(term.state_dict())
    same.gradient_hook(*data, TEMPERATURE)(gradient)
    report = same.report()
    assert report is not None
    assert report.solver_iterations <= 1  # the solution is already there


def test_a_session_without_steps_reports_nothing():
    assert ImplicitTerm(ImplicitConfig(), discount=0.9).report() is None
