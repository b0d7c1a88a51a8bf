"""Labels of a session, by hand and by the formulas."""

from __future__ import annotations

import pytest

from parl_core.errors import UnknownNameError
from parl_core.preference.schedules import SCHEDULES, labels_in_session


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 0, 50),
        ("constant", 1000, 50),
        ("decreasing", 0, 50),
        ("decreasing", 100, 45),
        ("decreasing", 110, 44),  # 44.5
        ("decreasing", 985, 1),  # 0.75
        ("decreasing", 1000, 1),
        ("increasing", 1, 50),
        ("increasing", 0, 49),  # 49.95
        ("increasing", 501, 100),
        ("increasing", 701, 166),  # 166.67
        ("increasing", 1000, 50_000),
    ],
)
def test_labels_by_hand(schedule, step, expected):
    assert labels_in_session(schedule, 50, step, 1000) == expected


def test_the_factor_is_rounded_to_a_double_first():
    assert labels_in_session("decreasing", 100, 710, 1000) == 28
    assert labels_in_session("constant", 29, 710, 1000) == 29


def test_what_is_no_session_is_refused():
    with pytest.raises(UnknownNameError, match="decreasing"):
        labels_in_session("decreasin", 50, 0, 1000)
    with pytest.raises(ValueError, match="labels_per_session must be at least 1, got 0"):
        labels_in_session("constant", 0, 0, 1000)
    for step, total in ((-1, 10), (11, 10), (0, 0)):
        with pytest.raises(ValueError, match=rf"total_steps = {total}\].*got step {step}"):
            labels_in_session("constant", 50, step, total)
    assert SCHEDULES == ("constant", "decreasing", "increasing")
