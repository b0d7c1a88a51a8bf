"""The hypergradient against finite differences of a re-solved, exactly enumerated lower level."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import parl_core as parl
from tests.hypergrad.enumerated import DTYPE, Enumerated

TIGHT = parl.CG(rtol=1e-12, max_iterations=500)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def true_utility(problem: Enumerated) -> torch.Tensor:
    """(N,) a fixed utility of each trajectory, unrelated to the learned reward."""
    generator = torch.Generator().manual_seed(99)
    return torch.rand(len(problem.dynamics), generator=generator, dtype=DTYPE)


def utility_loss(problem: Enumerated):
    """U_ν(τ) = −u(τ) + .05 R_ν(τ)²: depends on ν directly and through the policy. Returns the loss and its oracle."""
    utility = true_utility(problem)

    def fn(reward, trajectories):
        returns = trajectories.sum_steps(reward(trajectories.observations, trajectories.actions))
        return -utility + 0.05 * returns**2

    def oracle(reward, probabilities):
        returns = problem.sum_steps(reward(problem.observations, problem.actions))
        return probabilities @ (-utility + 0.05 * returns**2)

    return parl.TrajectoryLoss(fn), oracle


def preference_pairs(problem: Enumerated, theta: torch.Tensor):
    """All ordered pairs of trajectories with their joint probabilities; labels from a hidden utility."""
    number = len(problem.dynamics)
    first, second = (i.reshape(-1) for i in torch.meshgrid(torch.arange(number), torch.arange(number), indexing="ij"))
    utility = true_utility(problem)
    labels = torch.sigmoid(3 * (utility[second] - utility[first]))
    probabilities = problem.probabilities(theta).detach()

    def gather(index):
        lengths = problem.offsets.diff()
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths[index].cumsum(0)))
        steps = torch.cat([torch.arange(problem.offsets[i], problem.offsets[i + 1]) for i in index.tolist()])
        return parl.Trajectories(problem.observations[steps], problem.actions[steps], offsets)

    pairs = parl.PreferencePairs(
        gather(first), gather(second), labels, weights=probabilities[first] * probabilities[second]
    )

    def oracle(reward, probs):
        returns = problem.sum_steps(reward(problem.observations, problem.actions))
        margin = returns[second] - returns[first]
        nll = -(labels * nn.functional.logsigmoid(margin) + (1 - labels) * nn.functional.logsigmoid(-margin))
        return (probs[first] * probs[second]) @ nll

    return pairs, oracle


PROBLEMS = {
    "L2": dict(damping=0.1),
    "entropy": dict(temperature=0.3),
    "entropy and L2": dict(temperature=0.2, damping=0.05),
    "ragged": dict(damping=0.1, terminal=True),
    "ragged, entropy": dict(temperature=0.3, terminal=True),
}


def score_hessian(problem: Enumerated, **kwargs) -> parl.ScoreHessian:
    return parl.ScoreHessian(temperature=problem.temperature, damping=problem.damping, **kwargs)


@functools.lru_cache
def utility_gradient(name: str) -> torch.Tensor:
    problem = Enumerated(**PROBLEMS[name])
    return problem.finite_differences(utility_loss(problem)[1])


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("curvature_baseline", [None, "mean"])
@pytest.mark.parametrize("baseline", [True, False])
def test_utility_matches_finite_differences(name, curvature_baseline, baseline):
    problem = Enumerated(**PROBLEMS[name])
    theta = problem.solve(problem.reward)
    problem.put(theta)
    loss, _ = utility_loss(problem)
    trajectories = problem.trajectories(theta)
    result = parl.hypergradient(
        problem.policy,
        problem.reward,
        trajectories,
        trajectories,
        loss=loss,
        discount=problem.discount,
        curvature=score_hessian(problem, baseline=curvature_baseline),
        solver=TIGHT,
        baseline=baseline,
    )
    expected = utility_gradient(name)
    assert result.solution.status is parl.Status.CONVERGED
    assert relative(result.total, expected) < 1e-6
    assert relative(result.direct, expected) > 0.1  # classical RLHF misses the point here


@pytest.mark.parametrize("solver", [TIGHT, parl.Dense()], ids=["CG", "Dense"])
@pytest.mark.parametrize("options", [PROBLEMS["L2"], PROBLEMS["entropy"], PROBLEMS["ragged"]], ids=str)
def test_preferences_match_finite_differences(options, solver):
    problem = Enumerated(states=2, **options)
    theta = problem.solve(problem.reward)
    problem.put(theta)
    pairs, oracle = preference_pairs(problem, theta)
    result = parl.hypergradient(
        problem.policy,
        problem.reward,
        problem.trajectories(theta),
        pairs,
        loss=parl.PreferenceLoss(),
        discount=problem.discount,
        curvature=score_hessian(problem),
        solver=solver,
    )
    expected = problem.finite_differences(oracle)
    assert relative(result.total, expected) < 1e-6
    assert relative(result.direct, expected) > 1e-3


def test_fisher_matches_finite_differences_at_the_soft_optimum():
    problem = Enumerated(temperature=0.3, observe_time=True)
    theta = problem.solve(problem.reward)
    problem.put(theta)
    loss, oracle = utility_loss(problem)
    trajectories = problem.trajectories(theta)
    result = parl.hypergradient(
        problem.policy,
        problem.reward,
        trajectories,
        trajectories,
        loss=loss,
        discount=problem.discount,
        curvature=parl.Fisher(temperature=0.3),
        solver=TIGHT,
    )
    assert relative(result.total, problem.finite_differences(oracle)) < 1e-6


def implicit_under_shift(problem: Enumerated, curvature, shift: float) -> torch.Tensor:
    theta = problem.solve(problem.reward)
    problem.put(theta)
    loss, _ = utility_loss(problem)

    def fn(reward, trajectories):  # the upper loss itself must not see the shift
        held, reward.shift = reward.shift, 0.0
        try:
            return loss.fn(reward, trajectories)
        finally:
            reward.shift = held

    trajectories = problem.trajectories(theta)
    problem.reward.shift = shift
    try:
        return parl.hypergradient(
            problem.policy,
            problem.reward,
            trajectories,
            trajectories,
            loss=parl.TrajectoryLoss(fn),
            discount=problem.discount,
            curvature=curvature,
            solver=parl.Dense(),
        ).implicit
    finally:
        problem.reward.shift = 0.0


@pytest.mark.filterwarnings("ignore::parl_core.HypergradientWarning")
def test_the_full_hessian_is_invariant_to_a_reward_shift_and_the_printed_form_is_not():
    problem = Enumerated(damping=0.1)
    full, printed = parl.ScoreHessian(damping=0.1), parl.LogProbHessian(damping=0.1)
    for shift in (-5.0, 5.0):
        shifted = implicit_under_shift(problem, full, shift)
        assert relative(shifted, implicit_under_shift(problem, full, 0.0)) < 1e-10
    plain, down, up = (implicit_under_shift(problem, printed, shift) for shift in (0.0, -5.0, 5.0))
    assert torch.cosine_similarity(down, plain, dim=0) < 0  # the sign flips
    assert up.norm() < 0.5 * plain.norm()  # and here it fades


def test_a_baseline_leaves_the_exact_hessian_alone_when_lengths_depend_on_the_policy():
    problem = Enumerated(damping=0.1, terminal=True)
    theta = torch.randn(problem.num_params, generator=torch.Generator().manual_seed(3), dtype=DTYPE)
    problem.put(theta)
    linearization = parl.linearize(problem.policy, problem.trajectories(theta))
    rewards = problem.reward(problem.observations, problem.actions).detach()
    hessian = torch.autograd.functional.hessian(lambda t: problem.value(t, problem.reward), theta)
    for baseline in (None, "mean", torch.tensor([3.0, -2.0, 7.0], dtype=DTYPE)):
        operator = parl.ScoreHessian(baseline=baseline, damping=0.1).operator(linearization, rewards, problem.discount)
        columns = torch.stack([operator(v) for v in torch.eye(problem.num_params, dtype=DTYPE)])
        torch.testing.assert_close(-columns, hessian, rtol=1e-10, atol=1e-12)


def test_regularizer_and_backward_accumulate():
    problem = Enumerated(damping=0.1)
    theta = problem.solve(problem.reward)
    problem.put(theta)
    loss, _ = utility_loss(problem)
    trajectories = problem.trajectories(theta)

    def call(regularizer=None):
        return parl.hypergradient(
            problem.policy,
            problem.reward,
            trajectories,
            trajectories,
            loss=loss,
            discount=problem.discount,
            curvature=score_hessian(problem),
            solver=TIGHT,
            regularizer=regularizer,
        )

    plain, regularized = call(), call(lambda reward: 0.5 * (reward.table**2).sum())
    torch.testing.assert_close(regularized.regularizer, problem.reward.table.detach().reshape(-1))
    torch.testing.assert_close(regularized.total, plain.total + regularized.regularizer)
    assert not plain.regularizer.any()
    problem.reward.table.grad = torch.ones_like(problem.reward.table)
    plain.backward()
    torch.testing.assert_close(problem.reward.table.grad.reshape(-1), 1 + plain.total)
    assert all(p.grad is None for p in problem.policy.parameters())


def test_leave_one_out_baseline_is_unbiased_for_a_sample():
    """E[(U_i − mean of the others) S_i] over independent draws equals E[U S]: exact, by summing over all samples of 3."""
    generator = torch.Generator().manual_seed(0)
    utility = torch.randn(4, generator=generator, dtype=DTYPE)
    score = torch.randn(4, generator=generator, dtype=DTYPE)
    score -= score.mean()  # E[S] = 0, as for a true score
    draws = torch.cartesian_prod(*[torch.arange(4)] * 3)
    uniform = torch.full((3,), 1 / 3, dtype=DTYPE)
    estimates = [(parl.hypergrad.losses.centre(utility[d], uniform, True) * uniform) @ score[d] for d in draws]
    torch.testing.assert_close(torch.stack(estimates).mean(), (utility * score).mean())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(discount=1.5), ValueError, "discount must lie in"),
        (dict(lower=3), TypeError, "lower must be Trajectories"),
        (dict(policy=nn.Linear(2, 2)), TypeError, "log_prob"),
        (dict(loss=parl.PreferenceLoss()), TypeError, "PreferencePairs"),
        (dict(regularizer=lambda reward: reward.table), ValueError, "scalar"),
        (dict(baseline="mean"), TypeError, "baseline must be True, False or a function"),
        (dict(error_probes=1.5), ValueError, "error_probes must be a whole number"),
        (dict(loss=parl.TrajectoryLoss(lambda r, t: torch.ones(t.num_trajectories, 1))), ValueError, r"shape \(N,\)"),
        (dict(curvature=None, estimator=parl.DirectOnly(), folds=3), ValueError, "folds serve a product"),
        (
            dict(curvature=None, estimator=parl.DirectOnly(), x0=torch.zeros(1)),
            ValueError,
            "x0 is the start of a solve",
        ),
        (
            dict(curvature=None, estimator=parl.DirectOnly(), error_probes=1),
            ValueError,
            "error_probes serve a curvature",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    check_refused(change, error, words)


class OwnLoss:
    """A loss of the user's own, with its parts of its own."""

    def __init__(self, losses, parts):
        self.losses, self.parts = losses, parts

    def per_sample(self, reward, data):
        return self.losses

    def trajectories(self, data):
        return self.parts(data)


