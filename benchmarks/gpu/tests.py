"""Every test of a kernel for GPUs, against references in float64: a process for each file, several at once.

An illegal address ends a process's CUDA context, so that one file's crash leaves the others alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from parl_core.provenance import available_cores

from . import processes
from .store import ROOT, Store

_FOLDERS = ("tests/kernels", "tests/csrc", "tests/ops")
_ELSEWHERE = re.compile(r"mark\.gpu|HAS_GPU|\bdevice\b.*\):")
"""In the text of a test file outside of those folders that holds tests for GPUs."""
_MISSING = re.compile(r"(?:ModuleNotFoundError|ImportError): No module named '(\w+)")
_DRY = ("tests/ops/test_registry.py",)
_TIMEOUT = 300.0
_PASSED, _NOTHING_RUN = 0, 5  # pytest's exit codes
_JOBS = max(1, min(8, available_cores() // 2))


@dataclass
class Outcome:
    """Of one test file."""

    file: str
    seconds: float = 0.0
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    """Each test with the first line of what went wrong, or the file if its process did not end by itself."""
    skipped: dict[str, int] = field(default_factory=dict)
    """How many, by reason."""

    def as_dict(self) -> dict[str, Any]:
        """For the store."""
        return asdict(self)


def gpu_test_files(root: Path = ROOT, *, dry: bool = False) -> list[str]:
    """In the order in which they are run: kernels first."""
    if dry:
        return list(_DRY)
    inside = [path for folder in _FOLDERS for path in sorted((root / folder).glob("test_*.py"))]
    outside = [
        path
        for path in sorted((root / "tests").rglob("test_*.py"))
        if path not in inside and _ELSEWHERE.search(path.read_text())
    ]
    return [path.relative_to(root).as_posix() for path in [*inside, *outside]]


def run_tests(
    files: Sequence[str], store: Store, until: float, say: Callable[[str], None], timeout: float = _TIMEOUT
) -> dict[str, Outcome]:
    """Outcomes by file; what is not there did not run for want of time.

    Args:
        until: of `time.monotonic`; files that are not over by then count as not run.
        timeout: seconds for a file, after which it has failed.
    """
    outcomes = known(files, store)
    waiting = [file for file in files if file not in outcomes]
    running: dict[str, tuple[subprocess.Popen[str], float]] = {}
    while waiting or running:
        while waiting and len(running) < _JOBS and time.monotonic() < until:
            file = waiting.pop(0)
            running[file] = (_start(file, store), time.monotonic())
        for file, (process, began) in list(running.items()):
            seconds = time.monotonic() - began
            if process.poll() is None and seconds < timeout and time.monotonic() < until:
                continue
            del running[file]
            if process.poll() is None:
                processes.stop(process)
                if seconds < timeout:
                    continue  # not run, for want of time
                outcome = Outcome(file, seconds, failed=[f"{file}: not over after {seconds:.0f} s"])
            else:
                outcome = _read(file, store, process.returncode, seconds)
            outcomes[file] = outcome
            if not outcome.failed:
                store.write(f"test {file}", outcome.as_dict())
            say(describe(outcome))
        if not running and time.monotonic() >= until:
            break
        time.sleep(0.05)
    return outcomes


def known(files: Sequence[str], store: Store) -> dict[str, Outcome]:
    """Outcomes of the files that were green before."""
    stored = {file: store.read(f"test {file}") for file in files}
    return {file: Outcome(**outcome) for file, outcome in stored.items() if outcome is not None}


def describe(outcome: Outcome) -> str:
    """One line."""
    parts = [f"{outcome.passed} passed"]
    if outcome.failed:
        parts.append(f"{len(outcome.failed)} FAILED ({outcome.failed[0]})")
    if outcome.skipped:
        parts.append(f"{sum(outcome.skipped.values())} skipped")
    return f"  {outcome.file}: {', '.join(parts)} in {outcome.seconds:.0f} s"


def _start(file: str, store: Store) -> subprocess.Popen[str]:
    report = _report(file, store)
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", file, "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    return processes.start(command, report.with_suffix(".log"), PARL_TRITON_UNTUNED="1")


def _report(file: str, store: Store) -> Path:
    return store.path(f"test {file}").with_suffix(".xml")


def _read(file: str, store: Store, status: int, seconds: float) -> Outcome:
    """From pytest's report. Tests whose module needs a package that is not here were skipped, not failed."""
    outcome = Outcome(file, round(seconds, 1))
    skipped: Counter[str] = Counter()
    try:
        cases = list(ET.parse(_report(file, store)).iter("testcase"))
    except (OSError, ET.ParseError):
        cases = []
        status = status or 1
    for case in cases:
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skip = case.find("skipped")
        if bad is not None:
            text = f"{bad.get('message')} {bad.text}"
            missing = _MISSING.search(text)
            if missing and missing[1] != "parl_core":
                skipped[f"{missing[1]} is not installed"] += 1
            else:
                outcome.failed.append(f"{case.get('classname')}::{case.get('name')}: {_first_line(bad.get('message'))}")
        elif skip is not None:
            skipped[_first_line(skip.get("message"))] += 1
        else:
            outcome.passed += 1
    outcome.skipped = dict(skipped)
    explained = outcome.failed or any("is not installed" in reason for reason in skipped)
    if status not in (_PASSED, _NOTHING_RUN) and not explained:
        log = _report(file, store).with_suffix(".log")
        outcome.failed.append(f"{file}: pytest ended with status {status}; see {log}")
    return outcome


def _first_line(text: str | None) -> str:
    return ((text or "").strip().splitlines() or [""])[0][:200]


def is_about(file: str, parts: Sequence[str]) -> bool:
    """Whether the file's name holds one of `parts`."""
    return any(part in Path(file).name for part in parts)


def red(outcomes: dict[str, Outcome], parts: Sequence[str]) -> list[str]:
    """The red test files about `parts`."""
    return [file for file, outcome in outcomes.items() if outcome.failed and is_about(file, parts)]


def untested(files: Sequence[str], outcomes: dict[str, Outcome], parts: Sequence[str]) -> list[str]:
    """The test files about `parts` of which not one test was run, for want of time or of what they need."""
    idle = [file for file in files if file not in outcomes or not (outcomes[file].passed or outcomes[file].failed)]
    return [file for file in idle if is_about(file, parts)]
