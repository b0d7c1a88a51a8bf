"""The Four-Rooms study at small settings, and its arithmetic by hand."""

import numpy as np
import pytest

from parl_core.envs.tabular import FourRooms
from parl_core.envs.tabular.problems.four_rooms_ascent import four_rooms_ascent, initial_weights
from parl_core.errors import ConfigError, UnknownNameError
from parl_core.reproduce.studies.four_rooms import (
    ANNEALED,
    EXACT,
    METHODS,
    PUBLISHED,
    RESTARTS,
    SAMPLED,
    FourRoomsStudy,
    is_within,
)

STUDY = FourRoomsStudy(seeds=2, pilot_seeds=1, steps=100)


def _task(method, temperature=0.003, cost=1.0):
    return {"method": method.label, "temperature": temperature, "cost": cost}


def test_every_method_meets_every_cell():
    tasks = STUDY.tasks()
    assert len(tasks) == 9 * len(METHODS) and len({tuple(task.items()) for task in tasks}) == len(tasks)
    assert {(task["temperature"], task["cost"]) for task in tasks} == set(PUBLISHED)
    only = FourRoomsStudy(estimator="CertaintyEquivalent").tasks()
    assert {task["method"] for task in only} == {f"CertaintyEquivalent, {steps} steps" for steps in (1000, 10_000)}


def test_the_learning_rate_is_the_pilots_best_and_the_counted_runs_are_others():
    rows = STUDY.run(_task(EXACT))["runs"]
    pilots = [row for row in rows if row["pilot"]]
    counted = [row for row in rows if not row["pilot"]]
    best = max(pilots, key=lambda row: row["value"])["learning_rate"]
    assert {row["learning_rate"] for row in pilots} == {0.5, 0.1, 0.05, 0.01}
    assert [row["learning_rate"] for row in counted] == [best, best] and [row["seed"] for row in counted] == [0, 1]
    assert not {row["seed"] for row in pilots} & {row["seed"] for row in counted}
    again = four_rooms_ascent("exact", initial_weights(1), np.full(100, 0.003), 1.0, best, 1)
    assert counted[1]["value"] == pytest.approx(again.value, rel=1e-9)


def test_annealing_ends_at_the_cells_temperature_and_restarts_keep_the_best():
    annealed = STUDY.run(_task(ANNEALED, 0.001))["runs"]
    plain = STUDY.run(_task(EXACT, 0.001))["runs"]
    assert annealed[-1]["value"] != plain[-1]["value"]
    temperatures = np.full(100, 0.001)
    temperatures[:50] = np.geomspace(0.005, 0.001, 50)
    rate = annealed[-1]["learning_rate"]
    by_hand = four_rooms_ascent("exact", initial_weights(1), temperatures, 1.0, rate, 1)
    assert annealed[-1]["value"] == pytest.approx(by_hand.value, rel=1e-9)
    # the first of seed 0's starts is the plain run of seed 0
    kept = STUDY.run(_task(RESTARTS, 0.001))["runs"][0]["value"]
    assert kept >= four_rooms_ascent("exact", initial_weights(0), np.full(100, 0.001), 1.0, 0.5, 0).value - 1e-9
    assert kept > plain[-2]["value"]


def test_maps_and_curves():
    rows = STUDY.run(_task(EXACT))
    assert len(rows["maps"]) == 104 and len(rows["curves"]) == 2 * 50
    spent = sum(row["incentive"] for row in rows["maps"])
    assert -0.2 < spent < 0
    start = [row["value"] for row in rows["curves"] if row["step"] == 0 and row["seed"] == 1]
    problems = [FourRooms(goal, 0.003, 1.0) for goal in (0, 1)]
    assert start == [pytest.approx(np.mean([p.objective(initial_weights(1)) for p in problems]), rel=1e-9)]
    assert {row["where"] for row in rows["agreement"]} == {"start", "end"}
    assert all(row[name] < 1e-9 for row in rows["agreement"] for name in ("Fisher", "HPGD", "BC-HG"))


