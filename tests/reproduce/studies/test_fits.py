"""Fits of exact laws, and of one with a known deviation."""

from __future__ import annotations

import numpy as np
import pytest

from parl_core.reproduce.studies.fits import geometric_fit, log_log_slope


def test_an_exact_decay_is_found():
    x = np.array([0, 1, 5, 9])
    fit = geometric_fit(x, 3.0 * 0.8**x)
    assert fit == pytest.approx((3.0, 0.8, 1.0))


def test_r_squared_by_hand():
    """log y = (0, 1, 1): slope 1/2, intercept 1/6, residuals (−1, 2, −1)/6, of variance 1/18 against 2/9."""
    fit = geometric_fit([0, 1, 2], np.exp([0.0, 1.0, 1.0]))
    assert np.log(fit[:2]) == pytest.approx([1 / 6, 1 / 2])
    assert fit.r_squared == pytest.approx(0.75)


def test_one_point_is_no_decay():
    with pytest.raises(ValueError, match="at least two points to fit a decay, got 1"):
        geometric_fit([1], [0.5])


def test_an_exact_power_law_is_found():
    x = np.array([1.0, 3.0, 10.0, 50.0])
    assert log_log_slope(x, 7.0 * x**-1.25) == pytest.approx(-1.25)
