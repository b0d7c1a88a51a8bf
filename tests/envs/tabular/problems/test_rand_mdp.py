"""RandMDP: drawn as published, its optimum, its gradient by differences; M-SoBiRL's iteration against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from parl_core.envs.tabular import (
    MSoBiRLState,
    TabularMDP,
    m_sobirl_iteration,
    m_sobirl_start,
    rand_mdp,
    soft_policy_vjp,
    soft_value_iteration,
)
from parl_core.envs.tabular.problem import ParametricReward
from parl_core.envs.tabular.problems.rand_mdp import OPTIMUM
from parl_core.errors import NonFiniteError
from tests.envs.tabular_problems import central_difference, make_problem


@pytest.fixture(scope="module")
def draws():
    """200 problems, that is 10 000 transition rows."""
    return [rand_mdp(seed) for seed in range(200)]


def test_successors_are_drawn_as_published(draws):
    """χ² tests of what is uniform, each at a false-alarm rate of 1e-6."""
    rows = np.concatenate([problem.mdp.transitions.reshape(-1, 10) for problem in draws])
    assert np.abs(rows.sum(axis=1) - 1.0).max() < 1e-12
    counts = (rows > 0).sum(axis=1)
    observed = np.bincount(counts, minlength=11)
    assert observed[0] == observed[10] == 0
    expected = len(rows) / 9
    assert np.sum((observed[1:10] - expected) ** 2) / expected < 43.8  # 8 degrees of freedom
    # which states are drawn, given how many: exchangeable, so 9 degrees of freedom after the variance of a draw
    chosen, pairs = (rows > 0).sum(axis=0), counts.sum()
    variance = np.sum(counts * (10 - counts)) / (10 * 9)  # Σ of the covariance's only nonzero eigenvalue
    assert np.sum((chosen - pairs / 10) ** 2) / variance < 46.0


def test_probabilities_are_normalised_uniform_numbers(draws):
    """With two successors P(p < ¼) = 1/6 for u/(u + v), where a uniform p would give ¼; |z| < 4.9 is 1e-6."""
    rows = np.concatenate([problem.mdp.transitions.reshape(-1, 10) for problem in draws])
    pairs = rows[(rows > 0).sum(axis=1) == 2]
    smaller = np.min(np.where(pairs > 0, pairs, 1.0), axis=1)
    share = np.mean(smaller < 0.25)  # twice 1/6, by symmetry
    assert abs(share - 1 / 3) < 4.9 * np.sqrt(2 / 9 / len(pairs))


def test_scales_matrix_and_start_have_their_moments(draws):
    """|z| < 4.9, a false-alarm rate of 1e-6 each. c = uv: mean ¼, variance 1/9 − 1/16, P(c < ½) = ½ + ½ log 2."""
    scales = np.concatenate([problem.scales.ravel() for problem in draws])
    assert abs(scales.mean() - 0.25) < 4.9 * np.sqrt((1 / 9 - 1 / 16) / len(scales))
    share = 0.5 + 0.5 * np.log(2.0)
    assert abs(np.mean(scales < 0.5) - share) < 4.9 * np.sqrt(share * (1 - share) / len(scales))
    normal = np.concatenate([[*problem.matrix.ravel(), *problem.start] for problem in draws[:20]])
    assert abs(normal.mean()) < 4.9 / np.sqrt(len(normal))
    assert abs(np.mean(normal**2) - 1.0) < 4.9 * np.sqrt(2.0 / len(normal))
    assert (draws[0].matrix.shape, draws[0].start.shape) == ((100, 100), (100,))
    assert np.array_equal(rand_mdp(7).matrix, draws[7].matrix)
    assert (draws[0].mdp.discount, draws[0].temperature) == (0.5, 1.0)


def test_the_optimum_is_at_zero_and_nowhere_else():
    problem, random = rand_mdp(0), np.random.default_rng(0)
    at_zero = problem.hypergradient(np.zeros(100))
    assert at_zero.objective == pytest.approx(OPTIMUM, abs=1e-12)
    assert OPTIMUM == 1.0
    assert np.abs(at_zero.total).max() < 1e-12
    for scale in (1e-3, 0.1, 1.0, 10.0):
        x = scale * random.standard_normal(100)
        assert problem.objective(x) >= OPTIMUM + 0.5 * x @ x


@pytest.mark.parametrize(("seed", "scale"), [(0, 1.0), (1, 0.3), (2, 0.1)])
def test_gradient_by_differences(seed, scale):
    problem = rand_mdp(seed)
    x = scale * problem.start
    result = problem.hypergradient(x)
    assert result.objective == problem.objective(x)
    assert np.array_equal(result.direct, x)
    differences = central_difference(problem.objective, x)
    assert np.linalg.norm(result.implicit) > 0.05 * np.linalg.norm(x)  # or it would not be tested
    assert np.linalg.norm(result.total - differences) < 1e-6 * np.linalg.norm(result.implicit)


def test_reward_by_hand():
    problem = rand_mdp(3)
    x = np.zeros(100)
    x[2], x[5] = 2.0, -1.0
    m = problem.matrix
    quadratic = 4 * m[2, 2] - 2 * m[2, 5] - 2 * m[5, 2] + m[5, 5]
    lower = problem.lower(x)
    assert lower.value[4, 1] == pytest.approx(problem.scales[4, 1] * quadratic)
    slope = 2 * (m[7, 2] + m[2, 7]) - (m[7, 5] + m[5, 7])
    assert lower.jacobian[4, 1, 7] == pytest.approx(problem.scales[4, 1] * slope)
    with pytest.raises(NonFiniteError, match="params"):
        problem.lower(np.full(100, np.nan))
    with pytest.raises(ValueError, match=r"params must have shape \(100,\), got \(3,\)"):
        problem.objective(np.zeros(3))


def test_m_sobirl_is_exact_where_it_stands_still():
    """On a problem whose f depends on the policy in its own way, at another temperature and discount."""
    mdp, reward, _, params = make_problem(num_states=6, num_actions=3, discount=0.8, seed=4)
    own = np.random.default_rng(0).standard_normal((6, 3))
    lower = ParametricReward(*reward(params))
    solution = soft_value_iteration(mdp, lower.value, 0.7)
    exact = np.einsum("sa,sap->p", soft_policy_vjp(mdp, solution, own * np.cos(solution.policy)), lower.jacobian)
    state = m_sobirl_start(mdp)
    for _ in range(4000):
        result = m_sobirl_iteration(
            mdp, lower, lambda policy: own * np.cos(policy), state, temperature=0.7, sweeps=2, adjoint_step=0.3
        )
        state = result.state
    assert np.abs(result.policy - solution.policy).max() < 1e-12
    assert np.linalg.norm(result.implicit - exact) < 1e-9 * np.linalg.norm(exact)


def test_one_m_sobirl_iteration_is_what_the_loops_say():
    """Three sweeps and one adjoint step from a warm start, written out state by state."""
    random = np.random.default_rng(1)
    transitions = random.dirichlet(np.ones(3), size=(3, 2))
    mdp, tau, gamma, step = TabularMDP(transitions, np.ones(3) / 3, 0.6), 0.5, 0.6, 0.2
    lower = ParametricReward(random.standard_normal((3, 2)), random.standard_normal((3, 2, 4)))
    start = MSoBiRLState(random.standard_normal(3), random.standard_normal(3))
    result = m_sobirl_iteration(mdp, lower, np.sin, start, temperature=tau, sweeps=3, adjoint_step=step)

    def q(value, s, a):
        return lower.value[s, a] + gamma * sum(transitions[s, a, t] * value[t] for t in range(3))

    value = list(start.value)
    for _ in range(3):
        value = [tau * np.log(sum(np.exp(q(value, s, a) / tau) for a in range(2))) for s in range(3)]
    policy = [[np.exp(q(value, s, a) / tau) for a in range(2)] for s in range(3)]
    policy = [[p / sum(row) for p in row] for row in policy]
    w, rhs, system = start.adjoint, np.zeros(3), np.eye(3)  # system is I − γ P_π
    for s in range(3):
        for a in range(2):
            for t in range(3):
                weight = policy[s][a] * np.sin(policy[s][a])
                rhs[t] += ((s == t) - gamma * transitions[s, a, t]) * weight
                system[s, t] -= gamma * policy[s][a] * transitions[s, a, t]
    w = w - step * system @ (system.T @ w - rhs)
    implicit = np.zeros(4)
    for s in range(3):
        for a in range(2):
            implicit += policy[s][a] * (np.sin(policy[s][a]) - w[s]) * lower.jacobian[s, a] / tau
    assert np.allclose(result.state.value, value, atol=1e-13)
    assert np.allclose(result.state.adjoint, w, atol=1e-13)
    assert np.allclose(result.policy, policy, atol=1e-13)
    assert np.allclose(result.implicit, implicit, atol=1e-13)
