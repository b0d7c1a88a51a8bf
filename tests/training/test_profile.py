"""Seconds by section, with a clock that the test moves."""

from __future__ import annotations

import time

import pytest
from rich.console import Console

from parl_core.training.profile import Profile, profile_table


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_only_the_innermost_sections_clock_runs(clock):
    profile = Profile()
    clock[0] = 5.0
    with profile.section("reward learning"):
        clock[0] += 1.0
        hook = profile.timed("hypergradient", lambda value: clock.__setitem__(0, clock[0] + 10.0) or value)
        hook(None)
        clock[0] += 2.0
        with profile.section("reward learning"):
            clock[0] += 4.0
    clock[0] += 100.0  # outside of all
    with pytest.raises(ValueError), profile.section("simulator"):
        clock[0] += 0.5
        raise ValueError
    spent = {name: seconds for name, seconds in profile.seconds.items() if seconds}
    assert spent == {"reward learning": 7.0, "hypergradient": 10.0, "simulator": 0.5}


def test_a_section_without_a_name_is_an_error():
    with pytest.raises(KeyError):
        Profile().section("simulators")


def test_the_table_adds_up():
    console = Console(width=100, record=True)
    console.print(profile_table({"simulator": 2.0, "policy": 0.0, "SAC update": 5.0}, total=8.0, steps=4000))
    shown = console.export_text()
    assert "500 environment steps/s: 4000 in 8.0 s" in shown
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in shown.splitlines() if line.startswith("│")}
    assert {name: [cell.strip() for cell in cells] for name, cells in rows.items()} == {
        "simulator": ["2.00", "25.0%", "500.0"],
        "SAC update": ["5.00", "62.5%", "1250.0"],
        "everything else": ["1.00", "12.5%", "250.0"],
    }
