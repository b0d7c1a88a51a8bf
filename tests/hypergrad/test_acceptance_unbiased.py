"""Monte-Carlo estimates of the hypergradient and its factors are unbiased at any batch size.

Two kinds of proof. What is linear in the sample is evaluated on every trajectory of an enumerated MDP alone and averaged
with the exact probabilities, which leaves nothing to chance. What is not (the leave-one-out baseline, the product of b and
C) is drawn many times in batches of 8 and z-tested against its exact value in every coordinate, Bonferroni-corrected to a
false-alarm rate of 1e-6 a test; and the same z-test must see the known bias of sharing one batch among the factors.
"""

from __future__ import annotations

import functools
import itertools
import statistics

import pytest
import torch

import parl_core as parl
from tests.hypergrad.enumerated import DTYPE, Enumerated
from tests.hypergrad.exact_terms import (
    Captured,
    ExactCurvature,
    LogProbOnly,
    cross,
    draw,
    fisher,
    hessian,
    log_prob_hessian,
    pick,
    policy_gradient,
)

FALSE_ALARM_RATE = 1e-6
BATCH = 8
PROBLEMS = {"fixed length": dict(), "ragged": dict(terminal=True)}


@functools.lru_cache
def _setting(name: str, at_optimum: bool = False):
    """An MDP with entropy and L2 in its lower level, a θ (loaded into the policy), its trajectories' probabilities."""
    problem = Enumerated(temperature=0.2, damping=0.05, **PROBLEMS[name])
    generator = torch.Generator().manual_seed(5)
    theta = 0.7 * torch.randn(problem.num_params, generator=generator, dtype=DTYPE)
    if at_optimum:
        theta = problem.solve(problem.reward)
    problem.put(theta)
    return problem, theta, problem.probabilities(theta)


