"""The convergence study: its tasks, what its tables say, and its figures."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from parl_core.errors import ConfigError
from parl_core.reproduce.studies.convergence import ConvergenceStudy, bias_fit, floor_fit, rate_slope
from parl_core.reproduce.studies.exact_a_parl import reported_steps


@pytest.fixture(scope="module")
def tiny():
    study = ConvergenceStudy(seeds=2, steps=12, lower_steps=3)
    rows: dict[str, list] = {}
    for task in study.tasks():
        for name, own in study.run(task).items():
            rows.setdefault(name, []).extend(own)
    return study, rows


def test_tasks_cover_every_part_of_every_problem(tiny):
    study, rows = tiny
    tasks = [tuple(sorted(task.items())) for task in study.tasks()]
    assert len(set(tasks)) == len(tasks)
    assert {row["seed"] for name in rows for row in rows[name]} == {0, 1}
    assert {len({tuple(row) for row in own}) for own in rows.values()} == {1}  # one set of columns in each CSV
    assert len(rows["floor"]) == len({(r["seed"], r["start"], r["lower_steps"]) for r in rows["floor"]})


def test_a_task_repeats_bit_for_bit_in_another_process_worth_of_state(tiny):
    study, rows = tiny
    again = pickle.loads(pickle.dumps(study))
    task = next(task for task in study.tasks() if task["part"] == "rate" and task["seed"] == 1)
    assert again.run(task)["rate"] == [row for row in rows["rate"] if row["seed"] == 1]


def test_tables_and_figures(tiny, tmp_path):
    study, rows = tiny
    tables = study.tables(rows)
    assert [len(table.rows) for table in tables] == [2, 2, 7]
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    last = [row for row in rows["rate"] if row["seed"] == 0][-1]
    assert f"{last['sum_squared_norms']:.3f}" in tables[0].rows[0]
    paths = study.figures(rows, tmp_path)
    assert [path.name for path in paths] == ["convergence-rate.png", "convergence-bias.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_the_note_counts_the_problems_on_which_the_slope_holds():
    """Sums that are constant from T = 1 and sums that grow as T^½: slopes −1 and −½."""
    steps = reported_steps(1000)
    common = {"descent_bound": 100.0, "gradient_norm": 1.0, "bias_norm": 0.0, "engine_difference": 0.0}
    rows = [
        {"seed": seed, "steps": n, "sum_squared_norms": n**power, "mean_squared_norm": n ** (power - 1), **common}
        for seed, power in enumerate((0.0, 0.5))
        for n in steps
    ]
    bias = [
        {"seed": seed, "lower_steps": k, "relative_bias": 0.9**k, "contraction": 0.9}
        for seed in (0, 1)
        for k in range(241)
    ]
    floor = [
        {"seed": seed, "start": start, "lower_steps": k, "steps": 9, "gradient_norm": 0.5**k, "contraction": 0.5}
        for seed in (0, 1)
        for start in ("cold", "warm")
        for k in (1, 2, 4, 8, 12, 16, 24)
    ]
    table, *_ = ConvergenceStudy(seeds=2).tables({"rate": rows, "bias": bias, "floor": floor})
    assert "at most −0.9 on 1 of 2 problems" in table.note
    assert [row[table.columns.index("slope (theorem: −1)")] for row in table.rows] == ["-1.000", "-0.500"]
    assert [row[table.columns.index("largest / descent bound")] for row in table.rows] == ["0.010", "0.316"]


def test_slope_is_over_the_last_three_decades():
    steps = reported_steps(10_000)
    means = [1.0 if n < 10 else 10.0 / n for n in steps]
    rows = [{"steps": n, "mean_squared_norm": mean} for n, mean in zip(steps, means, strict=True)]
    assert rate_slope(rows) == pytest.approx(-1.0, abs=1e-3)


def test_bias_fit_leaves_out_the_start_and_what_rounding_leaves():
    biases = [1.0, 0.005, 2.0, *(0.008 * 0.7**k for k in range(100))]
    rows = [{"lower_steps": k, "relative_bias": max(bias, 1e-13)} for k, bias in enumerate(biases)]
    fit = bias_fit(rows)
    assert fit.rate == pytest.approx(0.7) and fit.r_squared == pytest.approx(1.0)


def test_floor_fit_is_that_of_cold_starts():
    norms = {"cold": lambda k: 3.0 if k < 4 else 0.8**k, "warm": lambda k: 1e-3}
    rows = [
        {"start": start, "lower_steps": k, "gradient_norm": norm(k)}
        for start, norm in norms.items()
        for k in (1, 4, 8, 16)
    ]
    assert floor_fit(rows).rate == pytest.approx(0.8)
    assert np.isclose(floor_fit(rows).r_squared, 1.0)


@pytest.mark.parametrize("settings", [{"seeds": 0}, {"steps": 9}, {"lower_steps": 0}])
def test_settings_out_of_range_are_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError, match=rf"{name} must be at least \d+, got {value}"):
        ConvergenceStudy(**settings)
