"""What the theory of PARL promises, seen on enumerated MDPs with exact gradients: Lemma 1, bias and rate of A-PARL, and what
the implicit term buys.

Source of the claims: Chakraborty et al., ICLR 2024. All problems are 3 states, 2 actions, 3 steps, with entropy and L2 in
the lower level; nothing here is random but fixed draws of problems.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import parl_core as parl
from tests.hypergrad.enumerated import DTYPE, Enumerated
from tests.hypergrad.exact_terms import hessian

HORIZON = 3
SOLVER = parl.CG(rtol=1e-10, max_iterations=100)
RATE = 1.0  # upper learning rate
LOWER_STEPS = 5  # K


def _problem(seed: int) -> Enumerated:
    return Enumerated(seed, temperature=0.3, damping=0.05)


def _designer_loss(problem: Enumerated) -> tuple[parl.TrajectoryLoss, Tensor]:
    """U = −Σ_h t(s_h, a_h) + .05 R_ν² for a true reward t that is not the learned one; and Σ_h t of each trajectory (N,)."""
    table = torch.randn(problem.reward.table.shape, generator=torch.Generator().manual_seed(99), dtype=DTYPE)

    def true_reward(observations, actions):
        return (observations @ table).gather(-1, actions.reshape(-1, 1)).squeeze(-1)

    def fn(reward, trajectories):
        returns = trajectories.sum_steps(reward(trajectories.observations, trajectories.actions))
        true_returns = trajectories.sum_steps(true_reward(trajectories.observations, trajectories.actions))
        return -true_returns + 0.05 * returns**2

    return parl.TrajectoryLoss(fn), problem.sum_steps(true_reward(problem.observations, problem.actions))


def _hypergradient(problem: Enumerated, theta: Tensor, loss: parl.TrajectoryLoss) -> parl.Hypergradient:
    """At θ, optimal or not, from all trajectories with their probabilities."""
    problem.put(theta)
    trajectories = problem.trajectories(theta)
    return parl.hypergradient(
        problem.policy,
        problem.reward,
        trajectories,
        trajectories,
        loss=loss,
        discount=problem.discount,
        curvature=parl.ScoreHessian(temperature=problem.temperature, damping=problem.damping),
        solver=SOLVER,
    )


def _ascend(problem: Enumerated, theta: Tensor, steps: int, step_size: float = 1.0) -> Tensor:
    for _ in range(steps):
        theta = theta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.value(theta, problem.reward), theta)
        theta = (theta + step_size * gradient).detach()
    return theta


def _move_reward(problem: Enumerated, gradient: Tensor, rate: float) -> None:
    with torch.no_grad():
        problem.reward.table -= rate * gradient.view_as(problem.reward.table)


def _true_squared_norm(problem: Enumerated, near: Tensor, loss: parl.TrajectoryLoss) -> float:
    """‖∇L(ν)‖², at the lower level's optimum."""
    return float(_hypergradient(problem, problem.solve(problem.reward, near), loss).total.square().sum())


