"""Tasks in worker processes, and what happens around these; how studies use them is tested with their runner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from parl_core import workers
from tests.worker_tasks import report_for_ever, square


def test_ctrl_c_while_processes_are_started_comes_afterwards_and_never_to_them():
    before, code = (
        signal.getsignal(signal.SIGINT),
        "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('lives')",
    )
    done = None
    with pytest.raises(KeyboardInterrupt), workers._ctrl_c_held_back():
        os.kill(os.getpid(), signal.SIGINT)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done is not None
    assert done.stdout == "lives\n"
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    with workers._ctrl_c_held_back():
        pass  # and nothing of it is left for the next time


def test_one_thread_is_for_the_time_being(monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with workers.one_thread():
            assert torch.get_num_threads() == 1
            assert os.environ["MKL_NUM_THREADS"] == os.environ["OPENBLAS_NUM_THREADS"] == "1"
        assert torch.get_num_threads() == 2
        assert os.environ["MKL_NUM_THREADS"] == "7"
        assert "OPENBLAS_NUM_THREADS" not in os.environ
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("jobs", [None, 1, 2])
def test_a_failure_leaves_the_other_tasks_alone_and_reports_are_heard_here(jobs):
    """In this process (None), where nothing may die, and in others."""
    fates = {2: "raise", 3: "refuse", **({1: "die"} if jobs else {})}
    tasks = [{"number": number, "fate": fates.get(number, "")} for number in range(6)]
    heard = []
    do = workers.do_tasks if jobs is None else partial(workers.run_tasks, jobs=jobs)
    outcomes = list(do(square, tasks, heard=lambda task, message: heard.append((task["number"], message))))
    finished = {o.task["number"]: o.result for o in outcomes if isinstance(o, workers.Finished)}
    failed = {o.task["number"]: o.error for o in outcomes if isinstance(o, workers.Failed)}
    assert finished == {number: number**2 for number in range(6) if number not in fates}
    assert failed.keys() == fates.keys()
    assert str(failed[2]) == "task number=2, fate=raise failed with ZeroDivisionError: no such square"
    assert "in square" in failed[2].details
    assert str(failed[3]) == "task number=3, fate=refuse failed: the square must be finite"
    if jobs:
        assert str(failed[1]).startswith("the process of task number=1, fate=die died (killed by SIGKILL")
    # A process that is killed may take its report with it.
    assert {(number, message[1]) for number, message in heard} | {(1, 1)} == {(n, n**2) for n in range(6)}
    processes = {message[0] for _, message in heard}
    assert (os.getpid() in processes) == (jobs is None)
    if jobs == 1:
        assert [o.task["number"] for o in outcomes] == list(range(6))
        assert len(processes) == 2  # the second replaced the one that died


def test_leaving_the_iterator_ends_the_processes(tmp_path):
    file = tmp_path / "pid"
    heard = []

    def stop(task, message):
        heard.append(message)
        if len(heard) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(workers.run_tasks(report_for_ever, [{"file": str(file)}], 1, stop))
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_a_worker_ends_when_nobody_is_left_to_report_to(tmp_path):
    file = tmp_path / "pid"
    code = f"""
from parl_core import workers
from tests.worker_tasks import report_for_ever
if __name__ == "__main__":
    list(workers.run_tasks(report_for_ever, [dict(file={str(file)!r})], 1, lambda task, message: None))
"""
    script = tmp_path / "parent.py"
    script.write_text(code)
    root = str(Path(__file__).parents[1])
    parent = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    parent.kill()
    parent.communicate(timeout=60)  # which returns when the last process that could write to the pipe is gone
