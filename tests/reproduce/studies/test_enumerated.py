"""The enumerated problem against sums over trajectories written as loops, and its derivatives against differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from parl_core.envs.tabular import random_mdp
from parl_core.models.policies import CategoricalPolicy
from parl_core.reproduce.studies.enumerated import COST, DAMPING, DISCOUNT, TEMPERATURE, EnumeratedProblem

STATES, ACTIONS, HORIZON = 3, 2, 3


def _differences(fn, at, step=1e-3):
    """Derivative of fn at `at` (n,) by central differences of fourth order, the last axis being that of `at`."""
    columns = []
    for unit in np.eye(len(at)):
        near = np.asarray(fn(at + step * unit)) - np.asarray(fn(at - step * unit))
        far = np.asarray(fn(at + 2 * step * unit)) - np.asarray(fn(at - 2 * step * unit))
        columns.append((8 * near - far) / (12 * step))
    return np.stack(columns, axis=-1)


def _theta(seed, problem):
    return np.random.default_rng(100 + seed).normal(size=problem.num_params)


def test_value_and_objective_are_the_sums_they_are_defined_by():
    problem, mdp = EnumeratedProblem(4), random_mdp(STATES, ACTIONS, DISCOUNT, 4)
    theta, reward = _theta(4, problem), problem.random_reward
    policy = CategoricalPolicy(STATES, ACTIONS).double()
    torch.nn.utils.vector_to_parameters(torch.from_numpy(theta), policy.parameters())
    with torch.no_grad():
        log_policy = policy.logits(torch.eye(STATES, dtype=torch.float64)).log_softmax(-1).tolist()
    value, objective, total = 0.0, 0.0, 0.0
    steps = list(itertools.product(range(STATES), range(ACTIONS)))
    for path in itertools.product(steps, repeat=HORIZON):
        probability = mdp.initial[path[0][0]]
        for (s, a), following in itertools.zip_longest(path, path[1:]):
            probability *= math.exp(log_policy[s][a])
            if following:
                probability *= mdp.transitions[s, a, following[0]]
        gains = [reward[s * ACTIONS + a] - TEMPERATURE * log_policy[s][a] for s, a in path]
        handed_out = sum(reward[s * ACTIONS + a] for s, a in path)
        earned = sum(problem.true_reward[s * ACTIONS + a] for s, a in path)
        value += probability * sum(DISCOUNT**h * gain for h, gain in enumerate(gains))
        objective += probability * (-earned + COST * handed_out**2)
        total += probability
    assert total == pytest.approx(1.0, rel=1e-12)
    assert np.exp(problem.log_probabilities(theta)).sum() == pytest.approx(1.0, rel=1e-12)
    assert problem.value(theta, reward) == pytest.approx(value - DAMPING / 2 * theta @ theta, rel=1e-12)
    assert problem.objective(theta, reward) == pytest.approx(objective, rel=1e-12)
    assert problem.trajectories(theta).weights.numpy() == pytest.approx(np.exp(problem.log_probabilities(theta)))


@pytest.mark.parametrize("seed", range(3))
def test_derivatives_are_those_of_the_value(seed):
    problem = EnumeratedProblem(seed)
    theta, reward = _theta(seed, problem), problem.random_reward
    close = {"rel": 1e-7, "abs": 1e-9}
    log_policy = _differences(lambda t: problem.log_policy(t).reshape(-1), theta)
    assert problem.scores(theta) == pytest.approx(log_policy, **close)
    assert problem.value_gradient(theta, reward) == pytest.approx(
        _differences(lambda t: problem.value(t, reward), theta), **close
    )
    assert problem.value_hessian(theta, reward) == pytest.approx(
        _differences(lambda t: problem.value_gradient(t, reward), theta), **close
    )
    assert problem.cross_derivative(theta) == pytest.approx(
        _differences(lambda r: problem.value_gradient(theta, r), reward), **close
    )
    assert problem.direct_term(theta, reward) == pytest.approx(
        _differences(lambda r: problem.objective(theta, r), reward), **close
    )


@pytest.mark.parametrize("seed", range(3))
def test_hypergradient_is_that_of_the_solved_problem(seed):
    problem = EnumeratedProblem(seed)
    reward = problem.random_reward
    optimum = problem.solve(reward, np.zeros(problem.num_params))
    assert np.linalg.norm(problem.value_gradient(optimum, reward)) <= 1e-12
    assert np.linalg.eigvalsh(problem.value_hessian(optimum, reward)).max() <= -DAMPING + 1e-12
    differences = _differences(lambda r: problem.objective(problem.solve(r, optimum), r), reward)
    assert problem.hypergradient(optimum, reward) == pytest.approx(differences, rel=1e-7, abs=1e-8)


def test_felt_directions_are_those_that_change_the_policy():
    problem = EnumeratedProblem(0)
    basis, theta = problem.felt_directions(), _theta(0, problem)
    assert basis.shape == (problem.num_params, STATES * (ACTIONS - 1))
    assert basis.T @ basis == pytest.approx(np.eye(basis.shape[1]), abs=1e-12)
    unfelt = np.eye(problem.num_params) - basis @ basis.T
    assert problem.log_policy(theta + unfelt @ _theta(1, problem)) == pytest.approx(
        problem.log_policy(theta), abs=1e-12
    )
    assert np.linalg.matrix_rank(problem.scores(theta) @ basis) == basis.shape[1]


def test_contraction_is_that_of_gradient_ascent():
    """A step near the optimum shrinks the distance by it: power iteration finds the slowest rate."""
    problem = EnumeratedProblem(3)
    reward = problem.random_reward
    optimum = problem.solve(reward, np.zeros(problem.num_params))
    for step_size in (0.5, 1.0):
        theta, distances = np.zeros(problem.num_params), []
        for _ in range(201):
            theta = theta + step_size * problem.value_gradient(theta, reward)
            distances.append(np.linalg.norm(theta - optimum))
        assert distances[-1] / distances[-2] == pytest.approx(problem.contraction(optimum, reward, step_size), rel=1e-3)