def _slope_and_fit(x, y) -> tuple[float, float]:
    """Least-squares slope of y against x, and R²."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(1.0 - np.var(y - slope * x - intercept) / np.var(y))


def _divergences(p: Tensor, q: Tensor) -> dict[str, float]:
    mixture = 0.5 * (p + q)
    js = 0.5 * (p * (p / mixture).log()).sum() + 0.5 * (q * (q / mixture).log()).sum()
    return {
        "total variation": float(0.5 * (p - q).abs().sum()),
        "squared Hellinger": float(1.0 - (p * q).sqrt().sum()),
        "Jensen-Shannon": float(js),
        "chi-squared": float(((p - q) ** 2 / q).sum()),
    }


BOUNDED = ("total variation", "squared Hellinger", "Jensen-Shannon")


def _draws(size: float):
    """Divergences between ρ(θ*) and ρ(θ* + Δ), ‖Δ‖ = size: random directions, and the one that ρ feels most."""
    for seed in range(4):
        problem = _problem(seed)
        theta = problem.solve(problem.reward)
        scores = torch.autograd.functional.jacobian(
            lambda t, p=problem: p.probabilities(t).log(), theta, vectorize=True
        )
        fisher = scores.T @ (problem.probabilities(theta)[:, None] * scores)
        random = torch.randn(10, problem.num_params, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)
        for direction in (*random, torch.linalg.eigh(fisher).eigenvectors[:, -1]):
            moved = theta + size * direction / direction.norm()
            yield _divergences(problem.probabilities(theta), problem.probabilities(moved))


@pytest.mark.parametrize("size", [1e-2, 0.1, 1.0, 3.0, 10.0, 30.0])
def test_lemma_1(size):
    """D_f(ρ(θ*), ρ(θ)) ≤ (H L/2)‖θ − θ*‖ with L = 2: logits are W[a, s] + b[a], so ‖∇ log π(a|s)‖² = 2‖e_a − π(s)‖² ≤ 4."""
    bound = HORIZON * 2.0 / 2.0 * size
    for divergences in _draws(size):
        for name in BOUNDED:
            assert divergences[name] <= bound, name


def test_lemma_1_does_not_hold_for_chi_squared():
    bound = HORIZON * 2.0 / 2.0
    assert np.mean([divergences["chi-squared"] > 10.0 * bound for divergences in _draws(10.0)]) > 0.5
    assert all(divergences["chi-squared"] < 0.1 * bound for divergences in _draws(0.1))  # small steps hide it


def test_lemma_1_cannot_be_sharpened():
    """One state, two actions, one step, θ* uniform: scores along ±Δ have norm 1 at θ*, and TV ≈ ½‖Δ‖ = H L/2 ‖Δ‖."""
    problem = Enumerated(states=1, horizon=1)
    uniform = torch.zeros(problem.num_params, dtype=DTYPE)
    direction = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=DTYPE) / 2.0  # W[0], W[1], b[0], b[1]
    ratios = []
    for size in (1e-3, 0.1, 1.0, 10.0):
        found = _divergences(problem.probabilities(uniform), problem.probabilities(size * direction))
        assert found["total variation"] == pytest.approx(0.5 * math.tanh(size), rel=1e-9)
        ratios.append(found["total variation"] / (0.5 * size))
    assert 0.999 < ratios[0] <= 1.0 and max(ratios) <= 1.0


@pytest.mark.parametrize("seed", range(3))
def test_bias_decays_geometrically_in_the_lower_steps(seed):
    """Error of the hypergradient at θ^K against K, from a fixed start; the rate is that of gradient ascent, 1 − η μ."""
    problem = _problem(seed)
    loss, _ = _designer_loss(problem)
    optimum = problem.solve(problem.reward)
    exact = _hypergradient(problem, optimum, loss).total
    eigenvalues = torch.linalg.eigvalsh(-hessian(problem, optimum))
    step_size = 0.5 / float(eigenvalues[-1])
    felt = float(
        eigenvalues[eigenvalues > 1.001 * problem.damping][0]
    )  # gradients never leave the shift-invariant space

    steps = np.arange(20, 121, 10)
    theta, errors = torch.zeros_like(optimum), []
    for at in steps:
        theta = _ascend(problem, theta, at if at == steps[0] else 10, step_size)
        errors.append(float((_hypergradient(problem, theta, loss).total - exact).norm() / exact.norm()))
    slope, fit = _slope_and_fit(steps, np.log(errors))
    assert errors[0] < 0.1 and errors[-1] < 1e-6 * errors[0]
    assert fit > 0.995
    assert slope == pytest.approx(math.log(1.0 - step_size * felt), rel=0.15)


@pytest.mark.parametrize("seed", range(2))
def test_a_parl_converges_at_rate_one_over_t(seed):
    """Warm-started A-PARL with exact gradients: T·mean‖∇L‖² is bounded over two decades of T."""
    problem = _problem(seed)
    loss, _ = _designer_loss(problem)
    theta = torch.zeros(problem.num_params, dtype=DTYPE)
    squares = []
    for _ in range(300):
        theta = _ascend(problem, theta, LOWER_STEPS)
        squares.append(_true_squared_norm(problem, theta, loss))
        _move_reward(problem, _hypergradient(problem, theta, loss).total, RATE)
    totals = np.cumsum(squares)
    horizons = np.array([3, 6, 15, 30, 60, 150, 300])
    slope, _ = _slope_and_fit(np.log(horizons), np.log(totals[horizons - 1] / horizons))
    assert slope < -0.9
    assert totals[-1] < 1.5 * totals[2]
    assert totals[-1] < 1.1 * totals[29]


def test_too_few_lower_steps_leave_a_floor_that_falls_geometrically():
    """The theorem's other term, O(η^K): each upper step's lower level starts anew from θ = 0 and gets K steps."""
    lower_steps, floors = [2, 4, 6, 8, 10], []
    for steps in lower_steps:
        problem = _problem(0)
        loss, _ = _designer_loss(problem)
        for _ in range(120):
            theta = _ascend(problem, torch.zeros(problem.num_params, dtype=DTYPE), steps)
            _move_reward(problem, _hypergradient(problem, theta, loss).total, 3.0)
        floors.append(_true_squared_norm(problem, theta, loss))
    slope, fit = _slope_and_fit(lower_steps, np.log(floors))
    assert slope < -0.3 and fit > 0.95


def _designer_value(problem: Enumerated, near: Tensor, true_returns: Tensor) -> float:
    """L(ν) at the lower level's optimum."""
    probabilities = problem.probabilities(problem.solve(problem.reward, near))
    with torch.no_grad():
        returns = problem.sum_steps(problem.reward(problem.observations, problem.actions))
        return float(probabilities @ (-true_returns + 0.05 * returns**2))


def _train(seed: int, rate: float, budget: float, *, implicit: bool) -> list[float]:
    """Upper losses along the way, the start first; `budget` in gradients of the policy's log-probabilities.

    A lower step, the direct term and b cost 1 each, Cᵀw 3 (a JVP by double backward and a backward pass through the reward),
    and each product with the curvature 3 (a double backward and a VJP).
    """
    problem = _problem(seed)
    loss, true_returns = _designer_loss(problem)
    theta = torch.zeros(problem.num_params, dtype=DTYPE)
    losses, spent = [_designer_value(problem, theta, true_returns)], 0.0
    while spent < budget:
        theta = _ascend(problem, theta, LOWER_STEPS)
        result = _hypergradient(problem, theta, loss)
        _move_reward(problem, result.total if implicit else result.direct, rate)
        losses.append(_designer_value(problem, theta, true_returns))
        spent += LOWER_STEPS + 1 + (1 + 3 + 3 * result.solution.products if implicit else 0)
    return losses


@pytest.mark.parametrize("seed", range(3))
def test_full_hypergradient_beats_direct_only_at_equal_compute(seed):
    """A designer's utility: the direct term alone shrinks the reward and forgets the policy it induces."""
    full = _train(seed, RATE, budget=400, implicit=True)
    direct = [_train(seed, rate, budget=400, implicit=False) for rate in (0.1, RATE)]
    assert len(direct[0]) > 2 * len(full)
    assert full[-1] < full[0] - 0.1
    best = min(min(losses) for losses in direct)
    assert full[-1] < best - 0.1
    assert full[-1] < min(losses[-1] for losses in direct) - 0.2
