"""Contests with contestants whose times are given: what is timed, in which order, and what is made of it."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.harness import Peer, WrongAnswer, against, copy_floor, gemm_floor, moved_alike
from benchmarks.harness.clock import seconds_per_call
from benchmarks.harness.contest import MAX_ROUNDS, MIN_ROUNDS, run_contest
from benchmarks.harness.floors import Floor
from benchmarks.harness.memory import peak_mib

ANSWER = torch.tensor([1.0, 2.0])
right = against(ANSWER, rtol=1e-6)


class Stopwatch:
    """A timer that runs nothing and tells the times that each function was given, one for each round."""

    def __init__(self):
        self.given, self.order = {}, []

    def runner(self, name, *seconds, answer=ANSWER):
        """A maker of a contestant with these times, of which the last is repeated."""

        def run():
            return answer

        def times():
            yield from seconds
            while True:
                yield seconds[-1]

        self.given[run] = (name, times())
        return lambda: run

    def __call__(self, run):
        name, times = self.given[run]
        self.order.append(name)
        return next(times)


def contest(watch, rounds=MIN_ROUNDS, **options):
    """Of `rounds` rounds."""
    ticks = count()  # the clock is read once at the start and once before each round
    result, _ = run_contest(
        "topic",
        "name",
        right,
        timer=watch,
        clock=lambda: float(next(ticks)),
        seconds=rounds + 1,
        **options,
    )
    return result, {entry.name: entry for entry in result.entries}


def test_everyone_takes_turns_with_the_floor_and_the_gradient():
    watch = Stopwatch()
    floor = Floor(watch.runner("floor", 1.0)(), 1.0, "work")
    _, entries = contest(
        watch,
        ours={"ours": watch.runner("ours", 1.0)},
        peers={"peer": watch.runner("peer", 1.0)},
        floor=floor,
        gradient=watch.runner("gradient", 1.0),
    )
    assert watch.order == ["ours", "peer", "floor", "gradient"] * MIN_ROUNDS
    assert entries["ours"].rounds == MIN_ROUNDS


def test_quartiles_and_ratios():
    """A round that is slow for all changes the times, not the ratios."""
    watch = Stopwatch()
    slow = [1.0, 2.0, 3.0, 5.0, 11.0, 9.0, 10.0]
    result, entries = contest(
        watch,
        ours={"ours": watch.runner("ours", *(2e-3 * factor for factor in slow))},
        peers={
            "near": watch.runner("near", *(3e-3 * factor for factor in slow)),
            "far": watch.runner("far", *(8e-3 * factor for factor in slow)),
            "tied": Peer(watch.runner("tied", *(1e-3 * factor for factor in slow)), "compiled for one θ"),
        },
        floor=Floor(watch.runner("floor", *(0.5e-3 * factor for factor in slow))(), 3.0, "work"),
        gradient=watch.runner("gradient", *(4e-3 * factor for factor in slow)),
    )
    ours = entries["ours"]
    quartiles = (ours.lower_quartile, ours.median, ours.upper_quartile)
    assert quartiles == pytest.approx(tuple(np.quantile(2e-3 * np.array(slow), [0.25, 0.5, 0.75])))
    assert ours.speedup == pytest.approx(0.5)
    assert ours.speedup_unlimited == pytest.approx(1.5)
    assert ours.to_floor == pytest.approx(2 / 1.5)
    assert ours.gradients == pytest.approx(0.5)
    assert entries["near"].speedup == pytest.approx(1 / 3)  # of the peers only, and not of itself
    assert entries["tied"].speedup == pytest.approx(3.0)
    assert entries["tied"].speedup_unlimited is None
    assert entries["tied"].limited == "compiled for one θ"
    assert (result.floor, result.gradient) == pytest.approx((7.5e-3, 20e-3))  # medians: the fifth of slow
    assert result.fastest == entries["tied"]


def test_ratios_are_taken_within_rounds():
    """The medians are the same, 5; in most rounds the peer takes three times as long."""
    watch = Stopwatch()
    _, entries = contest(
        watch,
        ours={"ours": watch.runner("ours", 1.0, 1.0, 1.0, 5.0, 9.0, 9.0, 9.0)},
        peers={"peer": watch.runner("peer", 3.0, 3.0, 3.0, 5.0, 27.0, 9.0, 9.0)},
    )
    assert entries["ours"].median == entries["peer"].median
    assert entries["ours"].speedup == 3.0


def test_without_limited_peers_there_is_one_speedup():
    watch = Stopwatch()
    _, entries = contest(watch, ours={"ours": watch.runner("ours", 1.0)}, peers={"peer": watch.runner("peer", 4.0)})
    assert entries["ours"].speedup == 4.0
    assert entries["ours"].speedup_unlimited is None
    assert entries["peer"].speedup is None  # it has no other peer
    assert entries["ours"].to_floor is None
    assert entries["ours"].gradients is None


@pytest.mark.parametrize(
    "answer", [torch.tensor([1.0, 2.1]), torch.tensor([1.0, math.nan]), torch.ones(3), [ANSWER, ANSWER], np.zeros(2)]
)
def test_a_wrong_answer_has_no_speed(answer):
    watch = Stopwatch()
    result, entries = contest(
        watch,
        ours={"ours": watch.runner("ours", 1.0)},
        peers={"wrong": watch.runner("wrong", 0.1, answer=answer), "right": watch.runner("right", 3.0)},
    )
    wrong = entries["wrong"]
    assert "wrong" not in watch.order
    assert (wrong.median, wrong.lower_quartile, wrong.speedup, wrong.peak_mib) == (None,) * 4
    assert wrong.withheld.startswith("wrong: ")
    assert result.broken == [wrong]
    assert entries["ours"].speedup == 3.0  # it is no best peer either


def test_an_answer_that_turns_wrong_while_it_is_timed_has_no_speed():
    watch, calls = Stopwatch(), count()

    def decays():
        return ANSWER * (1.0 if next(calls) < 1 else 1.01)

    watch.given[decays] = ("decays", iter([1.0] * 99))
    result, entries = contest(watch, ours={"ours": watch.runner("ours", 1.0), "decays": lambda: decays})
    assert entries["decays"].median is None
    assert entries["decays"].withheld.startswith("wrong after having been timed: its error is")
    assert result.broken == [entries["decays"]]


def test_what_is_missing_and_what_breaks():
    watch = Stopwatch()

    def missing():
        import a_package_that_nobody_has  # noqa: F401

    def broken():
        raise RuntimeError("first line\nsecond line")

    def breaks_when_called():
        return broken

    result, entries = contest(
        watch,
        ours={"ours": watch.runner("ours", 1.0)},
        peers={"missing": missing, "broken": broken, "breaks": breaks_when_called},
    )
    assert entries["missing"].withheld == "not installed: No module named 'a_package_that_nobody_has'"
    assert entries["broken"].withheld == entries["breaks"].withheld == "failed: RuntimeError: first line"
    assert result.broken == [entries["broken"], entries["breaks"]]
    assert entries["ours"].median == 1.0


def test_ours_cannot_be_missing():
    def missing():
        import a_package_that_nobody_has  # noqa: F401

    watch = Stopwatch()
    result, entries = contest(watch, ours={"ours": missing, "other": watch.runner("other", 1.0)})
    assert entries["ours"].withheld.startswith("failed: ModuleNotFoundError: No module named")
    assert result.broken == [entries["ours"]]


def test_nobody_is_fit():
    watch = Stopwatch()
    floor = Floor(watch.runner("floor", 1.0)(), 1.0, "work")
    result, _ = contest(watch, ours={"ours": watch.runner("ours", 1.0, answer=0)}, floor=floor)
    assert watch.order == []
    assert result.fastest is None


def test_the_number_of_rounds_is_bounded():
    for seconds, tick, rounds in ((0.0, 0.0, MIN_ROUNDS), (9.0, 0.0, MAX_ROUNDS), (1e9, 21.0, 3), (1e9, 11.9, 5)):
        watch, ticks = Stopwatch(), count()
        _, times = run_contest(
            "",
            "",
            right,
            ours={"ours": watch.runner("ours", 1.0)},
            timer=watch,
            seconds=seconds,
            clock=lambda tick=tick, ticks=ticks: tick * next(ticks),
        )
        assert len(times["ours"]) == rounds
    watch = Stopwatch()
    _, entries = contest(watch, ours={"ours": watch.runner("ours", 1.0)}, rounds=MIN_ROUNDS + 5)
    assert entries["ours"].rounds == MIN_ROUNDS + 5


def test_errors_are_relative_to_the_largest_entry():
    check = against([torch.tensor([0.0, 100.0]), torch.tensor([1.0])], rtol=1e-2)
    assert check((np.array([0.5, 100.0]), np.ones(1))) == pytest.approx(5e-3)
    with pytest.raises(WrongAnswer, match=r"2\.0e-02"):
        check((np.array([2.0, 100.0]), np.ones(1)))
    assert against(torch.zeros(2), 1e-3)(torch.full((2,), 5e-4)) == pytest.approx(5e-4)  # nothing to be relative to
    with pytest.raises(WrongAnswer):
        check(np.array([0.0, 100.0]))


def test_blocks_are_judged_by_their_own_largest_entry():
    reference = torch.tensor([[1e-2, 1e-2, 100.0], [1e-2, 2e-2, 50.0]])
    wrong = reference.clone()
    wrong[1, 0] = 0.0
    assert against(reference, 1e-3)(wrong) == pytest.approx(1e-4)
    check = against(reference, 1e-3, blocks=[2, 1])
    assert check(reference) == 0.0
    with pytest.raises(WrongAnswer, match=r"5\.0e-01"):
        check(wrong)
    with pytest.raises(ValueError, match=r"blocks must add up to the last dimension, got \[2\]"):
        against(reference, 1e-3, blocks=[2])


@pytest.mark.parametrize("check_of", [lambda x: against(x, 1e-3), lambda x: moved_alike(np.zeros(2), x, 1e-3)])
def test_an_answer_in_the_references_own_memory_is_checked(check_of):
    reference = torch.tensor([1.0, 2.0], dtype=torch.float64)
    check = check_of(reference)
    reference[0] = 5.0
    with pytest.raises(WrongAnswer):
        check(reference)


def test_training_is_judged_by_the_way_it_went():
    start, end = [torch.full((4,), 100.0), torch.zeros(1)], [torch.full((4,), 100.5), torch.ones(1)]
    check = moved_alike(start, end, rtol=0.1)
    assert check(end) == 0.0
    assert check([torch.tensor([100.5, 100.5, 100.5, 100.6]), torch.ones(1)]) == pytest.approx(0.1, rel=1e-4)
    for wrong in (start, [end[0], start[1]], [torch.full((4,), math.nan), end[1]]):
        with pytest.raises(WrongAnswer, match=r"its error is (1\.0e\+00|nan)"):
            check(wrong)


class Clock:
    """Seconds that pass only while something runs."""

    def __init__(self):
        self.now, self.calls = 0.0, 0

    def __call__(self):
        return self.now

    def run(self, seconds):
        self.calls += 1
        self.now += seconds


@pytest.mark.parametrize("first, later, calls", [(0.9e-3, 0.5e-3, 1 + 3), (4e-3, 3e-3, 1 + 1), (0.5, 0.5, 1)])
def test_a_turn(first, later, calls):
    """A short call is made warm and repeated; the time of a long one is that of its only call."""
    clock = Clock()
    gc.enable()
    measured = seconds_per_call(lambda: clock.run(later if clock.calls else first), timer=clock)
    assert measured == pytest.approx(later)
    assert clock.calls == calls
    assert gc.isenabled()


def test_a_turn_waits_for_what_is_computed_asynchronously():
    clock = Clock()

    class Later:
        def block_until_ready(self):
            clock.run(1.0)

    assert seconds_per_call(lambda: [Later(), Later()], timer=clock) == 2.0


def test_floors_count_flops_and_bytes():
    floor = gemm_floor(6e6, rows=100, width=50)
    assert floor.scale == 6e6 / (2 * 100 * 50 * 50)
    assert floor.run().shape in ((100, 50), (50, 50))
    copy = copy_floor(1 << 20)
    moved = copy.run()
    assert copy.scale * 2 * moved.nbytes == 1 << 20  # read and written
    assert bool((moved == 1.0).all())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures through Linux's /proc")
def test_peak_memory_is_that_of_the_call():
    kept = torch.ones(1 << 24)  # 64 MiB that are there before
    assert 95 < peak_mib(lambda: torch.ones(25 << 20).sum()) < 110
    assert peak_mib(lambda: kept.sum()) < 5


BENCHMARK = """
import torch
from benchmarks.harness import against

