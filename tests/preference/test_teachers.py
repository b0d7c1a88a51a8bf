"""The oracle teacher, by hand."""

from __future__ import annotations

import pytest
import torch

from parl_core.errors import NonFiniteError
from parl_core.preference.teachers import OracleTeacher


def test_labels_by_hand():
    first = torch.tensor([[1.0, 2.0], [5.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    second = torch.tensor([[2.0, 2.0], [1.0, 1.0], [2.0, 1.0], [-1e-30, 0.0]])
    labels = OracleTeacher().label(first, second)
    assert labels.dtype == torch.float32
    assert labels.tolist() == [1.0, 0.0, 0.5, 0.0]


def test_a_difference_below_float32_rounding_of_the_sum_still_counts():
    first = torch.full((1, 50), 1e4)
    second = first.clone()
    second[0, 0] += 2**-10
    assert OracleTeacher().label(first, second).tolist() == [1.0]


def test_bad_rewards_are_refused():
    rewards = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(2, 4\)"):
        OracleTeacher().label(rewards, rewards[:2])
    bad = rewards.clone()
    bad[1, 1] = torch.inf
    with pytest.raises(NonFiniteError, match="second_true_rewards must be finite"):
        OracleTeacher().label(rewards, bad)
