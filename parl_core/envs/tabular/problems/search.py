"""Maxima on a box by search: no gradients, so that what ascent reaches can be held against them.

grid_search      the whole box on a grid, then finer grids around its best cells: for up to three dimensions
pattern_search   local, from many starts, a few coordinates at a time: for more, and no proof of a global maximum
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..mdp import Array

_MAX_GRID = 10**6  # points of a grid
_FINE = 5  # points along each side of the grid around a kept cell: the spacing is halved each time


class Maximum(NamedTuple):
    """The best point that a search has seen."""

    point: Array
    """(D,)."""
    value: float
    """The function there, so at most its maximum."""
    resolution: float
    """Spacing of the last grid, as a share of the box's sides."""
    evaluations: int
    """Of the function."""


def grid_search(
    function: Callable[[Array], Array],
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    *,
    points: int = 101,
    kept: int = 10,
    tolerance: float = 1e-6,
) -> Maximum:
    """The maximum over a box by exhaustion: a grid over all of it, then ever finer ones around the best cells.

    The best `kept` points that no neighbour on the grid exceeds are refined, each on its own, until the spacing is at most
    `tolerance`. It may miss the global maximum in a peak narrower than the first grid's spacing, or if `kept` other peaks
    look better on that grid. A function of Lipschitz constant L is nowhere above the first grid's best by more than L times
    half a cell's diagonal.

    Args:
        function: (N, D) points to (N,) values.
        low, high: (D,) corners of the box, 1 ≤ D ≤ 3.
        points: along each side of the first grid, ends included.
        tolerance: spacing at which to stop, as a share of the sides.

    Raises:
        ValueError: a box that is none or has more dimensions, a grid too small or beyond 10⁶ points.
    """
    low, high = _checked_box(low, high)
    dimension = len(low)
    if dimension > 3:
        raise ValueError(f"low must have at most 3 entries for an exhaustive grid, got {dimension}: use pattern_search")
    if points < 3 or points**dimension > _MAX_GRID:
        raise ValueError(f"points must be at least 3 and make a grid of at most {_MAX_GRID}, got {points}")
    if kept < 1:
        raise ValueError(f"kept must be at least 1, got {kept}")
    _check_tolerance(tolerance)

    def at(shares: Array) -> Array:  # of the sides, (N, D)
        return function(low + shares * (high - low))

    grid = _lattice(np.linspace(0.0, 1.0, points), dimension)
    values = at(grid)
    evaluations = len(grid)
    peaks = np.flatnonzero(_is_peak(values.reshape((points,) * dimension)).reshape(-1))
    centres = grid[peaks[np.argsort(-values[peaks], kind="stable")[:kept]]]
    spacing = 1.0 / (points - 1)
    finer = _lattice(np.linspace(-1.0, 1.0, _FINE), dimension)
    while True:
        candidates = np.clip(centres[:, None] + spacing * finer, 0.0, 1.0)  # (kept, 5^D, D)
        values = at(candidates.reshape(-1, dimension)).reshape(len(centres), -1)
        evaluations += values.size
        spacing *= 2.0 / (_FINE - 1)
        best = values.argmax(axis=1)
        centres = candidates[np.arange(len(centres)), best]
        if spacing <= tolerance:
            winner = int(values.max(axis=1).argmax())
            return Maximum(low + centres[winner] * (high - low), float(values[winner].max()), spacing, evaluations)


def pattern_search(
    function: Callable[[Array], Array],
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    *,
    starts: int = 20,
    block: int = 2,
    points: int = 5,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> Maximum:
    """A good local maximum over a box of many dimensions; that it is the global one is likely, not proven.

    From each of `starts` uniform points: `block` coordinates at a time, the best point of a grid around the current one is
    taken; when no block improves, the grid's reach is halved, from half the box to `tolerance`. A pattern search, whose
    limit is a stationary point of a smooth function (Kolda, Lewis and Torczon, SIAM Review 2003).

    Args:
        function, low, high: as in `grid_search`, of any dimension.
        block: coordinates that are moved together.
        points: along each side of a block's grid; odd, so that the current point is one of them.
        tolerance: reach at which to stop, as a share of the sides.
        seed: of the starts.

    Raises:
        ValueError: a box that is none, an argument out of range.
    """
    low, high = _checked_box(low, high)
    for name, number in (("starts", starts), ("block", block)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points must be odd and at least 3, got {points}")
    _check_tolerance(tolerance)
    dimension = len(low)
    blocks = [np.arange(first, min(first + block, dimension)) for first in range(0, dimension, block)]
    best = Maximum(low, -np.inf, tolerance, 0)
    evaluations = 0
    for start in np.random.default_rng(seed).random((starts, dimension)):
        centre, reach = start, 0.5
        value = float(function((low + centre * (high - low))[None])[0])
        evaluations += 1
        while True:
            improved = False
            for chosen in blocks:
                candidates = np.repeat(centre[None], points ** len(chosen), axis=0)
                candidates[:, chosen] += reach * _lattice(np.linspace(-1.0, 1.0, points), len(chosen))
                candidates = np.clip(candidates, 0.0, 1.0)
                values = function(low + candidates * (high - low))
                evaluations += len(candidates)
                top = int(values.argmax())
                if values[top] > value:
                    centre, value, improved = candidates[top], float(values[top]), True
            if not improved:
                if reach <= tolerance:
                    break
                reach /= 2.0
        if value > best.value:
            best = Maximum(low + centre * (high - low), value, 2.0 * reach / (points - 1), evaluations)
    return best._replace(evaluations=evaluations)


def _lattice(ticks: Array, dimension: int) -> Array:
    """All points (len(ticks)^D, D) whose coordinates are ticks."""
    return np.stack(np.meshgrid(*[ticks] * dimension, indexing="ij"), axis=-1).reshape(-1, dimension)


def _is_peak(values: Array) -> npt.NDArray[np.bool_]:
    """Where no neighbour along an axis or a diagonal has more."""
    padded = np.pad(values, 1, constant_values=-np.inf)
    inner = tuple(slice(1, -1) for _ in values.shape)
    highest = padded
    for axis in range(values.ndim):  # the maximum over a cube of neighbours, one axis after the other
        ahead, behind = np.roll(highest, 1, axis), np.roll(highest, -1, axis)
        highest = np.maximum(highest, np.maximum(ahead, behind))
    return values >= highest[inner]


def _checked_box(low: npt.ArrayLike, high: npt.ArrayLike) -> tuple[Array, Array]:
    low, high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    if low.ndim != 1 or low.shape != high.shape or not len(low):
        raise ValueError(f"low and high must have one shape (D,), got {low.shape} and {high.shape}")
    if not (np.isfinite(low) & np.isfinite(high) & (low < high)).all():
        raise ValueError(f"low must be below high and both finite, got {low.tolist()} and {high.tolist()}")
    return low, high


def _check_tolerance(tolerance: float) -> None:
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance}")
