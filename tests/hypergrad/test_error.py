"""The error estimate against the spread over many samples, and against errors that are known."""

from __future__ import annotations

import pytest
import torch

import parl_core as parl
from parl_core.hypergrad.estimators import error
from tests.hypergrad.enumerated import DTYPE, Enumerated
from tests.hypergrad.systems import F64, CountedBlocks, spd
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


def hadamard(order: int) -> torch.Tensor:
    """(n, n) of orthogonal rows and columns of ±1, n = 2^order (Sylvester)."""
    matrix = torch.ones(1, 1, dtype=torch.int64)
    for _ in range(order):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@pytest.fixture
def every_sign(monkeypatch):
    """Signs with which the sum of squares over 128 probes is exact: each number in the data has a column of its own."""
    table = hadamard(7)

    def install(batches, count):
        """`batches` calls a probe, of `count` signs each."""
        calls = []

        def signs(number, generator):
            probe, batch = divmod(len(calls), batches)
            calls.append(number)
            assert number == count
            return table[probe, 1 + batch * count : 1 + (batch + 1) * count]

        monkeypatch.setattr("parl_core.hypergrad.estimators.error._random_signs", signs)
        monkeypatch.setattr("parl_core.hypergrad.estimators.error._PROBE_RTOL", 1e-12)

    return install


def jackknife(call, batches, count):
    """(R,) standard error of call(*weights) by the infinitesimal jackknife: derivatives in each weight of each batch."""
    uniform, variance = torch.full((count,), 1 / count, dtype=DTYPE), 0.0
    for batch in range(batches):
        for number in range(count):
            ends = []
            for step in (1e-5, -1e-5):
                weights = [uniform.clone() for _ in range(batches)]
                weights[batch] = uniform + step * (torch.eye(count, dtype=DTYPE)[number] - uniform)
                ends.append(call(*weights))
            variance = variance + ((ends[0] - ends[1]) / 2e-5 / count) ** 2
    return (variance * count / (count - 1)).sqrt()


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("shared", [False, True], ids=["independent", "one batch"])
@pytest.mark.parametrize("name", [*PROBLEMS, "Identity"])
def test_the_standard_error_is_that_of_the_jackknife_in_every_coordinate(every_sign, name, shared, baseline):
    """The two differ by the leave-one-out factors, (N − 1)/N each."""
    options, curvature = PROBLEMS.get(name, (dict(damping=0.3), parl.Identity()))
    sampled, generator, count = Sampled(**options), torch.Generator().manual_seed(0), 40
    upper, index = sampled.draw(count, generator)
    lower, cross = (upper, upper) if shared else (sampled.draw(count, generator)[0] for _ in range(2))
    chosen = dict(curvature=curvature, solver=parl.CG(rtol=1e-12, max_iterations=500), baseline=baseline)
    every_sign(1 if shared else 3, count)
    result = sampled.call(lower, upper, index, cross=None if shared else cross, error_probes=128, **chosen)

    def total(*weights):
        if shared:
            data = upper.with_weights(weights[0])
            return sampled.call(data, data, index, **chosen).total
        u, low, c = (data.with_weights(w) for data, w in zip((upper, lower, cross), weights, strict=True))
        return sampled.call(low, u, index, cross=c, **chosen).total

    expected = jackknife(total, 1 if shared else 3, count)
    torch.testing.assert_close(result.stderr, expected, rtol=0.08, atol=0.02 * float(expected.max()))


def test_one_object_in_two_roles_has_the_same_signs(every_sign):
    """Pairs whose second segment is empty have the loss of single trajectories: both forms have the same error."""
    sampled, generator, count = Sampled(damping=0.3), torch.Generator().manual_seed(0), 40
    data, _ = sampled.draw(count, generator)
    none = data.select(torch.zeros(0, dtype=torch.int64))
    empty = parl.Trajectories(none.observations, none.actions, torch.zeros(count + 1, dtype=torch.int64))

    def softplus(reward, trajectories):  # the loss of a pair whose second return is zero and whose label is 0
        returns = trajectories.sum_steps(reward(trajectories.observations, trajectories.actions))
        return torch.nn.functional.softplus(-returns)

    results = []
    for upper, loss in (
        (data, parl.TrajectoryLoss(softplus)),
        (parl.PreferencePairs(data, empty, torch.zeros(count, dtype=DTYPE)), parl.PreferenceLoss()),
    ):
        every_sign(1, count)
        results.append(
            parl.hypergradient(
                sampled.problem.policy,
                sampled.problem.reward,
                data,
                upper,
                loss=loss,
                discount=0.9,
                curvature=parl.ScoreHessian(damping=0.3),
                error_probes=128,
            )
        )
    torch.testing.assert_close(results[0].total, results[1].total)
    torch.testing.assert_close(results[0].stderr, results[1].stderr)


