"""Means with their errors, and how they are printed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error std(ddof=1)/√n; the error of a single value is NaN."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return float(np.mean(values)), error


def shown(mean: float, error: float, digits: int = 3) -> str:
    """As `0.583 ± 0.001`, or the mean alone where there is no error."""
    return f"{mean:.{digits}f}" if np.isnan(error) else f"{mean:.{digits}f} ± {error:.{digits}f}"


def mean_with_error(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard error of these values, printed."""
    return shown(*mean_and_error(values), digits)