EVERY = len(Enumerated().dynamics)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(loss=OwnLoss(torch.ones(EVERY, 1), lambda d: (d,))), ValueError, "loss must give real numbers of shape"),
        (dict(loss=OwnLoss(torch.ones(EVERY, dtype=torch.int64), lambda d: (d,))), ValueError, "got torch.int64"),
        (dict(loss=OwnLoss(torch.ones(EVERY), lambda d: ())), ValueError, "at least one Trajectories"),
        (dict(loss=OwnLoss(torch.ones(EVERY), lambda d: (d.select(torch.arange(3)),))), ValueError, "got 3"),
    ],
)
def test_bad_losses_are_named(change, error, words):
    check_refused(change, error, words)


def check_refused(change, error, words):
    problem = Enumerated(damping=0.1)
    trajectories = problem.trajectories(torch.zeros(problem.num_params, dtype=DTYPE))
    arguments = dict(
        policy=problem.policy,
        reward=problem.reward,
        lower=trajectories,
        upper=trajectories,
        loss=utility_loss(problem)[0],
        discount=0.9,
        curvature=parl.ScoreHessian(damping=1.0),
    )
    with pytest.raises(error, match=words):
        parl.hypergradient(**{**arguments, **change})


def test_empty_data_is_refused():
    problem = Enumerated(damping=0.1)
    full = problem.trajectories(torch.zeros(problem.num_params, dtype=DTYPE))
    empty = parl.Trajectories(problem.observations[:0], problem.actions[:0], torch.zeros(1, dtype=torch.int64))
    for name in ("lower", "upper"):
        with pytest.raises(ValueError, match=f"{name} must hold at least one"):
            parl.hypergradient(
                policy=problem.policy,
                reward=problem.reward,
                **{"lower": full, "upper": full, name: empty},
                loss=parl.TrajectoryLoss(lambda r, t: t.sum_steps(r(t.observations, t.actions))),
                discount=0.9,
                curvature=parl.Fisher(0.1),
            )


