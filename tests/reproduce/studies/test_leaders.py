"""The study of leaders' optima at reduced settings."""

import pickle

import numpy as np
import pytest

from parl_core.envs.tabular import matrix_game
from parl_core.errors import ConfigError
from parl_core.reproduce.studies.leaders import EXAMPLES, METHODS, WITHIN, LeadersStudy, ascend, of, read_choice


def _rows_of(study, tasks=None):
    rows = {}
    for task in study.tasks() if tasks is None else tasks:
        for name, lines in study.run(task).items():
            rows.setdefault(name, []).extend(lines)
    return rows


@pytest.fixture(scope="module")
def study():
    return LeadersStudy(seeds=1, steps=120)


@pytest.fixture(scope="module")
def rows(study):
    return _rows_of(study)


def test_tasks_are_scalars_and_all_there(study):
    tasks = study.tasks()
    assert len(tasks) == len(EXAMPLES) * (1 + len(METHODS)) == len({tuple(task.items()) for task in tasks})
    assert all(isinstance(value, (str, int)) for task in tasks for value in task.values())
    assert pickle.loads(pickle.dumps(study)) == study


def test_a_task_gives_the_same_rows_again(study):
    for example in ("matrix-game", "random-game"):
        task = {"part": "ascent", "example": example, "method": "exact", "seed": 1}
        assert study.run(task) == study.run(task)


def test_every_line_of_a_csv_has_the_same_columns(rows):
    assert set(rows) == {"search", "surface", "ascent", "path"}
    for lines in rows.values():
        assert len({tuple(line) for line in lines}) == 1
        assert all(isinstance(value, (str, int, float, bool)) for line in lines for value in line.values())


@pytest.mark.parametrize("example", ["audit-game", "tax-design", "matrix-game"])
def test_ascent_reaches_the_optimum_of_the_search_and_the_direct_term_does_not(rows, example):
    (searched,) = of(rows["search"], example)
    assert searched["exhaustive"]
    for row in of(rows["ascent"], example):
        if row["method"] in ("exact", "nudged-contrast"):
            assert searched["value"] - WITHIN < row["value"] < searched["value"] + 1e-6
            np.testing.assert_allclose(read_choice(row), read_choice(searched), atol=0.02)
        elif row["method"] == "direct-only":
            assert row["value"] < searched["value"] - 1.0
            if example == "matrix-game":  # on its way to what she gets without commitment
                assert row["value"] == pytest.approx(searched["without"], abs=0.02)


def test_the_shortcut_is_exact_where_nothing_is_discounted_and_off_elsewhere(rows):
    ends = {
        (example, method): [row["value"] for row in of(rows["ascent"], example, method)]
        for example in EXAMPLES
        for method in ("exact", "sobirl-shortcut")
    }
    np.testing.assert_allclose(ends["matrix-game", "exact"], ends["matrix-game", "sobirl-shortcut"], atol=1e-9)
    for example in ("audit-game", "tax-design"):
        assert max(ends[example, "sobirl-shortcut"]) < min(ends[example, "exact"]) - 0.02


def test_the_direct_term_of_the_audit_game_ends_where_play_without_commitment_does():
    (searched,) = LeadersStudy().run({"part": "search", "example": "audit-game"})["search"]
    task = {"part": "ascent", "example": "audit-game", "method": "direct-only", "seed": 0}
    (row,) = LeadersStudy().run(task)["ascent"]
    assert row["value"] == pytest.approx(-6.0, abs=1e-4)
    assert searched["without"] == pytest.approx(row["value"], abs=5e-3)


def test_a_path_begins_at_the_start_and_ends_at_the_last_step(rows):
    for example, method in (("tax-design", "direct-only"), ("audit-game", "exact")):
        path = of(rows["path"], example, method)
        (row,) = of(rows["ascent"], example, method)
        steps = [line["step"] for line in path]
        assert steps[0] == 0 and steps[-1] == 120 and steps == sorted(set(steps))
        assert (path[0]["value"], path[-1]["value"]) == (row["start"], row["value"])


def test_an_ascent_steps_by_the_clipped_gradient_and_stops_where_there_is_none():
    """The first step by hand; and the steps saved at the end stand where the last one made does."""
    game = matrix_game()
    start = np.array([0.1, 0.0])  # the objective is steep here
    gradient = game.hypergradient(start).total
    assert np.linalg.norm(gradient) > 1.0
    path = ascend(game, start, "exact", steps=1, learning_rate=0.3)
    after = start + 0.3 * gradient / np.linalg.norm(gradient)
    assert [step for step, _, _ in path] == [0, 1]
    assert path[1][1] == pytest.approx(game.objective(after), abs=1e-12)
    assert path[1][2] == pytest.approx(game.choice(after))

    calls = []
    original = game.hypergradient
    game.hypergradient = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    path = ascend(game, np.zeros(2), "exact", steps=5000, learning_rate=0.3)
    assert len(calls) < 500 and path[-1][0] == 5000
    assert len({value for step, value, _ in path if step > 500}) == 1


def test_tables_count_what_the_rows_say():
    """Rows made by hand: an optimum of 2, ascents that end at 2 and 1; of the first, step 5 is the one that stays within."""
    searched = {"example": "audit-game", "exhaustive": True, "value": 2.0, "choice": "0.25 0.5", "resolution": 1e-6}
    searched |= {"evaluations": 99, "without": 0.5, "without_gap": 0.001}
    same = {"example": "audit-game", "method": "exact"}
    values = {0: [0.0, 1.9995, 1.5, 1.9995, 2.0], 1: [0.0, 1.0, 1.0, 1.0, 1.0]}
    rows = {
        "search": [searched],
        "surface": [],
        "ascent": [{**same, "seed": s, "start": 0.0, "value": v[-1], "choice": "0.25 0.5"} for s, v in values.items()],
        "path": [
            {**same, "seed": s, "step": step, "value": value, "choice": "0 0"}
            for s, v in values.items()
            for step, value in zip((0, 1, 2, 5, 9), v, strict=True)
        ],
    }
    optima, ascents = LeadersStudy().tables(rows)
    assert optima.rows == (
        ("Audit game", "2.0000", "0.250, 0.500", "1e-06", "99", "whole box", "0.500 (no commitment)", "–"),
    )
    assert ascents.rows == (
        ("Audit game", "exact hypergradient", "2.0000", "1.5000 ± 0.5000", "2.0000", "1 of 2", "5"),
    )
    assert all(len(line) == len(table.columns) for table in (optima, ascents) for line in table.rows)


def test_one_seed_has_no_standard_error_and_the_limit_is_the_textbooks(rows):
    optima, ascents = LeadersStudy(seeds=1).tables(rows)
    assert "±" not in "".join(cell for line in ascents.rows for cell in line)
    assert {line[0]: line[-1] for line in optima.rows}["Matrix game"] == "3.5"


def test_figures_are_drawn(study, rows, tmp_path):
    files = study.figures(rows, tmp_path)
    assert [file.name for file in files] == ["surfaces.png", "progress.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="seeds must be at least 1, got 0"):
        LeadersStudy(seeds=0)
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        LeadersStudy(steps=0)
