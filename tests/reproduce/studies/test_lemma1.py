"""The Lemma 1 study: its constant, its draws, and what its tables say of them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from parl_core.errors import ConfigError
from parl_core.reproduce.studies.divergences import DIVERGENCES
from parl_core.reproduce.studies.enumerated import EnumeratedProblem
from parl_core.reproduce.studies.lemma1 import BOUNDED, LIPSCHITZ, STEP_SIZES, Lemma1Study, draw_rows


@pytest.fixture(scope="module")
def rows():
    study = Lemma1Study(draws=25)
    return [row for task in study.tasks() for row in study.run(task)["lemma1"]]


def _select(rows, **columns):
    return [row for row in rows if all(row[name] == value for name, value in columns.items())]


def test_the_constant_is_the_lipschitz_constant_of_log_pi():
    """Scores are never longer than L, and as long as L in the limit: the other action of a deterministic policy."""
    problem = EnumeratedProblem(0)
    rng = np.random.default_rng(0)
    for scale in (0.1, 1.0, 10.0):
        lengths = np.linalg.norm(problem.scores(scale * rng.normal(size=problem.num_params)), axis=1)
        assert lengths.max() <= LIPSCHITZ
    assert lengths.max() == pytest.approx(LIPSCHITZ, rel=1e-3)


def test_every_draw_has_every_step_size_direction_and_divergence(rows):
    assert len(rows) == 25 * 2 * len(STEP_SIZES) * len(DIVERGENCES)
    keys = {(row["draw"], row["direction"], row["step_size"], row["divergence"]) for row in rows}
    assert len(keys) == len(rows)
    for row in rows:
        assert row["bound"] == pytest.approx(3.0 * row["step_size"])
        assert row["ratio"] == pytest.approx(row["value"] / row["bound"])
    assert pickle.loads(pickle.dumps(Lemma1Study(draws=25))).run({"first": 7, "last": 7})["lemma1"] == _select(
        rows, draw=7
    )


def test_the_lemma_holds_where_it_is_proved_and_fails_for_chi_squared(rows):
    assert all(row["ratio"] <= 1.0 for row in rows if row["divergence"] in BOUNDED)
    far = [row["ratio"] for row in _select(rows, divergence="chi-squared", step_size=10.0)]
    assert np.mean(np.array(far) > 10.0) > 0.5
    assert all(np.isfinite(row["value"]) for row in rows)


def test_what_the_log_ratio_alone_bounds(rows):
    """|log ρ − log ρ*| ≤ H L ‖Δθ‖: KL below twice the bound both ways, Jeffreys below four times."""
    for name, factor in (("KL", 2.0), ("reverse KL", 2.0), ("Jeffreys", 4.0)):
        assert max(row["ratio"] for row in _select(rows, divergence=name)) <= factor


def test_small_steps_are_the_fisher_matrix(rows):
    """KL ≈ ½ λ ‖Δθ‖² in the steepest direction, λ the largest eigenvalue of E[S Sᵀ]; no direction has more."""
    for draw in range(5):
        problem = EnumeratedProblem(draw)
        theta = problem.solve(problem.random_reward, np.zeros(problem.num_params))
        sums = sum(problem.scores(theta)[2 * s + a] for s, a in zip(problem.states.T, problem.actions.T, strict=True))
        fisher = np.einsum("n,np,nq->pq", np.exp(problem.log_probabilities(theta)), sums, sums)
        predicted = 0.5 * np.linalg.eigvalsh(fisher)[-1] * 0.01**2
        steepest, random = (
            _select(rows, draw=draw, direction=name, step_size=0.01, divergence="KL")[0]["value"]
            for name in ("steepest", "random")
        )
        assert steepest == pytest.approx(predicted, rel=0.03)
        assert random < steepest


def test_tables_say_what_the_rows_hold(rows):
    study = Lemma1Study(draws=25)
    random, steepest = study.tables({"lemma1": rows})
    for direction, table in (("random", random), ("steepest", steepest)):
        assert [row[0] for row in table.rows] == list(DIVERGENCES)
        own = _select(rows, direction=direction)
        for cells in table.rows:
            ratios = _select(own, divergence=cells[0])
            above = {row["draw"] for row in ratios if row["ratio"] > 1}
            assert cells[-2] == f"{len(above)} of 25"
            assert cells[-1].startswith("holds" if cells[0] in BOUNDED else "violated" if above else "not proved")
        largest = max(row["ratio"] for row in _select(own, divergence="total variation", step_size=1.0))
        assert table.rows[0][1 + STEP_SIZES.index(1.0)] == f"{largest:.3f}"


def test_the_note_says_which_step_sizes_can_violate_the_bound(rows):
    """3 ‖Δθ‖ is below 1 up to .3, and below log 2 = .69 up to .1."""
    for table in Lemma1Study(draws=25).tables({"lemma1": rows}):
        assert "only ‖Δθ‖ ≤ 0.3 puts it to the test, for JS only ‖Δθ‖ ≤ 0.1" in table.note
    largest = {"total variation": 1.0, "squared Hellinger": 1.0, "Jensen-Shannon": np.log(2.0)}
    for name, value in largest.items():
        assert max(row["value"] for row in _select(rows, divergence=name)) <= value


def test_a_violation_would_be_shown():
    rows = list(draw_rows(0))
    worse = _select(rows, direction="random", divergence="Jensen-Shannon", step_size=0.3)[0]
    worse["ratio"] = 1.01
    table, _ = Lemma1Study(draws=1).tables({"lemma1": rows})
    told = dict(zip(DIVERGENCES, (row[-2:] for row in table.rows), strict=True))
    assert told["Jensen-Shannon"] == ("1 of 1", "VIOLATED")
    assert told["total variation"] == ("0 of 1", "holds, as proved")


def test_figure(rows, tmp_path):
    (path,) = Lemma1Study(draws=25).figures({"lemma1": rows}, tmp_path)
    assert path.name == "lemma1.png" and path.stat().st_size > 10_000


def test_no_draws_are_refused():
    with pytest.raises(ConfigError, match="draws must be at least 1, got 0"):
        Lemma1Study(draws=0)
