"""Statistics of several runs, after Agarwal et al., "Deep RL at the edge of the statistical precipice" (NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

RESAMPLES = 5000
_BLOCK = 1 << 22
"""Resampled numbers held at once, at most: 32 MiB."""


class Interval(NamedTuple):
    """A point estimate and its confidence interval; each of the shape of the scores' trailing axes."""

    value: Array
    low: Array
    high: Array


def interquartile_mean(scores: ArrayLike, axis: int = 0) -> Array:
    """Mean of what is left when ⌊n/4⌋ of the n scores are cut off at either end; NaN where a score is NaN.

    Whole scores are cut off, as in `scipy.stats.trim_mean(scores, 0.25)`: below 4 scores it is their mean.
    """
    ordered = np.sort(np.moveaxis(np.asarray(scores, dtype=np.float64), axis, 0), axis=0)  # NaNs come last
    cut = len(ordered) // 4
    return np.where(np.isnan(ordered[-1]), np.nan, ordered[cut : len(ordered) - cut].mean(axis=0))


def bootstrap_iqm(
    tasks: Sequence[ArrayLike], *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Interquartile mean over all runs of all tasks, with its stratified bootstrap percentile interval.

    A resample draws the runs of every task with replacement from the runs of that task, so that each keeps its weight; a
    run's trailing axes (the points of its curve) stay together. With a handful of runs the interval is too short: it
    knows no other values than those that were seen.

    Args:
        tasks: for each task the scores of its runs, (runs, …); tasks may have different numbers of runs.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: no task, or one without runs.
    """
    strata = [np.asarray(scores, dtype=np.float64) for scores in tasks]
    if not strata or any(scores.ndim == 0 or len(scores) == 0 for scores in strata):
        raise ValueError(
            f"tasks must hold at least one run for every task, got shapes {[scores.shape for scores in strata]}"
        )
    random = np.random.default_rng(seed)
    # One draw for all points of a curve; the draws come first, so that they do not depend on how points are blocked.
    chosen = [random.integers(len(scores), size=(resamples, len(scores))) for scores in strata]
    value = interquartile_mean(np.concatenate(strata))
    points = [scores.reshape(len(scores), -1) for scores in strata]
    low, high = np.empty(points[0].shape[1]), np.empty(points[0].shape[1])
    width = max(1, _BLOCK // (resamples * sum(map(len, strata))))
    tail = 100 * (1 - confidence) / 2
    for start in range(0, len(low), width):
        block = slice(start, start + width)
        drawn = [scores[:, block][rows] for scores, rows in zip(points, chosen, strict=True)]
        estimates = interquartile_mean(np.concatenate(drawn, axis=1), axis=1)
        low[block], high[block] = np.percentile(estimates, [tail, 100 - tail], axis=0)
    return Interval(value, low.reshape(value.shape), high.reshape(value.shape))


def area_under_curve(steps: ArrayLike, values: ArrayLike) -> float:
    """The curve's mean over the steps that it spans, by the trapezoid rule, in the unit of its values.

    The area is divided by its width: that of a constant curve is the constant, and so is that of a single point.

    Args:
        steps: (n,), increasing.
        values: (n,).
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(x) == 1:
        return float(y[0])
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2 / (x[-1] - x[0]))


def first_reached(values: ArrayLike, threshold: float) -> int | None:
    """Index of the first evaluation at or above `threshold`; None if there is none.

    There is no interpolation between evaluations: what is reported is a policy that was seen to be that good.
    """
    reached = np.flatnonzero(np.asarray(values, dtype=np.float64) >= threshold)
    return int(reached[0]) if len(reached) else None


def aligned(runs: Sequence[Sequence[Mapping[str, float]]], column: str) -> tuple[Array, Array]:
    """The steps (n,) at which all runs have a value of `column`, and these values, (runs, n)."""
    tables = [{row["step"]: row[column] for row in rows if column in row} for rows in runs]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    values = [[table[step] for step in steps] for table in tables]
    return np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64).reshape(len(tables), len(steps))
