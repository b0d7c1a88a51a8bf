"""The RandMDP study: what it writes is what plain descent does, and the published numbers are reached."""

from __future__ import annotations

import numpy as np
import pytest

from parl_core.envs.tabular import rand_mdp
from parl_core.errors import ConfigError
from parl_core.reproduce.studies.rand_mdp import METHODS, RandMDPStudy, _arrived, descend, finite_differences
from parl_core.results.csv_files import plain_rows
from parl_core.results.tables import to_text
from tests.envs.tabular_problems import central_difference


@pytest.fixture(scope="module")
def published():
    """M-SoBiRL on one problem, for as long as published."""
    return RandMDPStudy(seeds=1, steps=830).run({"method": "m-sobirl", "seed": 0})


@pytest.fixture(scope="module")
def short():
    """Every method, two seeds, a few steps."""
    study = RandMDPStudy(seeds=2, steps=20)
    rows = {"seeds": [], "curves": [], "gradients": []}
    for task in study.tasks():
        for name, lines in plain_rows(study.run(task)).items():
            rows[name] += lines
    return study, rows


def test_m_sobirl_reaches_the_published_numbers(published):
    (row,) = published["seeds"]
    assert row["step"] == 823
    assert abs(row["objective"] - 1.0) <= 1e-3
    assert 0.005 < row["gradient_norm"] <= 0.02
    steps = [line["step"] for line in published["curves"]]
    assert {0, 823, 830} <= set(steps)
    assert len(steps) <= 200
    assert steps == sorted(steps)
    early, late = published["gradients"][0], published["gradients"][-1]
    assert (early["step"], late["step"]) == (0, 823)
    assert late["relative_error"] < 1e-6 < early["relative_error"]
    first = row["first_step"]
    for line in published["curves"]:
        arrived = line["objective"] <= 1.001 and line["gradient_norm"] <= 0.02
        assert arrived == (line["step"] >= first)


def test_the_curve_is_that_of_plain_gradient_descent(short):
    """Steps of .008 along differences of f, taken anew."""
    _, rows = short
    problem = rand_mdp(1)
    x = problem.start
    curve = {row["step"]: row for row in rows["curves"] if row["method"] == "exact" and row["seed"] == 1}
    for step in range(4):
        gradient = central_difference(problem.objective, x)
        assert curve[step]["objective"] == pytest.approx(problem.objective(x), rel=1e-6)
        assert curve[step]["gradient_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
        x = x - 8e-3 * gradient


def test_each_method_takes_for_the_gradient_what_it_says():
    """Direct: x. Shortcut: the implicit term of a problem in which no action decides about the states to come."""
    problem = rand_mdp(0)
    for method in METHODS:
        x, exact, gradient = next(descend(problem, method, 0))
        assert np.array_equal(x, problem.start)
        wrong = {"exact": False, "m-sobirl": True, "shortcut": True, "direct": True}[method]
        assert np.allclose(gradient, exact.total, rtol=1e-6) != wrong
        if method == "direct":
            assert np.array_equal(gradient, x)
    still = rand_mdp(0)
    still.mdp.transitions[:] = still.mdp.transitions[:, :1]
    _, exact, gradient = next(descend(still, "shortcut", 0))
    assert np.allclose(gradient, exact.total, rtol=1e-12)
    assert np.allclose(
        finite_differences(problem, problem.start), problem.hypergradient(problem.start).total, rtol=1e-5
    )


def test_tables_and_figure(short, tmp_path):
    study, rows = short
    assert len(rows["seeds"]) == 8
    assert rows["seeds"][0]["step"] == 20
    outcomes, gradients = study.tables(rows)
    lines = {line[0]: line for line in outcomes.rows}
    assert lines["published (M-SoBiRL), step 823"][1:4:2] == ("1.000", "0.013")
    values = [row["objective"] for row in rows["seeds"] if row["method"] == "shortcut"]
    mean, error = np.mean(values), np.std(values, ddof=1) / np.sqrt(2)
    assert lines["SoBiRL's shortcut"][1] == f"{mean:.6f} ± {error:.6f}"
    assert lines["SoBiRL's shortcut"][2] == f"{max(values):.6f}"
    assert lines["SoBiRL's shortcut"][5:] == ("0 of 2", "–")
    assert "step 20" in to_text(outcomes)
    worst = max(row["relative_error"] for row in rows["gradients"] if row["method"] == "direct")
    assert gradients.rows[-1][2] == f"{worst:.1e}"
    (figure,) = study.figures(rows, tmp_path)
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_only_arrivals_by_the_published_step_count():
    """Of three seeds one arrives in time, one after step 823 and one never."""
    row = {"step": 823, "objective": 1.0, "gradient_norm": 0.01}
    rows = [
        {"method": method, "seed": seed, **row, "first_step": first}
        for method in METHODS
        for seed, first in enumerate((823, 824, float("nan")))
    ]
    outcomes, _ = RandMDPStudy(seeds=3).tables({"seeds": rows, "gradients": []})
    assert outcomes.columns[5:] == ("arrived by step 823", "at step") and "at step 823" in outcomes.title
    assert {line[5:] for line in outcomes.rows[1:]} == {("1 of 3", "823")}


def test_arrived_is_both_at_once():
    points = [(1.0, 0.0), (1.001, 0.02), (1.0011, 0.01), (1.0, 0.0201)]
    arrived = [_arrived({"objective": objective, "gradient_norm": norm}) for objective, norm in points]
    assert arrived == [True, True, False, False]


def test_a_task_gives_the_same_rows_again(short):
    study, rows = short
    again = plain_rows(study.run({"method": "m-sobirl", "seed": 1}))
    assert repr(again["curves"]) == repr(
        [row for row in rows["curves"] if row["method"] == "m-sobirl" and row["seed"] == 1]
    )


def test_settings_that_make_no_study_are_refused():
    for settings in ({"seeds": 0}, {"steps": 0}):
        (name,) = settings
        with pytest.raises(ConfigError, match=f"--{name} must be at least 1, got 0"):
            RandMDPStudy(**settings).tasks()