def test_right(contest):
    contest(against(torch.ones(2), 1e-6), ours={"ours": lambda: lambda: torch.ones(2)})

def test_wrong(contest):
    wrong = {"ours": lambda: lambda: torch.zeros(2)}
    contest(against(torch.ones(2), 1e-6), ours=wrong, peers={"peer": lambda: lambda: torch.ones(2)})
"""


def test_a_wrong_answer_is_red_and_prints_no_speed(tmp_path):
    (tmp_path / "test_twos.py").write_text(BENCHMARK)
    command = "-m pytest -p benchmarks.conftest test_twos.py --import-mode=importlib --seconds 0.01 --results out"
    saved = ["--benchmark-json", "saved.json"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, *command.split(), "--rootdir", str(tmp_path), *saved],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "ours: wrong: its error is 1.0e+00, 1e-06 is allowed" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == ["ours", "peer"]  # of the right contest, and of the wrong one
    assert "wrong or broken: wrong" in done.stdout
    document = json.loads((tmp_path / "out" / "twos.json").read_text())
    assert [contest["name"] for contest in document["contests"]] == ["right", "wrong"]
    assert document["contests"][1]["entries"][0]["median"] is None
    assert {"cpu", "cores", "threads", "torch", "commit", "date", "jax"} <= document["environment"].keys()
    handed_over = json.loads((tmp_path / "saved.json").read_text())["benchmarks"]
    assert [one["name"] for one in handed_over] == ["right ours", "wrong peer"]
    assert handed_over[0]["stats"]["median"] == pytest.approx(document["contests"][0]["entries"][0]["median"])
