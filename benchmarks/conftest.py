"""The `contest` fixture, what it prints, and the results that are written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import run_contest
from benchmarks.harness.environment import describe_machine
from parl_core.bench.results import Contest, Results, write_results
from parl_core.bench.show import contest_table, summary
from parl_core.errors import import_extra

_LOG_WIDTH = 150
"""Columns where the output is no terminal."""

_CONTESTS = pytest.StashKey[list[Contest]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("contests")
    group.addoption("--results", type=Path, metavar="DIR", help="write the contests to DIR/<topic>.json")
    group.addoption("--seconds", type=float, default=8.0, metavar="S", help="length of a contest; 8 unless given")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_CONTESTS] = []
    config.option.benchmark_quiet = True  # pytest-benchmark's own table knows of no floors and ratios
    config.option.showcapture = "no"  # compilers log by the thousand lines
    config.option.disable_warnings = True  # and the peers' libraries warn about themselves


@pytest.fixture
def contest(request: pytest.FixtureRequest, benchmark: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs a contest, prints its table, and fails where a contestant broke or was wrong; see `benchmarks.harness`."""
    topic = request.path.stem.removeprefix("test_")
    name = " ".join(request.node.name.removeprefix("test_").rstrip("]").split("["))

    def run(*arguments: Any, **options: Any) -> None:
        options.setdefault("seconds", request.config.getoption("--seconds"))
        result, rounds = run_contest(topic, name, *arguments, **options)
        request.config.stash[_CONTESTS].append(result)
        with capsys.disabled():
            _print("", *contest_table(result))
        _hand_over(benchmark, name, rounds)
        if result.broken:
            pytest.fail("; ".join(f"{entry.name} {entry.withheld}" for entry in result.broken), pytrace=False)

    return run


def _hand_over(benchmark: Any, name: str, rounds: dict[str, list[float]]) -> None:
    """Give pytest-benchmark the times, which it can save, export and compare.

    It times one function for each test, one after the other, and has no public way to take times that were measured in
    turns: this is what its own `pedantic` does with them.
    """
    benchmark._mode = "contest"
    benchmark.group = name
    for contestant, seconds in rounds.items() if benchmark.enabled else ():
        benchmark.name = f"{name} {contestant}"
        benchmark.fullname = f"{benchmark.fullname.partition('::')[0]}::{benchmark.name}"
        stats = benchmark._make_stats(iterations=1)
        for second in seconds:
            stats.update(second)


def pytest_sessionfinish(session: pytest.Session) -> None:
    contests = session.config.stash[_CONTESTS]
    folder: Path | None = session.config.getoption("--results")
    if contests:
        _print("", summary(contests))
    if contests and folder is not None:
        for path in write_results(folder, Results(describe_machine(), tuple(contests))):
            _print(str(path))


def _print(*lines: Any) -> None:
    rich_console = import_extra("rich.console", "train", needed_for="benchmarks")
    console = rich_console.Console(width=None if sys.stdout.isatty() else _LOG_WIDTH, highlight=False)
    for line in lines:
        console.print(line, markup=False)