def test_one_trajectory_tells_no_standard_error():
    sampled, generator = Sampled(damping=0.3), torch.Generator().manual_seed(0)
    upper, index = sampled.draw(20, generator)
    lower, _ = sampled.draw(1, generator)
    result = sampled.call(lower, upper, index, curvature=parl.Fisher(0.1, damping=0.3), error_probes=2)
    assert result.stderr.isnan().all()


def test_the_standard_error_of_importance_weights_is_that_of_their_sum():
    """A gradient that is the same for every sample, with weights p/q/n: the estimate varies as their sum does."""
    sampled, generator, count = Sampled(damping=0.3), torch.Generator().manual_seed(0), 100
    sums, errors = [], []
    for _ in range(60):
        data, _ = sampled.draw(count, generator)
        weights = (0.2 + 1.6 * torch.rand(count, generator=generator, dtype=DTYPE)) / count
        data = data.with_weights(weights)
        result = parl.hypergradient(
            sampled.problem.policy,
            sampled.problem.reward,
            data,
            data,
            loss=parl.TrajectoryLoss(lambda r, t: r.table.sum() * torch.ones(t.num_trajectories, dtype=DTYPE)),
            discount=0.9,
            curvature=parl.Fisher(0.1, damping=0.1),
            error_probes=4,
        )
        sums.append(result.total[0])
        errors.append(result.stderr[0])
    # 60 sums, 240 probes: the ratio has a relative standard deviation of 10%; 4 sigma is a false alarm in 10⁴.
    assert 0.6 < torch.stack(errors).square().mean().sqrt() / torch.stack(sums).std() < 1.4


def test_a_solver_of_ones_own_sees_flat_vectors_and_a_policy_need_not_be_copied():
    problem = Enumerated(temperature=0.3, damping=0.1)
    theta = problem.solve(problem.reward)

    def solver(operator, rhs, x0=None):
        assert rhs.dim() == 1
        return parl.CG(rtol=1e-12)(operator, rhs, x0)

    curvature = parl.ScoreHessian(temperature=0.3, damping=0.1)
    expected = exact_call(problem, theta, curvature=curvature, error_probes=3)
    problem.policy.last = problem.policy.log_prob(problem.observations, problem.actions)  # no deepcopy of this
    result = exact_call(problem, theta, curvature=curvature, solver=solver, error_probes=3)
    for name in ("stderr", "damping_bias", "lower_bias"):
        found, own = getattr(result.error, name), getattr(expected.error, name)
        torch.testing.assert_close(found, own, rtol=0.1, atol=1e-6)


def exact_call(problem, theta, **options):
    problem.put(theta)
    trajectories = problem.trajectories(theta)
    options = dict(error_probes=1, solver=parl.CG(rtol=1e-12, max_iterations=500)) | options
    return parl.hypergradient(
        problem.policy,
        problem.reward,
        trajectories,
        trajectories,
        loss=utility_loss(problem)[0],
        discount=problem.discount,
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
        "effect of the damping",
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


def test_a_newton_step_that_is_far_too_long_still_gives_a_number():
    """An untrained policy and little damping, in float32: a whole step would overflow the density ratios."""
    torch.manual_seed(1)
    policy = parl.policies.GaussianPolicy(3, 2, hidden=(16,))
    reward = parl.rewards.RewardEnsemble(3, 2, hidden=(16,))

    def data(number):
        observations = torch.randn(10 * number, 3)
        return parl.Trajectories(observations, policy.sample(observations)[0], torch.arange(0, 10 * number + 1, 10))

    result = parl.hypergradient(
        policy,
        reward,
        data(32),
        parl.PreferencePairs(data(8), data(8), torch.randint(2, (8,)).float()),
        loss=parl.PreferenceLoss(),
        discount=0.99,
        curvature=parl.Fisher(0.1, damping=0.01),
        solver=parl.CG(rtol=1e-3, max_iterations=500),
        error_probes=2,
    )
    assert torch.isfinite(result.error.lower_bias).all()
    assert result.error.lower_bias.norm() > result.total.norm()


def test_pcg_gets_its_right_hand_sides_as_one_block():
    matrix, _ = spd(5)
    operator, rows = CountedBlocks(matrix), torch.eye(3, 5, dtype=F64)
    found, _ = error._solve(parl.PCG(rtol=1e-10), operator, rows)
    torch.testing.assert_close(found @ matrix, rows, rtol=0.0, atol=1e-8)
    assert operator.shapes[0] == (3, 5)
