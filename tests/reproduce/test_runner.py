"""A study's tasks are done once each, whatever happens in between, and give the same bytes."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from parl_core.errors import ConfigError, MissingExtraError, RunFolderError
from parl_core.provenance import describe_environment
from parl_core.reproduce import runner
from parl_core.reproduce.folder import StudyFolder
from parl_core.reproduce.runner import reproduce
from parl_core.workers import TaskError
from tests.reproduce.tiny import Tiny

RESULTS = ("squares.csv", "odd.csv")


def run(study, path, jobs=1):
    """Reproduce without a terminal; returns what was printed."""
    console = Console(force_terminal=False, width=80)
    with console.capture() as shown:
        reproduce(study, path, jobs=jobs, command="parl reproduce tiny", console=console)
    return shown.get()


def results(path):
    return {name: (path / name).read_bytes() for name in RESULTS}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    path = tmp_path_factory.mktemp("whole") / "run"
    run(Tiny(), path)
    return path


def start(path, *options):
    """`parl reproduce tiny` with two processes, in a process group of its own."""
    code = "import sys; from tests.reproduce.tiny import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, "reproduce", "tiny", "--output", str(path), "--jobs", "2", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_tasks(path, number):
    """Until so many tasks are kept (none: until the work has begun)."""
    progress, deadline = path / "progress.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline:
        if progress.exists() and progress.read_bytes().count(b"\n") > number:
            return
        time.sleep(0.005)
    raise AssertionError("the work did not come so far")


def test_the_rows_are_in_the_order_of_the_tasks_however_many_processes_there_are(whole, tmp_path):
    assert (whole / "squares.csv").read_text().splitlines()[:4] == [
        "seed,factor,square",
        "0,1.0,0.0",
        "0,0.5,0.0",
        "1,1.0,0.3333333333333333",
    ]
    assert (whole / "odd.csv").read_text().splitlines()[2] == "1,nan,-inf,5e-324,odd,1"
    hold = tmp_path / "hold"
    hold.write_text("0")
    process = start(tmp_path / "two", "--hold", str(hold))
    wait_for_tasks(tmp_path / "two", 5)
    hold.unlink()
    process.communicate(timeout=60)
    assert process.returncode == 0
    last = json.loads((tmp_path / "two" / "progress.jsonl").read_text().splitlines()[-1])
    assert last["task"]["seed"] == 0
    assert results(tmp_path / "two") == results(whole)


def test_a_complete_folder_is_only_drawn_again(whole):
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    (whole / "a.png").unlink()
    progress = whole / "progress.jsonl"
    kept = progress.read_bytes()
    progress.unlink()  # as in a folder that is under version control
    shown = run(Tiny(), whole)
    assert "tasks done" not in shown
    here = describe_environment()
    assert shown.startswith(f"{whole} is complete: computed {here['date']} at ")
    assert "remove it, or choose another --output, to compute again\n" in shown
    assert "warning" not in shown
    assert "Squares" in shown
    assert (whole / "a.png").exists()
    assert json.loads((whole / "figures.json").read_text()) == ["b.png", "a.png"]
    assert not progress.exists()
    progress.write_bytes(kept)
    for name in (*RESULTS, "environment.json", "settings.json"):
        assert (whole / name).stat().st_mtime_ns == before[name]


def test_a_kill_at_any_byte_of_the_progress_changes_nothing(whole, tmp_path):
    """What a kill can leave behind is a beginning of progress.jsonl, and later files that are whole or not there."""
    progress = (whole / "progress.jsonl").read_bytes()
    for cut in [*range(0, len(progress), 53), len(progress) - 1, len(progress)]:
        path = tmp_path / str(cut)
        path.mkdir()
        (path / "settings.json").write_bytes((whole / "settings.json").read_bytes())
        (path / "progress.jsonl").write_bytes(progress[:cut])
        (path / "odd.csv.partial").write_bytes(b"seed,")
        if cut == len(progress):
            (path / "squares.csv").write_bytes((whole / "squares.csv").read_bytes())
        run(Tiny(), path)
        assert results(path) == results(whole)
        lines = [json.loads(line) for line in (path / "progress.jsonl").read_text().splitlines()]
        assert sorted(line["task"]["seed"] for line in lines if "task" in line) == list(range(6))  # each done once


@pytest.mark.parametrize(("fact", "value"), [("commit", "c" * 40), ("commit", None), ("parl_core", "0.0")])
def test_results_of_another_version_are_told_to_be_so(whole, tmp_path, monkeypatch, fact, value):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    record = json.loads((path / "environment.json").read_text())
    record["sittings"][0]["environment"][fact] = value
    (path / "environment.json").write_text(json.dumps(record))
    here = {**record["sittings"][0]["environment"], fact: "d" * 12}
    monkeypatch.setattr("parl_core.reproduce.runner.describe_environment", lambda: here)
    shown = run(Tiny(), path)
    told = {"commit": "commit cccccccccccc" if value else "an unknown commit", "parl_core": "parl-core 0.0"}[fact]
    warning = next(line for line in shown.splitlines() if line.startswith("warning: "))
    before, now = warning.split(", but this is parl-core ")
    assert told in before
    assert "d" * 12 in now


def test_a_complete_folder_is_locked_while_it_is_drawn(whole):
    folder = StudyFolder.open(whole, Tiny())
    with pytest.raises(RunFolderError, match="in use by another"):
        run(Tiny(), whole)
    folder.close()


@pytest.mark.parametrize("number", [0, 3])
def test_a_killed_run_leaves_no_process_behind_and_goes_on_to_the_same_bytes(whole, tmp_path, number):
    path, hold = tmp_path / "run", tmp_path / "hold"
    hold.write_text(" ".join(map(str, range(number, 6))))
    process = start(path, "--hold", str(hold))
    wait_for_tasks(path, number)
    process.kill()
    process.wait()
    hold.unlink()
    process.communicate(timeout=30)  # which returns when the last process that could write to the pipes is gone
    assert not (path / "environment.json").exists()
    again = start(path, "--hold", str(hold))
    again.communicate(timeout=60)
    assert again.returncode == 0
    assert results(path) == results(whole)
    lines = [json.loads(line) for line in (path / "progress.jsonl").read_text().splitlines()]
    done = ["task" in line for line in lines]
    assert done == [False, *[True] * number, False, *[True] * (6 - number)]


def test_ctrl_c_says_what_is_done_and_the_same_command_goes_on(whole, tmp_path):
    path, hold = tmp_path / "run", tmp_path / "hold"
    hold.write_text("2 3 4 5")
    process = start(path, "--hold", str(hold))
    wait_for_tasks(path, 2)
    begin = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes at once
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - begin < 10
    assert process.returncode == 130
    assert errors == "parl: interrupted: 2 of 6 tasks done; the same command goes on\n"
    hold.unlink()
    again = start(path, "--hold", str(hold))
    shown, _ = again.communicate(timeout=60)
    assert "tiny: 2 of 6 tasks done\n" in shown
    assert results(path) == results(whole)
    facts = json.loads((path / "environment.json").read_text())
    lines = [json.loads(line) for line in (path / "progress.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if "task" in line]
    assert facts["task_seconds"] == pytest.approx(sum(seconds), abs=0.06)
    sittings = [number for number, line in enumerate(lines) if "environment" in line]
    last = [lines[sittings[1] - 1]["wall_seconds"], lines[-1]["wall_seconds"]]
    assert [sitting["wall_seconds"] for sitting in facts["sittings"]] == last
    assert [sitting["tasks"] for sitting in facts["sittings"]] == [2, 4]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_task_that_raises_is_named_and_the_others_are_kept(whole, tmp_path, jobs):
    path, trouble = tmp_path / "run", tmp_path / "trouble"
    trouble.write_text("raise 3")
    study = Tiny(trouble=str(trouble))
    with pytest.raises(TaskError, match=r"task seed=3, kind=odd failed with ZeroDivisionError: no such square") as told:
        run(study, path, jobs)
    assert "failure.txt" in str(told.value)
    assert "in run" in (path / "failure.txt").read_text()
    kept = (path / "progress.jsonl").read_text().count('"task"')
    assert f"{kept} of 6 tasks done" in str(told.value)
    assert kept >= (3 if jobs == 1 else 1)
    trouble.unlink()
    run(study, path, jobs)
    assert results(path) == results(whole)
    assert not (path / "failure.txt").exists()


def test_a_refusal_in_a_task_keeps_its_own_words(tmp_path):
    trouble = tmp_path / "trouble"
    trouble.write_text("refuse 3")
    with pytest.raises(TaskError, match=r"^task seed=3, kind=odd failed: the square must be finite \("):
        run(Tiny(trouble=str(trouble)), tmp_path / "run")


def test_numba_is_asked_for_before_anything_is_done_where_it_is_needed(tmp_path, monkeypatch):
    class Compiled(Tiny):
        needs_numba = True

    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(MissingExtraError, match=r"parl reproduce tiny needs numba .*'parl-core\[numba\]'"):
        run(Compiled(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(Tiny(), tmp_path / "run")


def test_a_process_that_dies_is_told_with_its_task(whole, tmp_path):
    path, trouble = tmp_path / "run", tmp_path / "trouble"
    trouble.write_text("die 3")
    study = Tiny(trouble=str(trouble))
    with pytest.raises(TaskError, match=r"process of task seed=3, kind=odd died \(killed by SIGKILL, as .* memory"):
        run(study, path, jobs=2)
    trouble.unlink()
    run(study, path, jobs=2)
    assert results(path) == results(whole)


def test_ctrl_c_is_the_parents_business_alone(whole, tmp_path):
    trouble = tmp_path / "trouble"
    trouble.write_text("ctrl-c 3")
    run(Tiny(trouble=str(trouble)), tmp_path / "run", jobs=2)
    assert results(tmp_path / "run") == results(whole)


def test_progress_without_a_terminal_is_a_few_lines(tmp_path, monkeypatch):
    for pause, told in ((0.0, range(20, 201, 20)), (math.inf, [200])):
        monkeypatch.setattr(runner, "_PLAIN_PAUSE", pause)
        shown = run(Tiny(size=200), tmp_path / str(pause)).splitlines()
        assert [re.sub(r"\d+ s ", "T s ", line) for line in shown if "tasks done" in line] == [
            "tiny: 0 of 200 tasks done",
            *(f"tiny: {done} of 200 tasks done, T s elapsed, about T s remain" for done in told),
        ]


def test_the_time_that_remains_is_judged_by_what_was_done_in_this_sitting(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(runner, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    console = Console(force_terminal=False, width=80)
    with console.capture() as shown, runner._progress("tiny", 100, 200, console) as advance:
        now[0] += 30.0
        advance(120)
    assert shown.get().splitlines()[1] == "tiny: 120 of 200 tasks done, 30 s elapsed, about 120 s remain"


def test_progress_on_a_terminal_is_a_bar(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console = Console(force_terminal=True, file=io.StringIO(), width=80)
    reproduce(Tiny(), tmp_path / "run", jobs=1, command="parl reproduce tiny", console=console)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert re.search(r"tiny ━+ 6/6 elapsed 0:00:\d\d remaining 0:00:00", shown)
    assert "tasks done" not in shown
    assert console.file.getvalue().count("\x1b[?25h") > 0  # the cursor is there again


def test_settings_that_the_study_refuses_leave_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="--size must be at least 1, got 0"):
        run(Tiny(size=0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_study_without_tasks_makes_no_folder(tmp_path):
    class Idle(Tiny):
        def tasks(self):
            return []

    with pytest.raises(ConfigError, match="tiny has no tasks with these settings"):
        run(Idle(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_left_alone(tmp_path):
    path, hold = tmp_path / "run", tmp_path / "hold"
    hold.write_text("0 1 2 3 4 5")
    process = start(path, "--hold", str(hold))
    wait_for_tasks(path, 0)
    before = (path / "progress.jsonl").read_bytes()
    try:
        with pytest.raises(RunFolderError, match="in use by another"):
            run(Tiny(hold=str(hold)), path)
        assert (path / "progress.jsonl").read_bytes() == before
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=30)
