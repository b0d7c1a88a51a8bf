"""Verdicts that know the noise."""

from __future__ import annotations

import pytest
from rich.console import Console

from parl_core.bench.compare import changes, comparison
from parl_core.bench.results import Contest
from parl_core.errors import ConfigError
from tests.bench.measured import hvp, results, timed


def one(median, spread):
    return results(Contest(topic="t", name="n", entries=(timed("parl-core", median, spread, ours=True),)))


@pytest.mark.parametrize(
    "before, after, verdict",
    [
        ((1.0, 0.1), (0.7, 0.1), "faster"),  # 0.63 … 0.77 below 0.9 … 1.1
        ((1.0, 0.1), (0.85, 0.1), "within noise"),  # 0.935 reaches into it
        ((1.0, 0.3), (0.7, 0.1), "within noise"),
        ((1.0, 0.1), (1.4, 0.1), "slower"),
        ((1.0, 0.1), (1.2, 0.1), "within noise"),
        ((1.0, 0.0), (1.0, 0.0), "within noise"),
        ((1.0, 0.0), (1.01, 0.0), "slower"),
    ],
)
def test_verdict(before, after, verdict):
    (change,), alone = changes(one(*before), one(*after))
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(after[0])
    assert alone == []


def test_only_what_was_timed_in_both_is_compared():
    """JAX is not in the second; hvp h256 is not in the first; the withheld are in neither."""
    old, new = hvp(), hvp()
    new = Contest(topic=new.topic, name=new.name, entries=new.entries[:1] + new.entries[2:])
    both, alone = changes(results(old), results(new, hvp(size="h256")))
    assert [(change.contest.name, change.after.name) for change in both] == [("hvp h64", "parl-core")]
    assert alone == [
        "linearization hvp h64 JAX",
        "linearization hvp h256 parl-core",
        "linearization hvp h256 JAX",
    ]


def test_nothing_in_common():
    with pytest.raises(ConfigError, match="no contestant in common"):
        changes(results(hvp()), one(1.0, 0.1))


def test_what_is_printed():
    console = Console(width=150)
    with console.capture() as capture:
        before = results(hvp(), commit="old")
        for part in comparison(before, results(hvp(ours=5e-4), commit="new", threads=1)):
            console.print(part, markup=False)
    text = capture.get()
    (ours,) = [line for line in text.splitlines() if "parl-core" in line]
    assert [cell.strip() for cell in ours.strip("│").split("│")] == [
        "linearization: hvp h64", "parl-core", "1 ms", "500 µs", "0.5", "faster",
    ]  # fmt: skip
    assert text.splitlines()[-2:] == ["threads: 2 before, 1 after", "commit: old before, new after"]
