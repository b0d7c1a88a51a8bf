"""The documented source of labels, and what is accepted as labels."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch

from parl_core.errors import ParlError
from parl_core.preference import label_sources
from parl_core.preference.label_sources import LabelError, check_labels


def test_the_example_runs():
    result = doctest.testmod(label_sources)
    assert result.attempted >= 4 and not result.failed


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([0.0, 1.0, 0.25, torch.nan]),
        torch.tensor([0.0, 1.0, 0.25, torch.nan], dtype=torch.float64, requires_grad=True),
        np.array([0.0, 1.0, 0.25, np.nan]),
        [0, 1, 0.25, float("nan")],
    ],
)
def test_labels_of_any_kind_become_float32(labels):
    checked = check_labels(labels, 4)
    assert checked.dtype == torch.float32 and not checked.requires_grad
    torch.testing.assert_close(checked, torch.tensor([0.0, 1.0, 0.25, torch.nan]), equal_nan=True, rtol=0, atol=0)


def test_whole_numbers_and_truth_values_are_labels():
    assert check_labels(torch.tensor([1, 0]), 2).tolist() == [1.0, 0.0]
    assert check_labels(np.array([True, False]), 2).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3), r"shape \(2,\), one real number for each query, got shape \(3,\)"),
        (torch.zeros(2, 1), r"got shape \(2, 1\)"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (0.5, r"got shape \(\)"),
        (None, "2 numbers, one for each query, got None"),
        (["first", "second"], "one for each query, got"),
        ([[0.1], [0.2, 0.3]], "one for each query, got"),
        ([0.5, 1.5], r"lie in \[0, 1\] or be NaN for a skipped query, got 1.5 for query 1"),
        ([-1.0, 0.0], "got -1.0 for query 0"),
        ([float("nan"), float("inf")], "got inf for query 1"),
        ([float("-inf"), 0.5], "got -inf for query 0"),
    ],
)
def test_what_are_no_labels_is_refused(labels, message):
    with pytest.raises(LabelError, match=message) as caught:
        check_labels(labels, 2)
    assert isinstance(caught.value, ParlError)
