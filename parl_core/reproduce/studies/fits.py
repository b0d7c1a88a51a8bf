"""Least-squares lines through logarithms."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Fit(NamedTuple):
    """y ≈ scale·rate^x, fitted to log y."""

    scale: float
    rate: float
    r_squared: float
    """Of log y."""


def geometric_fit(x: npt.ArrayLike, y: npt.ArrayLike) -> Fit:
    """Fit positive y (n,) at x (n,), n ≥ 2.

    Raises:
        ValueError: fewer than two points.
    """
    x, log_y = np.asarray(x, dtype=np.float64), np.log(np.asarray(y, dtype=np.float64))
    if len(x) < 2:
        raise ValueError(f"x must hold at least two points to fit a decay, got {len(x)}")
    slope, intercept = np.polyfit(x, log_y, 1)
    residual, spread = np.var(log_y - slope * x - intercept), np.var(log_y)
    return Fit(float(np.exp(intercept)), float(np.exp(slope)), float(1.0 - residual / spread) if spread else 1.0)


def log_log_slope(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Exponent p of y ≈ c·x^p for positive x and y."""
    return float(np.polyfit(np.log(np.asarray(x, dtype=np.float64)), np.log(np.asarray(y, dtype=np.float64)), 1)[0])
