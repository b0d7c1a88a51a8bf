"""Means and errors against numbers worked out by hand."""

import numpy as np
import pytest

from parl_core.reproduce.statistics import mean_and_error, mean_with_error, shown


def test_mean_and_error():
    mean, error = mean_and_error([1.0, 2.0, 6.0])
    assert mean == 3.0 and error == pytest.approx(np.sqrt(7.0 / 3.0))
    assert np.isnan(mean_and_error([1.0])[1])


def test_how_they_are_printed():
    assert mean_with_error([1.0, 2.0, 3.0, 4.0], 3) == "2.500 ± 0.645"  # √(5/3)/√4
    assert mean_with_error([7.0], 1) == "7.0"
    assert shown(0.5834, 0.00061) == "0.583 ± 0.001" and shown(1.0, float("nan")) == "1.000"
