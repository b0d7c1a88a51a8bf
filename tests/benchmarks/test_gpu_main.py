"""The command as a whole, with outcomes of tests and contests that are given: what it says, writes and returns."""

from __future__ import annotations

import time
from dataclasses import asdict

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import build, contests, machine, report, tests
from benchmarks.gpu.cases import all_cases
from benchmarks.gpu.store import Store
from benchmarks.gpu.tests import Outcome
from parl_core.bench.results import Contest, Entry

GAE, SUM = "scan gae 3x70", "scan prefix_sum 3x70"
FILE = "tests/ops/test_gae.py"
GREEN = Outcome(FILE, passed=5, skipped={"hypothesis is not installed": 2})


def outcome(name, withheld=None, *, ours=True):
    topic, _, rest = name.partition(" ")
    timed = Entry(name="triton", ours=True, median=1e-3, lower_quartile=1e-3, upper_quartile=1e-3)
    other = Entry(name="other", ours=ours, withheld=withheld or "not here: no")
    return {"contests": [asdict(Contest(topic=topic, name=rest, entries=(timed, other)))]}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command; returns its exit status, what it printed, and what it asked for."""
    asked = {}

    def runner(*arguments, found=None, tested=None, files=(FILE,), run_cases=None):
        def default(cases, withheld, store: Store, until, say, *, dry):
            asked.update(cases=[case.id for case in cases], withheld=withheld)
            done = {case.id: outcome(case.id) for case in cases} if found is None else found
            for name, given in done.items():
                store.write(f"case {name}", given)
            return {**done, **{name: {"why": why} for name, why in withheld.items()}}

        def run_tests(files, store, until, say):
            asked["files"] = files
            return {FILE: GREEN} if tested is None else tested

        monkeypatch.setattr(command, "_set_environment", lambda work, *, dry: None)
        monkeypatch.setattr(build, "link_kernels", lambda: None)
        monkeypatch.setattr(tests, "gpu_test_files", lambda *, dry: list(files))
        monkeypatch.setattr(tests, "run_tests", run_tests)
        monkeypatch.setattr(contests, "run_cases", run_cases or default)
        monkeypatch.setattr(contests, "measure_machine", lambda store, until, *, dry: {"copy_bytes_per_s": 4e12})
        monkeypatch.setattr(machine, "describe", lambda: {"cpu": "a processor", "date": "2026-11-21"})
        status = command.main(["--dry", "--work", str(tmp_path), *arguments])
        return status, capsys.readouterr().out, asked

    return runner


def test_all_right(run, tmp_path):
    status, said, asked = run()
    assert status == command.PASSED and asked["cases"] == [case.id for case in all_cases(tiny=True)]
    assert f"| {GAE} | triton | 1 ms |" in said and "copy 4 TB/s" in said
    assert "5 tests passed, 0 failed." in said and "2 skipped: hypothesis is not installed" in said
    environment, written = report.read(tmp_path / "results")
    assert len(written) == len(all_cases(tiny=True)) and environment["copy_bytes_per_s"] == 4e12


def test_a_red_test_withholds_the_times_of_its_op(run, tmp_path):
    status, said, asked = run(tested={FILE: Outcome(FILE, failed=["test_one: no"])}, found={SUM: outcome(SUM)})
    assert status == command.FAILED and f"test {FILE}: test_one: no" in said
    assert asked["withheld"][GAE] == f"its tests are red: {FILE}" and SUM not in asked["withheld"]
    assert f"| {SUM} |" in said and f"| {GAE} |" not in said


@pytest.mark.parametrize("ours, expected", [(True, command.FAILED), (False, command.PASSED)])
def test_ours_must_be_right_and_peers_are_told(run, ours, expected):
    found = {case.id: outcome(case.id) for case in all_cases(tiny=True)}
    status, said, _ = run(found={**found, GAE: outcome(GAE, "wrong: its error is 1", ours=ours)})
    assert status == expected and f"{GAE}: other wrong: its error is 1" in said


def test_what_did_not_run_is_named(run):
    status, said, _ = run(found={SUM: outcome(SUM)})
    assert status == command.INCOMPLETE and "Not run, for want of time" in said and f"  {GAE}" in said
    status, said, _ = run(tested={})
    assert status == command.INCOMPLETE and f"| {GAE} | triton, untested |" in said
    assert f"| {SUM} | triton | 1 ms" in said  # that file is not about sums


def test_what_the_first_contests_need_is_tested_first(run):
    files = ["tests/test_store.py", "tests/kernels/test_triton_preference.py", "tests/hypergrad/test_capture.py"]
    _, _, asked = run(files=files)
    assert asked["files"] == files[::-1]


def test_a_part_keeps_the_results_of_the_rest(run, tmp_path):
    run()
    status, said, asked = run("--only", "prefix_sum")
    assert status == command.PASSED and {name.split()[1] for name in asked["cases"]} == {"prefix_sum"}
    assert f"| {GAE} |" not in said and asked["files"] == []  # test_gae.py is not about prefix sums
    assert len(report.read(tmp_path / "results")[1]) == len(all_cases(tiny=True))


def test_results_of_no_gpu_choose_nothing(run, tmp_path, capsys):
    run()
    assert command.main(["choose", "--dry", "--work", str(tmp_path)]) == command.FAILED
    assert "holds no results of a GPU" in capsys.readouterr().err


def test_results_are_written_after_every_case(run, tmp_path):
    """They are there when the command is killed."""

    def killed(cases, withheld, store, until, say, *, dry):
        store.write(f"case {GAE}", outcome(GAE))
        say("a line")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(run_cases=killed)
    environment, (contest,) = report.read(tmp_path / "results")
    assert contest.name == GAE.removeprefix("scan ") and environment["copy_bytes_per_s"] == 4e12


def test_minutes_begin_with_the_shell(monkeypatch):
    monkeypatch.setenv("PARL_GPU_BEGAN", str(time.time() - 100.0))
    assert time.monotonic() - command._shell_began() == pytest.approx(100.0, abs=5.0)
    monkeypatch.delenv("PARL_GPU_BEGAN")
    assert time.monotonic() - command._shell_began() == pytest.approx(0.0, abs=5.0)
