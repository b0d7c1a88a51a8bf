"""Running the benchmarks of a checkout."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError

RESULTS = Path("benchmarks", "results")
"""The committed results, in a checkout."""

_PASSED, _FAILED, _INTERRUPTED, _NOTHING_RUN = 0, 1, 2, 5  # pytest's exit codes


def checkout() -> Path:
    """The folder that this package's benchmarks lie in.

    Raises:
        ConfigError: the package is installed without them.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "conftest.py").is_file():
        raise ConfigError(
            "parl bench needs a checkout of parl-core, whose benchmarks are not installed with it: clone the repository, "
            "then run: make bench"
        )
    return root


def run_benchmarks(filters: Sequence[str], output: Path | None, seconds: float | None) -> int:
    """Run the benchmarks whose names contain every filter, printing as they go; returns the exit status.

    Args:
        filters: parts of names, as in "hvp" or "h256".
        output: the folder for the results; without filters benchmarks/results unless given, with filters none.
        seconds: the length of each contest; the benchmarks' own unless given.

    Raises:
        ConfigError: there is no checkout, a filter is no part of any name, or none has them all.
    """
    root = checkout()
    for part in filters:
        if not re.fullmatch(r"[\w.+-]+", part):
            raise ConfigError(f"a filter is a part of a benchmark's name, of letters, digits and -.+_, got '{part}'")
    if seconds is not None and not seconds > 0:
        raise ConfigError(f"--seconds must be positive, got {seconds:g}")
    if output is None and not filters:
        output = root / RESULTS
    command = [sys.executable, "-m", "pytest", str(root / "benchmarks"), "--rootdir", str(root), "--no-header"]
    command += ["-k", " and ".join(filters)] if filters else []
    command += ["--results", str(output.resolve())] if output is not None else []
    command += ["--seconds", f"{seconds:g}"] if seconds is not None else []
    status = subprocess.run(command, cwd=root).returncode
    if status == _NOTHING_RUN:
        raise ConfigError(f"no benchmark's name contains {' and '.join(filters)}; parl bench --list names them all")
    if status == _INTERRUPTED:
        raise KeyboardInterrupt
    if status not in (_PASSED, _FAILED):
        raise ConfigError(f"pytest stopped with status {status}; it and pytest-benchmark come with: make bench")
    return status


def benchmark_names() -> list[str]:
    """As `parl bench` selects them.

    Raises:
        ConfigError: there is no checkout, or the benchmarks cannot be collected.
    """
    root = checkout()
    command = [sys.executable, "-m", "pytest", str(root / "benchmarks"), "--rootdir", str(root), "--collect-only"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode != _PASSED:
        raise ConfigError(f"the benchmarks cannot be collected: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
    listed = [line for line in done.stdout.splitlines() if "::" in line]
    return [line.removeprefix("benchmarks/test_").replace(".py::test_", " ") for line in listed]
