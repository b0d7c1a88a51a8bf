"""Contests on a device: a first half with calls, a second with what was recorded; and the clock of a real GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from benchmarks.harness import Absent, WrongAnswer, agrees_with
from benchmarks.harness.answers import Unrecordable
from benchmarks.harness.contest import run_device_contest
from benchmarks.harness.device import GpuClock, HostClock
from benchmarks.harness.floors import Floor

ANSWER = torch.tensor([1.0, 2.0])
right = agrees_with(ANSWER.double(), 1e-6)


class FakeClock:
    """A call takes as long as `run.seconds`, what was recorded of it half of that."""

    broken = False

    def __init__(self):
        self.cold = []

    def running(self):
        return nullcontext()

    def a_call(self, run):
        if run.seconds == 8.0:
            raise RuntimeError("no memory")
        return run.seconds

    def recorded(self, run, *, cold):
        if run.seconds == 9.0:
            raise Unrecordable("no CUDA graph can hold it")
        if run.seconds == 10.0:
            raise RuntimeError("an illegal address")
        if run.seconds == 7.0:
            raise Absent("it reads the device")
        self.cold.append(cold)
        return Runner(run.seconds / 2, run.answer)

    def on_device(self, run):
        return run.seconds

    def peak_mib(self, call):
        call()
        return 5.0


class Runner:
    def __init__(self, seconds, answer=ANSWER):
        self.seconds, self.answer = seconds, answer

    def __call__(self):
        return self.answer


def contest(clock, **contestants):
    return run_device_contest(
        "topic",
        "name",
        right,
        ours={"ours": lambda: Runner(2.0)},
        peers={name: lambda run=run: run for name, run in contestants.items()},
        device=clock,
        floor=Floor(Runner(1.0), 1.0, "work"),
        seconds=0.0,
        cold=True,
    )


def test_both_halves_with_their_proportions():
    clock = FakeClock()
    called, alone = contest(clock, peer=Runner(6.0))
    assert (called.name, alone.name) == ("name", "name, on the device")
    ours, peer = called.entries
    assert (ours.median, ours.speedup, ours.to_floor, ours.peak_mib) == (2.0, 3.0, 2.0, 5.0)
    again, _ = alone.entries
    assert (again.median, again.speedup, again.to_floor) == (1.0, 3.0, 2.0)
    assert peer.median == 6.0
    assert clock.cold == [False, True, True]  # the floor's data are beyond any cache


def test_who_falls_out_of_the_first_half_or_cannot_be_recorded_is_told_so():
    called, alone = contest(FakeClock(), wrong=Runner(1.0, ANSWER + 1), reading=Runner(7.0))
    by_name = {entry.name: entry for entry in alone.entries}
    assert by_name["wrong"].withheld.startswith("wrong: its error is")
    assert by_name["reading"].withheld == "not here: it reads the device" and by_name["reading"].median is None
    assert [entry.name for entry in called.broken] == ["wrong"] == [entry.name for entry in alone.broken]
    assert by_name["ours"].speedup is None


def test_who_raises_is_out_and_the_others_go_on():
    """While being timed, and while being recorded; floor and gradient too."""
    makers = {str(seconds): lambda seconds=seconds: Runner(seconds) for seconds in (2.0, 8.0, 9.0, 10.0)}
    called, alone = run_device_contest(
        "t",
        "n",
        right,
        ours={**makers, "reference": makers["9.0"]},
        peers={"peer": makers["9.0"]},
        device=FakeClock(),
        floor=Floor(Runner(10.0), 1.0, "work"),
        gradient=lambda: Runner(9.0),
        seconds=0.0,
    )
    first, second = ({entry.name: entry for entry in contest.entries} for contest in (called, alone))
    assert first["8.0"].withheld == second["8.0"].withheld == "failed while being timed: RuntimeError: no memory"
    assert first["2.0"].median == 2.0 and first["2.0"].to_floor == 0.2 and called.gradient == 9.0
    assert second["2.0"].median == 1.0 and second["2.0"].to_floor is None and alone.gradient is None
    assert second["9.0"].withheld == "failed: no CUDA graph can hold it"
    assert second["10.0"].withheld == "failed: RuntimeError: an illegal address"
    assert second["reference"].withheld == second["peer"].withheld == "not here: no CUDA graph can hold it"
    assert {entry.name for entry in alone.broken} == {"8.0", "9.0", "10.0"}


def test_the_first_half_is_told_before_the_second_begins():
    clock = FakeClock()
    contests = run_device_contest("t", "n", right, ours={"ours": lambda: Runner(2.0)}, device=clock, seconds=0.0)
    assert next(contests).name == "n" and clock.cold == []


def test_who_reads_the_device_is_not_even_recorded():
    clock = FakeClock()
    makers = {name: lambda: Runner(2.0) for name in ("ours", "reading")}
    _, alone = run_device_contest("t", "n", right, ours=makers, device=clock, seconds=0.0, unrecorded=("reading",))
    assert alone.entries[1].withheld == "not here: it reads the device, which a CUDA graph cannot, or is one already"
    assert len(clock.cold) == 1 and alone.entries[0].median == 1.0


def test_an_absent_contestant_is_no_failure():
    def absent():
        raise Absent("no such backend\n" + 99 * "a page of a compiler's\n")

    (called,) = run_device_contest("t", "n", right, ours={"cuda": absent}, device=FakeClock(), seconds=0.0)
    assert called.entries[0].withheld == "not here: no such backend" and not called.broken


def test_agreement_with_a_reference():
    assert right([1.0 * ANSWER.reshape(2, 1)]) == 0.0
    for wrong in (ANSWER + 1e-3, ANSWER[:1], torch.tensor([1.0, float("nan")])):
        with pytest.raises(WrongAnswer):
            right(wrong)
    with pytest.raises(WrongAnswer, match="sizes of answer and reference differ"):
        agrees_with(torch.ones(2), 1e-6)(torch.ones(1))  # broadcast, it would be right
    assert agrees_with((ANSWER, torch.empty(0)), 0.0)((np.array([1.0, 2.0], np.float32), torch.empty(0))) == 0.0


def test_the_host_in_the_role_of_a_device():
    clock, calls = HostClock(1e-4), []
    with clock.running():
        run = clock.recorded(lambda: calls.append(1), cold=True)
        assert 0 < clock.on_device(run) < 1e-3
    assert len(calls) > 1


@pytest.mark.gpu
def test_recordings_of_a_gpu():
    """Replays compute; the time of a copy grows with its size; what reads the device cannot be recorded."""
    device = torch.device("cuda")
    clock = GpuClock(device)
    with clock.running():
        source = torch.ones(1 << 27, device=device)
        target = torch.zeros_like(source)
        small = clock.recorded(lambda: target[: 1 << 20].copy_(source[: 1 << 20]), cold=True)
        large = clock.recorded(lambda: target.copy_(source), cold=True)
        target.zero_()
        assert large().mean().item() == 1.0
        times = [min(clock.on_device(run) for _ in range(5)) for run in (small, large)]
        with pytest.raises(Absent, match="no CUDA graph can hold it"):
            clock.recorded(lambda: torch.ones(2, device=device).sum().item(), cold=False)
        assert large().mean().item() == 1.0  # and that did no harm to what was recorded before
        assert clock.broken
        assert clock.peak_mib(lambda: torch.empty(1 << 20, device=device)) == 4.0
    assert times[1] / times[0] > 2.0
    assert (1 << 30) / times[1] < 2e13


def test_a_contest_of_the_cases_runs_dry():
    """The worker, end to end: on the CPU, with an interpreter and tiny sizes."""
    name = "scan prefix_sum 3x70"
    command = [sys.executable, "-m", "benchmarks.gpu.worker", "run", name, "--dry"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    begin, half, both, outcome = map(json.loads, done.stdout.splitlines())
    assert begin == {"begin": name} and outcome["case"] == name
    assert half == {"so_far": name, "contests": outcome["contests"][:1]} and both["contests"] == outcome["contests"]
    called, alone = outcome["contests"]
    timed = {entry["name"]: entry["median"] for entry in called["entries"] if entry["median"]}
    assert {"reference", "torch.cumsum"} <= set(timed) and all(seconds > 0 for seconds in timed.values())
    assert alone["name"] == "prefix_sum 3x70, on the device"