def test_non_finite_rewards_are_named():
    problem = Enumerated(damping=0.1)
    trajectories = problem.trajectories(torch.zeros(problem.num_params, dtype=DTYPE))
    problem.reward.shift = float("nan")
    with pytest.raises(parl.NonFiniteError, match="reward"):
        parl.hypergradient(
            problem.policy,
            problem.reward,
            trajectories,
            trajectories,
            loss=parl.TrajectoryLoss(lambda r, t: r.table.sum() * torch.ones(t.num_trajectories, dtype=DTYPE)),
            discount=0.9,
            curvature=parl.Fisher(0.1),
        )


def test_works_under_no_grad_and_leaves_no_trace():
    problem = Enumerated(damping=0.1)
    trajectories = problem.trajectories(torch.zeros(problem.num_params, dtype=DTYPE))
    with torch.no_grad():
        result = parl.hypergradient(
            problem.policy,
            problem.reward,
            trajectories,
            trajectories,
            loss=utility_loss(problem)[0],
            discount=0.9,
            curvature=parl.Fisher(0.1, damping=0.1),
        )
    assert result.total.norm() > 0
    assert problem.reward.table.grad is None
    assert not result.total.requires_grad


@pytest.mark.parametrize("scores", [None, "trajectories"])
def test_automatic_damping_follows_its_rule_and_is_reported_with_its_price(scores):
    problem = Enumerated(temperature=0.3, observe_time=True)
    theta = problem.solve(problem.reward)
    problem.put(theta)
    trajectories = problem.trajectories(theta)
    solvers = [TIGHT, parl.Dense(), parl.Woodbury()] if scores else [TIGHT, parl.Dense()]

    def call(damping, solver, error_probes=0):
        return parl.hypergradient(
            problem.policy,
            problem.reward,
            trajectories,
            trajectories,
            loss=utility_loss(problem)[0],
            discount=problem.discount,
            curvature=parl.Fisher(0.3, damping=damping, scores=scores),
            solver=solver,
            error_probes=error_probes,
        )

    exact = call(0.0, parl.Dense())
    for solver in solvers:
        result = call("auto", solver)
        assert result.solution.damping > 0
        spent = result.solution.products - call(result.solution.damping, solver).solution.products
        assert 1 <= spent <= 10  # Lanczos steps
        assert result.solution.cost == pytest.approx(
            call(result.solution.damping, solver).solution.cost + spent * (4 / 3), rel=1e-3
        )
        assert result.solution.status is parl.Status.CONVERGED
        torch.testing.assert_close(result.total, call(result.solution.damping, solver).total)
        assert relative(result.error.damping_bias, result.total - exact.total) < 0.3
        assert result.stderr is None
        same = call(result.solution.damping, solver, error_probes=1)  # the number given
        torch.testing.assert_close(result.error.damping_bias, same.error.damping_bias)
    linearization = parl.linearize(problem.policy, trajectories)
    operator = parl.Fisher(0.3, scores=scores).operator(linearization, trajectories.step_weights, problem.discount)
    rhs = operator(exact.solution.value)
    assert result.solution.damping == pytest.approx(parl.hypergrad.automatic_damping(operator, rhs), rel=1e-6)
    assert exact.error is None


