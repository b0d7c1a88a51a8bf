"""What a person reads of a run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from parl_core.rl.rollout import Evaluation
from parl_core.training.display import describe, summary_table
from parl_core.training.run_folder import COLUMNS


def _row(**values):
    return {**dict.fromkeys(COLUMNS), "step": 100, "true_return_std": 0.25, "labels": 0, **values}


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.125, "0.125"), (642.31, "642.3"), (-1493.87, "-1493.9"), (12345.6, "12345.6"), (99.876, "99.88"), (0.0, "0")],
)
def test_returns_of_any_size_are_told_apart(value, shown):
    assert describe(_row(true_return=value)).split() == ["step", "100", "return", shown]


@pytest.mark.parametrize(("random", "ratio"), [(0.25, "2.0"), (0.0, "–"), (-2.0, "–")])
def test_the_table_compares_with_a_random_policy_only_if_that_earns_something(random, ratio):
    floor = Evaluation(true_return=random, true_return_std=0.0, success_rate=None, returns=(random,))
    console = Console(file=io.StringIO(), width=100)
    console.print(summary_table(floor, [_row(true_return=0.5)]))
    last = _last_evaluation(console)
    assert last == ["last evaluation", "100", "0.5", "0.25", ratio]


def test_large_returns_and_their_spread_are_no_powers_of_ten_in_the_table():
    floor = Evaluation(true_return=100.0, true_return_std=0.0, success_rate=None, returns=(100.0,))
    console = Console(file=io.StringIO(), width=100)
    console.print(summary_table(floor, [_row(true_return=12345.6, true_return_std=1234.5)]))
    assert _last_evaluation(console) == ["last evaluation", "100", "12345.6", "1234.5", "123.5"]


def _last_evaluation(console):
    last = next(line for line in console.file.getvalue().splitlines() if "last evaluation" in line)
    return [cell.strip() for cell in last.split("│")[1:-1]]
