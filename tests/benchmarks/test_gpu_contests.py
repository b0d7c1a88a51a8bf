"""Cases in a worker that dies, hangs, says strange things, or runs out of time: the others are run all the same."""

from __future__ import annotations

import sys
import textwrap
import time

import pytest

from benchmarks.gpu import contests
from benchmarks.gpu.case import Case
from benchmarks.gpu.cases import all_cases
from benchmarks.gpu.contests import run_cases
from benchmarks.gpu.store import Store

WORKER = """
import json, os, signal, sys, time
for name in sys.argv[2:]:
    if name.startswith("--"):
        continue
    with open(LOG, "a") as log:
        log.write(name + "\\n")
    print("a library says something")
    print(json.dumps(3))
    print(json.dumps({"begin": name}), flush=True)
    if "late" in name:
        print(json.dumps({"so_far": name, "contests": ["called"]}), flush=True)
    if "dies" in name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hangs" in name:
        time.sleep(600)
    if "raises" in name:
        print(json.dumps({"case": name, "why": "ValueError: no"}), flush=True)
        continue
    print(json.dumps({"case": name, "contests": [name]}), flush=True)
    if "breaks the device" in name:
        sys.exit(3)
"""


@pytest.fixture
def run(tmp_path):
    """Runs cases of these names; returns outcomes, the names in the order in which they were begun, and what was said."""
    log = tmp_path / "begun"
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER).replace("LOG", repr(str(log))))

    def runner(*names, seconds=60.0, timeout=20.0, withheld=None, worker=(sys.executable, str(script))):
        log.write_text("")
        cases = [Case("t", name, setup=lambda lab: None, tests=()) for name in names]
        said = []
        found = run_cases(
            cases,
            {f"t {name}": why for name, why in (withheld or {}).items()},
            Store(tmp_path / "work", "key"),
            time.monotonic() + seconds,
            said.append,
            dry=True,
            timeout=timeout,
            worker=worker,
        )
        short = {name.removeprefix("t "): outcome for name, outcome in found.items()}
        return short, [line.removeprefix("t ") for line in log.read_text().splitlines()], said

    return runner


def test_all_in_one_worker(run):
    found, begun, said = run("a", "b")
    assert found == {"a": {"contests": ["t a"]}, "b": {"contests": ["t b"]}}
    assert begun == ["a", "b"] and said == ["  t a: done", "  t b: done"]


def test_what_dies_fails_and_the_rest_goes_on(run):
    found, begun, _ = run("a", "dies", "raises", "breaks the device", "b")
    assert begun == ["a", "dies", "raises", "breaks the device", "b"]
    assert found["dies"] == {"why": "its process ended with status -11"}
    assert found["raises"] == {"why": "ValueError: no"}
    assert [name for name, outcome in found.items() if "contests" in outcome] == ["a", "breaks the device", "b"]


def test_what_breaks_the_second_half_leaves_the_first(run):
    """It is told, kept, and not tried again; and no other case has it."""
    found, _, _ = run("dies late", "hangs late", "dies", timeout=3.0)
    assert found["dies late"] == {"contests": ["called"], "why": "its process ended with status -11"}
    assert found["hangs late"] == {"contests": ["called"], "why": "it was not over after 3 s"}
    assert "contests" not in found["dies"]
    again, begun, _ = run("dies late", "hangs late")
    assert again == {name: found[name] for name in again} and begun == []


def test_what_hangs_is_stopped(run):
    start = time.monotonic()
    found, _, _ = run("hangs", "b", timeout=3.0)
    assert found["hangs"] == {"why": "it was not over after 3 s"}
    assert found["b"] == {"contests": ["t b"]}
    assert time.monotonic() - start < 60


def test_at_the_end_of_the_time_the_rest_is_missing_and_not_failed(run):
    found, begun, _ = run("a", "hangs", "b", seconds=4.0, timeout=300.0)
    assert begun == ["a", "hangs"] and found == {"a": {"contests": ["t a"]}}
    assert run("a", "b", seconds=-1.0)[0] == {"a": {"contests": ["t a"]}}  # known from before


def test_what_is_done_is_not_run_again_and_what_failed_is(run):
    run("a", "dies")
    found, begun, _ = run("a", "dies", "b")
    assert begun == ["dies", "b"] and set(found) == {"a", "dies", "b"}


def test_withheld_cases_are_not_run(run):
    found, begun, _ = run("a", "b", withheld={"a": "its tests are red"})
    assert begun == ["b"] and found["a"] == {"why": "its tests are red"}


def test_what_needs_much_memory_is_prepared_last(monkeypatch, tmp_path):
    cases = [case for case in all_cases() if case.topic in ("token_log_prob", "sac")]
    commands = []
    monkeypatch.setattr(contests.processes, "start", lambda command, log: commands.append(command))
    contests.start_preparing(cases, tmp_path / "log", 1)
    (names,) = (command[command.index("prepare") + 1 :] for command in commands)
    assert sorted(names) == sorted(case.id for case in cases)
    big = [name for name in names if "16384x" in name]
    assert names[-len(big) :] == big and names[0] == "sac update h256-B256"


def test_a_worker_that_does_not_start_is_not_started_for_ever(run):
    found, begun, _ = run("a", "b", worker=(sys.executable, "-c", "raise SystemExit(7)"))
    assert not begun and {outcome["why"] for outcome in found.values()} == {"the worker ended before it, with status 7"}