def test_automatic_damping_makes_an_indefinite_lower_level_solvable():
    """Far from its optimum the full Hessian has directions of either sign."""
    problem = Enumerated(temperature=0.1)
    theta = 3.0 * torch.randn(problem.num_params, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    problem.put(theta)
    trajectories = problem.trajectories(theta)

    def call(damping):
        return parl.hypergradient(
            problem.policy,
            problem.reward,
            trajectories,
            trajectories,
            loss=utility_loss(problem)[0],
            discount=problem.discount,
            curvature=parl.ScoreHessian(temperature=0.1, damping=damping),
            solver=parl.CG(),
        )

    for damping in (0.0, "auto"):  # the damping makes it solvable, not an optimum
        with pytest.warns(parl.HypergradientWarning, match="wrong curvature"):
            result = call(damping)
        assert result.solution.negative_curvature
    assert result.solution.status is parl.Status.CONVERGED


@pytest.mark.parametrize("options", [dict(damping=-1.0), dict(damping="some"), dict(scores="actions")])
def test_curvatures_refuse_what_they_do_not_know(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        parl.Fisher(0.1, **options)


@pytest.mark.parametrize("curvature", [parl.ScoreHessian("mean", damping=1.0), parl.Fisher(0.3, damping=0.1)])
def test_chunks_change_nothing(curvature):
    problem = Enumerated(damping=0.1, terminal=True)
    theta = problem.solve(problem.reward)
    problem.put(theta)
    trajectories = problem.trajectories(theta)
    results = [
        parl.hypergradient(
            problem.policy,
            problem.reward,
            trajectories,
            trajectories,
            loss=utility_loss(problem)[0],
            discount=problem.discount,
            curvature=curvature,
            solver=TIGHT,
            error_probes=2,
            chunk_steps=chunk_steps,
        )
        for chunk_steps in (None, 7)
    ]
    for name in ("direct", "implicit", "stderr"):
        torch.testing.assert_close(getattr(results[0], name), getattr(results[1], name))
    assert results[1].solution.cost > results[0].solution.cost > 0


def test_an_estimator_of_ones_own():
    class Half:
        """Half of what another one says."""

        def implicit(self, problem, x0):
            outcome = parl.HPGD(0.3).implicit(problem, x0)
            return parl.hypergrad.estimators.Outcome(0.5 * outcome.implicit)

    problem = Enumerated(temperature=0.3, observe_time=True)
    theta = problem.solve(problem.reward)
    problem.put(theta)
    trajectories = problem.trajectories(theta)
    options = dict(loss=utility_loss(problem)[0], discount=problem.discount)
    arguments = (problem.policy, problem.reward, trajectories, trajectories)
    half = parl.hypergradient(*arguments, estimator=Half(), **options)
    whole = parl.hypergradient(*arguments, estimator=parl.HPGD(0.3), **options)
    torch.testing.assert_close(half.implicit, 0.5 * whole.implicit)
    for wrong, words in (
        (dict(), "one of curvature and estimator, got neither"),
        (dict(estimator=Half(), curvature=parl.Identity()), "got both"),
        (dict(estimator=Half), "got the class"),
        (dict(estimator=3), "method implicit"),
    ):
        with pytest.raises(TypeError, match=words):
            parl.hypergradient(*arguments, **wrong, **options)
