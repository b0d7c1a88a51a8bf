"""The error estimate against the spread over many samples, and against errors that are known."""

from __future__ import annotations

import pytest
import torch

import parl_core as parl
from tests.hypergrad.enumerated import DTYPE, Enumerated
from tests.hypergrad.test_estimators import relative, utility_loss
from tests.hypergrad.test_variance import Sampled

PROBLEMS = {
    "full Hessian": (dict(damping=0.3), parl.ScoreHessian(damping=0.3)),
    "Fisher, time observed": (
        dict(temperature=0.3, observe_time=True, states=2),
        parl.Fisher(0.3, damping=1e-2),
    ),
    "ragged, entropy": (
        dict(temperature=0.3, damping=0.1, terminal=True),
        parl.ScoreHessian("mean", temperature=0.3, damping=0.1),
    ),
}


@pytest.mark.parametrize("shared", [False, True], ids=["independent", "one batch"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_standard_error_is_the_spread_over_samples(name, shared):
    """80 samples of 200 trajectories. The ratio of the two lengths has a relative standard deviation below
    1/√(2·80) = 8%, and the delta method at this size is off by a few percent: 4 sigma, a false alarm in 10⁴."""
    options, curvature = PROBLEMS[name]
    sampled = Sampled(**options)
    generator = torch.Generator().manual_seed(1)
    totals, variances = [], []
    for _ in range(80):
        upper, index = sampled.draw(200, generator)
        lower = upper if shared else sampled.draw(200, generator)[0]
        result = sampled.call(lower, upper, index, curvature=curvature, solver=parl.CG(), error_probes=4)
        totals.append(result.total)
        variances.append(result.stderr.square())
    found = torch.stack(variances).mean(0).sum().sqrt()
    actual = torch.stack(totals).var(0).sum().sqrt()
    assert 0.67 < found / actual < 1.4


def exact_call(problem, theta, **options):
    problem.put(theta)
    trajectories = problem.trajectories(theta)
    options = dict(error_probes=1) | options
    return parl.hypergradient(
        problem.policy,
        problem.reward,
        trajectories,
        trajectories,
        loss=utility_loss(problem)[0],
        discount=problem.discount,
        solver=parl.CG(rtol=1e-12, max_iterations=500),
        **options,
    )


@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_the_bias_of_an_unconverged_lower_level_is_found_to_first_order(temperature):
    problem = Enumerated(temperature=temperature, damping=0.2)
    optimum = problem.solve(problem.reward)
    away = torch.randn(optimum.shape, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    curvature = parl.ScoreHessian(temperature=temperature, damping=0.2)
    exact = exact_call(problem, optimum, curvature=curvature)
    assert exact.error.lower_bias.norm() < 1e-6 * exact.total.norm()
    for distance, tolerance in ((0.003, 0.03), (0.03, 0.15), (0.3, 0.7)):
        result = exact_call(problem, optimum + distance * away, curvature=curvature)
        actual = result.total - exact.total
        assert relative(result.error.lower_bias, actual) < tolerance


def test_the_bias_of_the_damping_is_found_to_first_order():
    problem = Enumerated(temperature=0.3, observe_time=True)
    theta = problem.solve(problem.reward)
    exact = exact_call(problem, theta, curvature=parl.Fisher(0.3)).total
    for damping, tolerance in ((1e-5, 0.02), (1e-4, 0.1)):
        result = exact_call(problem, theta, curvature=parl.Fisher(0.3, damping=damping))
        assert relative(result.error.damping_bias, result.total - exact) < tolerance


@pytest.mark.filterwarnings("ignore::parl_core.HypergradientWarning")
def test_a_failed_solve_leaves_no_number_behind():
    """The operator is NaN, so is every estimate that goes through it."""

    class Broken:
        damping = 0.1

        def operator(self, linearization, rewards, discount, weights=None):
            whole = parl.Fisher(0.1).operator(linearization, rewards, discount, weights)
            return parl.hypergrad.CurvatureOperator(lambda v: whole.product(v) * float("nan"), whole.size, 0.1, 0.0)

    problem = Enumerated(temperature=0.3)
    result = exact_call(problem, problem.solve(problem.reward), curvature=Broken())
    assert result.solution.status is parl.Status.NON_FINITE_OPERATOR
    for name in ("stderr", "damping_bias", "lower_bias"):
        assert getattr(result.error, name).isnan().all()
    assert "nan" in result.summary()


def test_nothing_is_estimated_unless_asked_and_the_summary_says_what_was():
    problem = Enumerated(temperature=0.3, damping=0.1)
    theta = problem.solve(problem.reward)
    curvature = parl.ScoreHessian(temperature=0.3, damping=0.1)
    result = exact_call(problem, theta, curvature=curvature)
    summary = result.summary()
    for words in (
        "direct",
        "implicit",
        "standard error",
        "bias of the damping",
        "bias of the lower level",
        "CONVERGED",
    ):
        assert words in summary
    result = exact_call(problem, theta, curvature=curvature, error_probes=0)
    assert (result.error, result.stderr) == (None, None)
    assert "standard error" not in result.summary()
    for probes, estimator, words in ((-1, None, "at least 0"), (1, parl.DirectOnly(), "not the estimator DirectOnly")):
        chosen = {} if estimator else {"curvature": curvature}
        with pytest.raises(ValueError, match=words):
            parl.hypergradient(
                problem.policy,
                problem.reward,
                problem.trajectories(theta),
                problem.trajectories(theta),
                loss=utility_loss(problem)[0],
                discount=0.9,
                estimator=estimator,
                error_probes=probes,
                **chosen,
            )
