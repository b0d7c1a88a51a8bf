"""Algorithms × seeds × environments over the cores, into one folder."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import ConfigError, Interrupted
from ..files import lock_folder, write_atomically
from ..provenance import SIMULATORS, describe_environment, version
from ..results.tables import to_text
from ..training.config import TrainConfig
from ..training.run_folder import RunFolder
from ..training.train import Options, resume, train
from ..training.trainer import Evaluated, Event
from ..workers import Failed, Report, Task, TaskError, run_tasks
from .display import RunsDisplay
from .folder import ComparisonFolder, read_json, write_json
from .results import clock, run_name, tables

_LONGEST_FIRST = ("surf", "a-parl", "pebble", "oracle")
_REPORT_PAUSE = 0.5
"""Seconds between two reports of a run, at least."""


def compare(
    configs: Sequence[TrainConfig], seeds: int, path: Path, *, jobs: int, command: str, console: Console
) -> None:
    """Do the runs that are not done yet, then write, print and draw what all of them gave.

    Args:
        configs: one for each algorithm on each environment; every one is run with the seeds 0, …, `seeds` − 1.
        path: the comparison's folder, a new one or one that the same comparison has begun.
        jobs: runs at once, a process each on one thread.
        command: what the user typed, for the record.

    Raises:
        RunFolderError: the folder holds something else, is in use, or cannot be written.
        ConfigError: the folder holds another comparison.
        TaskError: runs failed; the others are done and reported.
        Interrupted: Ctrl-C; the same command goes on.
    """
    runs = {run_name(run.env, run.algorithm, run.seed): run for run in _in_order(configs, seeds)}
    lock = lock_folder(path, "parl compare")
    try:
        folder = ComparisonFolder(path, runs)
        failures = _train(runs, folder, jobs, command, console)
        done = list(folder.done().values())
        if done:
            made = tables(done)
            picture = folder.write(done, made, command)
            for table in made:
                _say(console, "\n" + to_text(table))
            _say(console, f"\nComparison: {path}   curves: {picture}")
    finally:
        os.close(lock)
    if failures:
        names = "; ".join(failures)
        raise TaskError(f"{len(failures)} of {len(runs)} runs failed, the same command tries them again: {names}")


def train_run(
    runs: Mapping[str, TrainConfig], folder: Path, facts: Mapping[str, Any], task: Task, report: Report
) -> float:
    """One run, from where it stands to its end; returns its last evaluation's return.

    It reports (step, return of the last evaluation, None before the first) as it goes.

    Args:
        runs: the configurations by name.
        folder: where the run folders are.
        facts: where and with what it is done, for its sittings.json.
        task: {"run": its name}.
    """
    config, path = runs[task["run"]], folder / task["run"]
    for left_over in (*path.glob("*.partial"), path / "failure.txt"):
        left_over.unlink(missing_ok=True)
    notes, console = _Notes(path / "sittings.json", facts, report), Console(quiet=True)
    if not (path / "config.json").exists():
        run = train(config, path, console, Options(notice=notes))
    elif RunFolder.open(path)[1] == config:
        run = resume(path, None, console, Options(notice=notes))
    else:
        raise ConfigError(f"{path / 'config.json'} has other settings than the comparison: remove {path}")
    return float(run.rows[-1]["true_return"] or 0.0)


class _Notes:
    """Reports a run's progress, and keeps in a file where, with what and how fast it was done.

    A sitting is one time that the run was worked on: its clock runs from the first event to the last evaluation.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], report: Report) -> None:
        self._path, self._facts, self._report = path, facts, report
        self._earlier = read_json(path) if path.exists() else []
        self._begin: tuple[float, int] | None = None
        self._reported = 0.0
        self._return: float | None = None

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        step = int(event.row["step"] or 0) if isinstance(event, Evaluated) else event.step
        self._begin = self._begin or (now, step)
        if isinstance(event, Evaluated):
            self._return = event.row["true_return"]
            begin, from_step = self._begin
            sitting = {**self._facts, "from_step": from_step, "to_step": step, "seconds": round(now - begin, 3)}
            write_json(self._path, [*self._earlier, sitting])
        if isinstance(event, Evaluated) or now - self._reported >= _REPORT_PAUSE:
            self._reported = now
            self._report((step, self._return))


def _in_order(configs: Sequence[TrainConfig], seeds: int) -> list[TrainConfig]:
    """Every run: the longest first, so that no long one is left to the end, and else seed by seed."""
    runs = [replace(config, seed=seed) for seed in range(seeds) for config in configs]
    return sorted(runs, key=lambda run: _LONGEST_FIRST.index(run.algorithm))


def _train(
    runs: Mapping[str, TrainConfig], folder: ComparisonFolder, jobs: int, command: str, console: Console
) -> list[str]:
    """Do what is left; returns a sentence for each run that failed."""
    done = folder.done().keys()
    left: list[Task] = [{"run": name} for name in runs if name not in done]
    if not left:
        return []
    facts = {**describe_environment(), **{name: version(name) for name in SIMULATORS}, "jobs": jobs}
    work = partial(train_run, runs, folder.path / "runs", facts)
    ended, failures = len(done), list[str]()
    try:
        with (
            RunsDisplay({name: config.steps for name, config in runs.items()}, done, console) as display,
            closing(run_tasks(work, left, jobs, lambda task, heard: display.show(task["run"], *heard))) as outcomes,
        ):
            for outcome in outcomes:
                name = outcome.task["run"]
                if isinstance(outcome, Failed):
                    failures.append(_keep_failure(outcome.error, folder.run_path(name) / "failure.txt"))
                    display.end(name, failures[-1])
                else:
                    ended += 1
                    display.end(name, f"{name}: return {outcome.result:.4g} after {clock(outcome.seconds)}")
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"stopped with {ended} of {len(runs)} runs done; go on, from the others' last checkpoints, with: {command}"
        ) from error
    return failures


def _keep_failure(error: TaskError, file: Path) -> str:
    with suppress(OSError):  # as where the folder cannot be made, which the error tells of already
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, (error.details or f"{error}\n").encode())
    return f"{error} ({file})"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
