"""Statistics of runs against hand-computed cases, scipy, and what is known of a distribution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from parl_core.comparison import statistics
from parl_core.comparison.statistics import aligned, area_under_curve, bootstrap_iqm, first_reached, interquartile_mean


@pytest.mark.parametrize(
    ("scores", "mean"),
    [
        ([7.0], 7.0),
        ([1.0, 2.0], 1.5),
        ([0.0, 1.0, 5.0], 2.0),  # three runs: nothing is cut off
        ([100.0, 2.0, 1.0, -50.0], 1.5),
        ([100.0, 2.0, 1.0, 3.0, -50.0], 2.0),
        ([8.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 4.5),
    ],
)
def test_the_interquartile_mean_by_hand(scores, mean):
    assert interquartile_mean(scores) == mean


@settings(max_examples=50, deadline=None)
@given(arrays.arrays(float, st.tuples(st.integers(1, 13), st.integers(1, 3)), elements=st.floats(-1e3, 1e3)))
def test_the_interquartile_mean_is_scipys_trimmed_mean(scores):
    for axis in (0, 1):
        np.testing.assert_allclose(
            interquartile_mean(scores, axis=axis), stats.trim_mean(scores, 0.25, axis=axis), rtol=0, atol=1e-10
        )


def test_a_run_that_is_not_a_number_is_not_cut_off():
    assert np.isnan(interquartile_mean([1.0, 2.0, 3.0, 4.0, np.nan]))
    np.testing.assert_array_equal(interquartile_mean([[1.0, np.nan], [3.0, 0.0]]), [2.0, np.nan])


def test_the_bootstrap_finds_the_percentiles_of_all_resamples():
    """Two tasks of two and three runs: every resample can be written down."""
    tasks = [np.array([0.0, 10.0]), np.array([1.0, 2.0, 6.0])]
    draws = itertools.product(itertools.product(tasks[0], repeat=2), itertools.product(tasks[1], repeat=3))
    exact = np.sort([stats.trim_mean([*first, *second], 0.25) for first, second in draws])
    found = bootstrap_iqm(tasks, confidence=0.6, resamples=20_000)
    assert found.value == stats.trim_mean([0.0, 10.0, 1.0, 2.0, 6.0], 0.25) == 3.0
    # The 108 resamples take few values, so the percentiles are met exactly.
    assert found.low == np.percentile(exact, 20, method="inverted_cdf")
    assert found.high == np.percentile(exact, 80, method="inverted_cdf")
    assert exact[0] < found.low < found.value < found.high < exact[-1]


def test_runs_are_drawn_within_their_task():
    """A task without spread adds none, however far it is from the other: pooled draws would span all of it."""
    tasks = [np.zeros(4), np.full(4, 100.0)]
    assert bootstrap_iqm(tasks) == (50.0, 50.0, 50.0)


def test_the_points_of_a_curve_are_drawn_together_and_do_not_depend_on_blocks(monkeypatch):
    curves = np.random.default_rng(0).normal(size=(5, 7)).cumsum(axis=1)
    whole = bootstrap_iqm([curves, 2 * curves[:3]])
    monkeypatch.setattr(statistics, "_BLOCK", 1)
    for part, again in zip(whole, bootstrap_iqm([curves, 2 * curves[:3]]), strict=True):
        np.testing.assert_array_equal(part, again)
        assert part.shape == (7,)
    alone = bootstrap_iqm([curves[:, 4], 2 * curves[:3, 4]])
    assert (whole.low[4], whole.high[4]) == (alone.low, alone.high)
    assert np.all(whole.low <= whole.value)
    assert np.all(whole.value <= whole.high)


def test_the_bootstrap_repeats_itself_and_other_seeds_differ():
    scores = np.random.default_rng(1).normal(size=20)
    assert bootstrap_iqm([scores]) == bootstrap_iqm([scores])
    assert bootstrap_iqm([scores], resamples=100).low != bootstrap_iqm([scores], resamples=100, seed=1).low


def test_the_interval_covers_as_often_as_it_says():
    """Two tasks of 30 normal runs about −1 and 1: the interquartile mean of their equal mixture is 0, by symmetry.

    At a true coverage of .90 the number of hits in 400 is binomial with deviation 6, so that of a percentile interval at
    this size (.93 to .95) lies in 352 … 392 but for a chance below 1e-3.
    """
    random = np.random.default_rng(2)
    hits = 0
    for seed in range(400):
        samples = [random.normal(-1, size=30), random.normal(1, size=30)]
        interval = bootstrap_iqm(samples, resamples=400, seed=seed)
        hits += bool(interval.low <= 0 <= interval.high)
    assert 352 <= hits <= 392


def test_tasks_without_runs_are_refused():
    for tasks in ([], [[1.0], []], [3.0]):
        with pytest.raises(ValueError, match="at least one run for every task"):
            bootstrap_iqm(tasks)


def test_the_area_under_a_curve_by_hand():
    assert area_under_curve([10, 20, 40], [0.0, 4.0, 6.0]) == pytest.approx((10 * 2 + 20 * 5) / 30)
    assert area_under_curve([5], [3.0]) == 3.0
    steps = np.array([0.0, 1.0, 4.0, 9.0, 20.0])
    values = np.random.default_rng(3).normal(size=5)
    assert area_under_curve(steps, values) == pytest.approx(np.trapezoid(values, steps) / 20)


def test_a_threshold_is_reached_at_an_evaluation_not_between_two():
    values = [1.0, 3.0, 2.0, 5.0]
    assert [first_reached(values, threshold) for threshold in (0.0, 2.0, 3.0, 3.1, 5.0, 5.1)] == [0, 1, 1, 3, 3, None]


def test_curves_are_aligned_at_the_steps_that_all_have():
    runs = [
        [{"step": 1.0, "true_return": 2.0}, {"step": 2.0, "true_return": 4.0}, {"step": 4.0, "true_return": 5.0}],
        [{"step": 4.0, "true_return": 6.0}, {"step": 1.0, "true_return": 4.0}, {"step": 2.0, "labels": 0.0}],
    ]
    steps, values = aligned(runs, "true_return")
    np.testing.assert_array_equal(steps, [1.0, 4.0])
    np.testing.assert_array_equal(values, [[2.0, 5.0], [4.0, 6.0]])
    assert aligned([], "true_return")[1].shape == (0, 0)
