"""Runs cases in a worker, and in a new one after each case that broke it or took too long."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import processes
from .case import Case
from .store import Store

_TIMEOUT = 45.0
_BIG = 1 << 29
"""Logits, from which on contestants' intermediates are tens of gigabytes."""
_WORKER = (sys.executable, "-m", "benchmarks.gpu.worker")


def run_cases(
    cases: Sequence[Case],
    withheld: Mapping[str, str],
    store: Store,
    until: float,
    say: Callable[[str], None],
    *,
    dry: bool,
    timeout: float = _TIMEOUT,
    worker: Sequence[str] = _WORKER,
) -> dict[str, dict[str, Any]]:
    """By the cases' ids {"contests": […]}, or {"why": …} of one that went wrong, with the contests before that if there
    are any; one that is missing did not run.

    Args:
        withheld: why a case is not run, by id.
        until: of `time.monotonic`.
        timeout: seconds for a case.
        worker: the command that runs cases.
    """
    found: dict[str, dict[str, Any]] = {case.id: {"why": withheld[case.id]} for case in cases if case.id in withheld}
    for case in cases:
        if case.id not in found and (known := store.read(f"case {case.id}")) is not None:
            found[case.id] = known
    waiting = [case.id for case in cases if case.id not in found]
    while waiting and time.monotonic() < until:
        command = [*worker, "run", *waiting, *(["--dry"] if dry else [])]
        process = processes.start(command, store.folder / "contests.log", piped=True)
        left = _follow(process, waiting, found, store, until, say, timeout)
        if left == waiting and time.monotonic() < until:
            # Not one was begun: a new worker would do no better.
            found |= {
                name: {"why": f"the worker ended before it, with status {process.returncode}"} for name in waiting
            }
            break
        waiting = left
    return found


def _follow(
    process: subprocess.Popen[str],
    waiting: Sequence[str],
    found: dict[str, dict[str, Any]],
    store: Store,
    until: float,
    say: Callable[[str], None],
    timeout: float,
) -> list[str]:
    """Collect a worker's outcomes until it is over; returns what is left to do. It is stopped in any case."""
    left, current = list(waiting), None
    so_far: dict[str, Any] = {}
    lines = processes.Lines(process)
    # Its start, with all imports, has as long as a case.
    limit = time.monotonic() + timeout
    try:
        while True:
            line = lines.next(min(limit, until))
            message = _message(line)
            if line is None:
                process.wait()
                break
            if "begin" in message:
                current, limit, so_far = message["begin"], time.monotonic() + timeout, {}
            elif "so_far" in message:
                so_far = {"contests": message["contests"]}
            elif "case" in message:
                current = None
                _keep(message, found, store, say)
                left.remove(message["case"])
    except TimeoutError:
        if time.monotonic() >= until:
            processes.stop(process)
            return left
    processes.stop(process)
    if current is not None:
        over = time.monotonic() >= limit
        why = (
            f"it was not over after {timeout:.0f} s" if over else f"its process ended with status {process.returncode}"
        )
        _keep({"case": current, **so_far, "why": why}, found, store, say)
        left.remove(current)
    return left


def _message(line: str | None) -> dict[str, Any]:
    """What the worker says; libraries that write to its output are not listened to."""
    try:
        message = json.loads(line or "")
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _keep(message: dict[str, Any], found: dict[str, dict[str, Any]], store: Store, say: Callable[[str], None]) -> None:
    name, outcome = message["case"], {key: value for key, value in message.items() if key != "case"}
    found[name] = outcome
    if "contests" in outcome:
        store.write(f"case {name}", outcome)
    say(f"  {name}: {outcome.get('why', 'done')}")


def measure_machine(store: Store, until: float, *, dry: bool, worker: Sequence[str] = _WORKER) -> dict[str, Any]:
    """The floors, see `machine.measure`, in each run anew; empty where they could not be measured."""
    command = [*worker, "machine", *(["--dry"] if dry else [])]
    process = processes.start(command, store.folder / "contests.log", piped=True)
    lines = processes.Lines(process)
    found: dict[str, Any] = {}
    try:
        while (line := lines.next(min(until, time.monotonic() + _TIMEOUT))) is not None:
            found = _message(line) or found
    except TimeoutError:
        pass
    processes.stop(process)
    return found


def start_preparing(cases: Sequence[Case], log: Path, number: int) -> list[subprocess.Popen[str]]:
    """Workers that compile what the cases will need, while something else is waited for."""
    # Tests run on the same GPU: what takes much of its memory comes when most of them are over.
    names = [
        case.id for case in sorted(cases, key=lambda case: case.topic == "token_log_prob" and (case.size or 0) >= _BIG)
    ]
    return [processes.start([*_WORKER, "prepare", *names[k::number]], log) for k in range(number) if names[k::number]]