def test_within_two_standard_errors_by_hand():
    assert is_within((0.58, 0.0), (0.58, 0.0)) and is_within((0.5751, 0.0), (0.58, 0.0))
    assert not is_within((0.5749, 0.0), (0.58, 0.0))
    assert is_within((0.90, 0.03), (1.0, 0.04))  # 2·.05 = .1
    assert not is_within((0.89, 0.03), (1.0, 0.04))
    assert is_within((2.0, 0.0), (1.0, 0.0))  # better counts


def test_the_best_published_value_is_the_surest_of_the_highest():
    assert PUBLISHED[0.003, 1.0].best == (1.00, 0.0) and PUBLISHED[0.001, 1.0].best == (0.91, 0.088)
    ties = {(0.001, 3.0): (0.51, 0.0), (0.001, 5.0): (0.46, 0.003), (0.003, 5.0): (0.32, 0.0)}
    assert {cell: PUBLISHED[cell].best for cell in ties} == ties


def _runs(method, values):
    """Rows of counted runs in every cell: the best published value plus each of `values`."""
    return [
        {**_task(method, *cell), "learning_rate": 0.5, "pilot": False, "seed": seed, "value": published.best[0] + value}
        for cell, published in PUBLISHED.items()
        for seed, value in enumerate(values)
    ]


def test_noisy_runs_do_not_pass_for_good_ones():
    """.1 below with an error of .1: within two standard errors everywhere, by the published error alone in one cell."""
    rows = {"runs": _runs(EXACT, (-0.2, 0.0)), "agreement": []}
    published, everything = STUDY.tables(rows)  # without a table of agreement, as nothing was compared
    assert "exact gradient: 9 of 9, and 1 with an error of 0;" in published.note
    assert f"{SAMPLED.title}: not run; exact gradient, annealed: not run" in published.note
    assert published.columns[5:] == (
        "exact gradient",
        "CertaintyEquivalent, 10000 steps",
        "exact gradient, annealed",
        "exact gradient, restarts",
    )
    assert [row[0] for row in everything.rows][1] == "exact gradient"


def test_one_seed_gets_no_verdict():
    published, _ = FourRoomsStudy(seeds=1, pilot_seeds=0).tables({"runs": _runs(EXACT, (0.0,)), "agreement": []})
    assert "no verdict" in published.note and "✓" not in published.note + "".join(map("".join, published.rows))
    assert published.rows[0][5] == "0.910"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"seeds": 0}, ConfigError, "seeds must be at least 1, got 0"),
        ({"pilot_seeds": -1}, ConfigError, "pilot_seeds must be at least 0, got -1"),
        ({"steps": 0}, ConfigError, "steps must be at least 1, got 0"),
        ({"estimator": "HPDG"}, UnknownNameError, "Unknown estimator 'HPDG': did you mean HPGD"),
    ],
)
def test_settings_that_make_no_study_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        FourRoomsStudy(**settings).tasks()


def test_tables_print_every_cell_and_figures_are_drawn(tmp_path):
    rows = {"runs": [], "curves": [], "maps": [], "agreement": []}
    for method in (EXACT, SAMPLED, ANNEALED):
        rows["runs"] += _runs(method, (0.0, 0.0))
    for row in rows["runs"]:
        row["value"] -= 0.1 if row["cost"] == 5.0 else 0.0
    done = STUDY.run(_task(EXACT))
    for kind in ("curves", "maps", "agreement"):
        rows[kind] = [
            {**row, "temperature": temperature, "cost": cost} for temperature, cost in PUBLISHED for row in done[kind]
        ]
    published, everything, agreement = STUDY.tables(rows)
    assert len(published.rows) == 9
    for row, (_, cost) in zip(published.rows, PUBLISHED, strict=True):
        assert [cell.endswith("✓") for cell in row[5:]] == [cost != 5.0] * 3 + [False]
        assert row[-1] == "–"  # restarts were not run
    assert "exact gradient: 6 of 9, and 6 with" in published.note and "restarts: not run" in published.note
    assert len(everything.rows) == 1 + len(METHODS) and all(len(row) == 10 for row in everything.rows)
    assert len(agreement.rows) == 2 and agreement.columns == ("weights", "Fisher", "HPGD", "BCHG")
    figures = STUDY.figures(rows, tmp_path)
    assert [figure.name for figure in figures] == ["maps.png", "curves.png"] and all(f.stat().st_size for f in figures)
