"""Pictures show the runs they are given, an algorithm's colour and its interquartile mean."""

from __future__ import annotations

import numpy as np
import pytest

from parl_core.comparison import curves as module
from parl_core.comparison.statistics import bootstrap_iqm
from parl_core.training.config import ALGORITHMS


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """draw_curves that returns the figure's axes by their row and column."""

    def draw(curves):
        figures = []
        real = module.save_picture

        def keep(figure, path):
            figures.append(np.array(figure.axes))
            return real(figure, path)

        monkeypatch.setattr(module, "save_picture", keep)
        path = module.draw_curves(curves, tmp_path / "curves.png")
        assert path.read_bytes().startswith(b"\x89PNG")
        return figures[0].reshape(-1, len(curves))

    return draw


def rows(returns, success=None):
    steps = [100.0 * (k + 1) for k in range(len(returns))]
    table = [{"step": step, "true_return": value} for step, value in zip(steps, returns, strict=True)]
    for row, share in zip(table, success or (), strict=False):
        row["success_rate"] = share
    return table


RETURNS = np.array([[0.0, 1.0, 9.0], [2.0, 5.0, 3.0], [1.0, 3.0, 8.0], [50.0, 0.0, 4.0], [-40.0, 2.0, 5.0]])


def test_bold_is_the_interquartile_mean_with_its_band_and_every_run_is_thin(drawn):
    (axis,) = drawn({"a/b": {"pebble": [rows(values) for values in RETURNS]}})[0]
    *thin, bold = axis.lines
    for line, values in zip(thin, RETURNS, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.column_stack([[100, 200, 300], values]))
    expected = bootstrap_iqm([RETURNS])
    np.testing.assert_array_equal(bold.get_ydata(), expected.value)
    np.testing.assert_allclose(bold.get_ydata(), [1.0, 2.0, 17 / 3])
    (band,) = axis.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert {(100.0 * (k + 1), side[k]) for side in (expected.low, expected.high) for k in range(3)} <= corners
    assert bold.get_linewidth() > 2 * thin[0].get_linewidth()
    assert {line.get_color() for line in axis.lines} == {module.COLOURS["pebble"]}
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["pebble (IQM of 5 runs)"]


def test_a_single_run_is_one_thin_line_without_a_band(drawn):
    (axis,) = drawn({"a/b": {"oracle": [rows([1.0, 2.0])]}})[0]
    (line,) = axis.lines
    assert line.get_linewidth() < 2
    assert not axis.collections
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["oracle"]


def test_success_is_a_second_row_for_the_environments_that_report_it(drawn):
    curves = {
        "c/d": {"pebble": [rows([1.0, 2.0])], "oracle": [rows([2.0, 3.0])]},
        "a/b": {"pebble": [rows([1.0, 2.0], [0.0, 0.5])], "oracle": [rows([1.0, 3.0])]},
    }
    axes = drawn(curves)
    assert axes.shape == (2, 2)
    assert [axis.get_title() for axis in axes[0]] == ["a/b", "c/d"]
    assert [[axis.get_visible() for axis in row] for row in axes] == [[True, True], [True, False]]
    (success,) = axes[1, 0].lines
    np.testing.assert_array_equal(success.get_ydata(), [0.0, 0.5])
    assert [text.get_text() for text in axes[0, 1].get_legend().get_texts()] == ["oracle", "pebble"]


def test_the_mean_is_drawn_where_all_runs_have_been(drawn):
    (axis,) = drawn({"a/b": {"a-parl": [rows([1.0, 2.0, 3.0]), rows([3.0, 4.0])]}})[0]
    np.testing.assert_array_equal(axis.lines[-1].get_xydata(), [[100, 2.0], [200, 3.0]])


def test_returns_below_zero_are_shown_and_others_begin_at_zero(drawn):
    for lowest, bottom in ((-50.0, -50.0), (20.0, 0.0)):
        (axis,) = drawn({"a/b": {"oracle": [rows([lowest, 100.0])]}})[0]
        assert axis.get_ylim()[0] <= bottom
        assert (axis.get_ylim()[0] == 0) == (lowest > 0)


def test_every_algorithm_has_a_colour_of_its_own():
    assert module.COLOURS.keys() >= ALGORITHMS.keys()
    assert len(set(module.COLOURS.values())) == len(module.COLOURS)
