"""The algorithm of theorem 1 on enumerated problems: what it runs on, and what its runs show at reduced settings."""

from __future__ import annotations

import numpy as np
import pytest

from parl_core.reproduce.studies.enumerated import EnumeratedProblem
from parl_core.reproduce.studies.exact_a_parl import (
    LOWER_STEP_SIZE,
    UPPER_STEP_SIZE,
    Engine,
    bias_rows,
    convergence_rows,
    floor_row,
    reported_steps,
)
from parl_core.reproduce.studies.fits import geometric_fit


@pytest.mark.filterwarnings("ignore::parl_core.HypergradientWarning")
@pytest.mark.parametrize("seed", range(3))
def test_the_librarys_hypergradient_is_the_one_written_out(seed):
    """At policies that are no optimum, so that every factor counts."""
    problem = EnumeratedProblem(seed)
    rng = np.random.default_rng(seed)
    theta, reward = 0.5 * rng.normal(size=problem.num_params), rng.normal(size=problem.num_rewards)
    found = Engine(problem).hypergradient(theta, reward)
    assert found.total.numpy() == pytest.approx(problem.hypergradient(theta, reward), rel=1e-9, abs=1e-11)
    assert found.direct.numpy() == pytest.approx(problem.direct_term(theta, reward), rel=1e-12, abs=1e-13)


def test_reported_steps_are_ten_a_decade():
    assert reported_steps(100) == [1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 63, 79, 100]
    assert reported_steps(10_000)[-11::10] == [1000, 10_000]
    assert reported_steps(30)[-1] == 30


def test_the_run_for_the_rate_is_the_algorithm():
    """Against the algorithm in six lines, with the problem's own derivatives and a lower level solved from zero."""
    rows = convergence_rows(seed=1, steps=30, lower_steps=3)
    problem = EnumeratedProblem(1)
    reward, theta, sums, objectives = np.zeros(problem.num_rewards), np.zeros(problem.num_params), [0.0], []
    for _ in range(30):
        optimum = problem.solve(reward, np.zeros(problem.num_params))
        objectives.append(problem.objective(optimum, reward))
        sums.append(sums[-1] + np.sum(problem.hypergradient(optimum, reward) ** 2))
        for _ in range(3):
            theta = theta + LOWER_STEP_SIZE * problem.value_gradient(theta, reward)
        reward = reward - UPPER_STEP_SIZE * problem.hypergradient(theta, reward)
    objectives.append(problem.objective(problem.solve(reward, theta), reward))

    assert [row["steps"] for row in rows] == reported_steps(30)
    for row in rows:
        steps = row["steps"]
        assert row["sum_squared_norms"] == pytest.approx(sums[steps], rel=1e-9)
        assert row["mean_squared_norm"] == pytest.approx(sums[steps] / steps, rel=1e-9)
        assert row["gradient_norm"] ** 2 == pytest.approx(sums[steps] - sums[steps - 1], rel=1e-6)
        assert row["descent_bound"] == pytest.approx(
            2 * (objectives[0] - objectives[steps]) / UPPER_STEP_SIZE, rel=1e-9
        )
        assert row["engine_difference"] < 1e-12


def test_the_sum_of_squared_norms_stays_below_the_descent_bound():
    """Theorem 1 at K = 10 most of the sum has come by T = 32, and the bias is far below ‖∇L‖."""
    rows = convergence_rows(seed=0, steps=64, lower_steps=10)
    at = {row["steps"]: row for row in rows}
    assert all(row["sum_squared_norms"] < row["descent_bound"] for row in rows)
    assert at[64]["sum_squared_norms"] < 1.05 * at[32]["sum_squared_norms"]
    assert all(row["bias_norm"] < 0.02 * row["gradient_norm"] for row in rows if row["steps"] >= 10)


@pytest.mark.parametrize("seed", [0, 3])
def test_the_bias_decays_at_the_rate_of_the_lower_level(seed):
    lower_steps = (0, 1, *range(40, 81, 8))
    rows = bias_rows(seed, lower_steps)
    assert tuple(row["lower_steps"] for row in rows) == lower_steps
    assert rows[0]["relative_bias"] > 0.5
    late = rows[2:]
    fit = geometric_fit([row["lower_steps"] for row in late], [row["relative_bias"] for row in late])
    assert fit.rate == pytest.approx(rows[0]["contraction"], rel=2e-3)
    assert fit.r_squared > 0.9999
    # the bias is of first order in what the lower level lacks
    ratios = [row["relative_bias"] / row["lower_distance"] for row in late]
    assert max(ratios) < 1.3 * min(ratios)


def test_bias_rows_tell_where_the_value_is_not_concave():
    first, last = bias_rows(0, (0, 6))
    assert first["negative_curvature"] and not last["negative_curvature"]
    problem = EnumeratedProblem(0)
    assert np.linalg.eigvalsh(problem.value_hessian(np.zeros(problem.num_params), problem.random_reward)).max() > 0


def test_cold_starts_leave_a_floor_and_warm_starts_do_not():
    cold = [floor_row(1, "cold", lower_steps, 200)["gradient_norm"] for lower_steps in (1, 2, 4, 8)]
    earlier = [floor_row(1, "cold", lower_steps, 150)["gradient_norm"] for lower_steps in (1, 2)]
    assert cold[0] > 2 * cold[1] > 4 * cold[2] > 8 * cold[3]
    assert earlier == pytest.approx(cold[:2], rel=0.03)  # a floor: more upper steps do not lower it
    warm = [floor_row(1, "warm", 1, steps)["gradient_norm"] for steps in (100, 200)]
    assert warm[1] < 0.5 * warm[0] and warm[1] < 0.1 * cold[1]