def _vector(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def _upper_loss() -> parl.TrajectoryLoss:
    """U = R_ν² − 2 Σ_h [a_h = 0] − 3: far from centred, so that a baseline matters."""

    def fn(reward, trajectories):
        returns = trajectories.sum_steps(reward(trajectories.observations, trajectories.actions))
        return returns**2 - 2.0 * trajectories.sum_steps((trajectories.actions == 0).to(DTYPE)) - 3.0

    return parl.TrajectoryLoss(fn)


def _all(problem: Enumerated) -> parl.Trajectories:
    return pick(problem, torch.arange(len(problem.dynamics)))


def _upper_values(problem: Enumerated) -> torch.Tensor:
    return _upper_loss().per_sample(problem.reward, _all(problem)).detach()


def _direct(problem: Enumerated, probabilities: torch.Tensor) -> torch.Tensor:
    """(Q,), E[∇_ν U]."""
    losses = _upper_loss().per_sample(problem.reward, _all(problem))
    return torch.autograd.grad(probabilities @ losses, problem.reward.table)[0].reshape(-1)


def _call(problem, lower, upper, curvature, solver, **kwargs) -> parl.Hypergradient:
    return parl.hypergradient(
        problem.policy,
        problem.reward,
        lower,
        upper,
        loss=_upper_loss(),
        discount=problem.discount,
        curvature=curvature,
        solver=solver,
        **kwargs,
    )


def _worst_z(draws: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest |z| over coordinates of the mean of draws (n, K) against exact (K,); infinite for a constant that is off."""
    error = draws.std(dim=0) / len(draws) ** 0.5
    return float(((draws.mean(dim=0) - exact).abs() / error.clamp_min(1e-13)).max())


def _threshold(num_coordinates: int) -> float:
    return statistics.NormalDist().inv_cdf(1.0 - FALSE_ALARM_RATE / (2 * num_coordinates))


def _curvatures(problem: Enumerated, theta: torch.Tensor) -> dict:
    """name -> (curvature, whether the policy gives its Fisher matrix, the exact −H)."""
    lower = dict(temperature=problem.temperature, damping=problem.damping)
    baseline = torch.tensor([0.7, -0.4, 1.1], dtype=DTYPE)
    damped_fisher = problem.temperature * fisher(problem, theta) + problem.damping * torch.eye(len(theta), dtype=DTYPE)
    full = -hessian(problem, theta)
    return {
        "score": (parl.ScoreHessian(**lower), True, full),
        "score, sampled Fisher": (parl.ScoreHessian(**lower), False, full),
        "score, baseline": (parl.ScoreHessian(baseline=baseline, **lower), True, full),
        "log-prob": (parl.LogProbHessian(**lower), True, -log_prob_hessian(problem, theta)),
        "Fisher, analytic": (parl.Fisher(**lower), True, damped_fisher),
        "Fisher, sampled": (parl.Fisher(**lower), False, damped_fisher),
    }


def _product(problem, curvature, analytic: bool, trajectories: parl.Trajectories, v: torch.Tensor) -> torch.Tensor:
    policy = problem.policy if analytic else LogProbOnly(problem.policy)
    linearization = parl.linearize(policy, trajectories)
    rewards = problem.reward(trajectories.observations, trajectories.actions).detach()
    return curvature.operator(linearization, rewards, problem.discount)(v)


CURVATURES = list(_curvatures(*_setting("fixed length")[:2]))


# A tensor baseline is cut at the longest trajectory of the sample, which depends on the policy where lengths do.


@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_curvature_products_have_the_right_expectation_and_are_means(name, kind):
    problem, theta, probabilities = _setting(name)
    curvature, analytic, exact = _curvatures(problem, theta)[kind]
    v = _vector(problem.num_params, 1)
    alone = torch.stack(
        [_product(problem, curvature, analytic, pick(problem, torch.tensor([i])), v) for i in range(len(probabilities))]
    )
    assert (probabilities @ alone - exact @ v).norm() < 1e-12 * (exact @ v).norm()
    assert alone.std(dim=0).norm() > 0.01 * (exact @ v).norm()  # it is the mean that is right, not each
    index = torch.tensor([3, 3, 0, 17, 40, 3, 83, 21])
    batch = _product(problem, curvature, analytic, pick(problem, index), v)
    assert (batch - alone[index].mean(dim=0)).norm() < 1e-12 * batch.norm()


@pytest.mark.parametrize(("name", "kind"), list(itertools.product(PROBLEMS, CURVATURES)))
def test_curvature_products_are_exact_on_the_enumeration(name, kind):
    problem, theta, _ = _setting(name)
    curvature, analytic, exact = _curvatures(problem, theta)[kind]
    v = _vector(problem.num_params, 1)
    product = _product(problem, curvature, analytic, problem.trajectories(theta), v)
    assert (product - exact @ v).norm() < 1e-12 * (exact @ v).norm()


@pytest.mark.parametrize("name", PROBLEMS)
def test_cross_and_direct_terms_have_the_right_expectation_and_are_means(name):
    problem, theta, probabilities = _setting(name)
    w = _vector(problem.num_params, 2)

    def terms(index):
        trajectories = pick(problem, torch.tensor(index))
        # Without baselines: a centred cross term is no mean of single ones (test_variance.py sums over its samples).
        result = _call(problem, trajectories, trajectories, parl.Identity(), Captured(w), baseline=False)
        return torch.stack((result.implicit, result.direct))

    alone = torch.stack([terms([i]) for i in range(len(probabilities))])
    exact = torch.stack((cross(problem, theta).T @ w, _direct(problem, probabilities)))
    mean = torch.einsum("n,nij->ij", probabilities, alone)
    assert ((mean - exact).norm(dim=1) < 1e-12 * exact.norm(dim=1)).all()
    index = [3, 3, 0, 17, 40, 3, 83, 21]
    assert (terms(index) - alone[index].mean(dim=0)).norm() < 1e-12 * exact.norm()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("baseline", [True, False])
def test_right_hand_side_over_every_possible_batch(size, baseline):
    """All N-tuples of an MDP's trajectories, weighed by their probabilities: no chance left, leave-one-out included."""
    problem = Enumerated(states=2, horizon=1 if size == 3 else 2, damping=0.1)
    theta = _vector(problem.num_params, 3)
    problem.put(theta)
    probabilities = problem.probabilities(theta)
    mean = torch.zeros(problem.num_params, dtype=DTYPE)
    for index in itertools.product(range(len(probabilities)), repeat=size):
        batch = pick(problem, torch.tensor(index))
        solver = Captured(torch.zeros_like(theta))
        _call(problem, batch, batch, parl.Identity(), solver, baseline=baseline)
        mean += probabilities[list(index)].prod() * solver.rhs
    exact = policy_gradient(problem, theta, _upper_values(problem))
    assert (mean - exact).norm() < 1e-12 * exact.norm()


@pytest.mark.parametrize("name", PROBLEMS)
def test_factors_drawn_in_batches(name):
    """b, Cᵀw, the direct term and all curvature products from 600 batches of 8, as a user would draw them."""
    problem, theta, probabilities = _setting(name)
    w, v = _vector(problem.num_params, 2), _vector(problem.num_params, 1)
    curvatures = _curvatures(problem, theta)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(600):
        batch = draw(problem, probabilities, BATCH, generator)
        solver = Captured(w)
        result = _call(problem, batch, batch, parl.Identity(), solver)
        products = [
            _product(problem, curvatures[kind][0], curvatures[kind][1], batch, v)
            for kind in ("score, baseline", "log-prob", "Fisher, sampled")
        ]
        rows.append(torch.cat([solver.rhs, result.implicit, result.direct, *products]))
    exact = torch.cat(
        [
            policy_gradient(problem, theta, _upper_values(problem)),
            cross(problem, theta).T @ w,
            _direct(problem, probabilities),
            *(curvatures[kind][2] @ v for kind in ("score, baseline", "log-prob", "Fisher, sampled")),
        ]
    )
    assert _worst_z(torch.stack(rows), exact) < _threshold(len(exact))


def _whole_draws(problem, probabilities, curvature, count: int, *, shared: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    draws = []
    for _ in range(count):
        lower = draw(problem, probabilities, BATCH, generator)
        upper = lower if shared else draw(problem, probabilities, BATCH, generator)
        draws.append(_call(problem, lower, upper, curvature, parl.Dense()).total)
    return torch.stack(draws)


@pytest.mark.parametrize("name", PROBLEMS)
def test_whole_hypergradient_is_unbiased_only_with_independent_batches(name):
    """At θ* with the exact −H, against finite differences of the re-solved problem; one batch for b and C is biased."""
    problem, theta, probabilities = _setting(name, at_optimum=True)

    def loss(reward, probs):
        return probs @ _upper_loss().per_sample(reward, _all(problem))

    exact = problem.finite_differences(loss)
    problem.put(theta)
    curvature = ExactCurvature(-hessian(problem, theta))
    independent = _whole_draws(problem, probabilities, curvature, 1000, shared=False)
    assert _worst_z(independent, exact) < _threshold(len(exact))
    shared = _whole_draws(problem, probabilities, curvature, 1000, shared=True)
    assert _worst_z(shared, exact) > _threshold(len(exact))
