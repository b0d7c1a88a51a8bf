"""What a person sees while runs go on: progress bars with the numbers that matter, and a table at a run's end."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..rl.rollout import Evaluation
from .config import TrainConfig
from .run_folder import Row
from .trainer import Evaluated, Event, Ticked
from .upper_level import SessionEnded

_PLAIN_PAUSE = 60.0
"""Seconds between two lines that tell where several runs stand, where there is no terminal."""


class Display:
    """A live progress bar on a terminal; elsewhere one line an evaluation."""

    def __init__(self, config: TrainConfig, console: Console) -> None:
        self._config, self._console = config, console
        self._shown: dict[str, Any] = {"return": "–", "labels": "–", "accuracy": "–", "implicit": "–", "solver": "–"}
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("return [bold]{task.fields[return]}[/]"),
        ]
        if config.learns_reward:
            columns += [
                TextColumn("labels {task.fields[labels]}"),
                TextColumn("accuracy {task.fields[accuracy]}"),
            ]
        if config.algorithm == "a-parl":
            columns += [
                TextColumn("implicit/direct {task.fields[implicit]}"),
                TextColumn("CG {task.fields[solver]}"),
            ]
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task(config.algorithm, total=config.steps, **self._shown)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start_at(self, step: int) -> None:
        """Where the run stands when it is resumed."""
        self._progress.update(self._task, completed=step)

    def show(self, event: Event) -> None:
        """Take note of an event."""
        if isinstance(event, Ticked):
            self._progress.update(self._task, completed=event.step)
        elif isinstance(event, SessionEnded):
            self._shown["labels"] = str(event.labels)
            self._shown["accuracy"] = _share(event.fit.accuracy)
            if event.implicit:
                self._shown["implicit"] = f"{event.implicit.implicit_to_direct:.2g}"
                self._shown["solver"] = f"{event.implicit.solver_iterations:.0f} it"
            self._progress.update(self._task, **self._shown)
        elif isinstance(event, Evaluated):
            self._shown["return"] = _number(event.row["true_return"])
            self._progress.update(self._task, completed=event.row["step"], **self._shown)
            self._console.print(describe(event.row), highlight=False, markup=False, soft_wrap=True)


class RunsDisplay:
    """Several runs at once: on a terminal a bar for all and a line for each that is under way; elsewhere plain lines.

    Args:
        steps: the length of every run by its name, in environment steps.
        done: the names of those that are done already.
    """

    def __init__(self, steps: Mapping[str, int], done: Collection[str], console: Console) -> None:
        self._steps, self._console = steps, console
        self._at = {name: steps[name] for name in done}
        self._returns: dict[str, float | None] = {}
        self._ended = len(done)
        self._lines: dict[str, TaskID] = {}
        self._told = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        total = sum(steps.values())
        self._all = self._progress.add_task("all runs", total=total, completed=sum(self._at.values()), note=self._count)

    def __enter__(self) -> RunsDisplay:
        self._progress.start()
        if not self._console.is_terminal:
            self._say(self._count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._console.is_terminal:
            self._console.show_cursor()  # which a Ctrl-C while the lines are being put up would leave hidden

    def show(self, name: str, step: int, true_return: float | None) -> None:
        """A run has come so far; its last evaluation gave `true_return`, None before the first."""
        self._at[name], self._returns[name] = step, true_return
        if name not in self._lines:
            self._lines[name] = self._progress.add_task(name, total=self._steps[name], note="")
        self._progress.update(self._lines[name], completed=step, note=f"return {_number(true_return)}")
        self._refresh_total()
        if not self._console.is_terminal and time.monotonic() - self._told >= _PLAIN_PAUSE:
            self._told = time.monotonic()
            under_way = (f"{run} {self._at[run]} return {_number(self._returns[run])}" for run in self._lines)
            self._say(f"{self._count}; {', '.join(under_way)}")

    def end(self, name: str, line: str) -> None:
        """A run has ended, well or badly: `line` says how."""
        self._ended += 1
        if name in self._lines:
            self._progress.remove_task(self._lines.pop(name))
        self._at[name] = self._steps[name]
        self._refresh_total()
        self._say(line)

    @property
    def _count(self) -> str:
        return f"{self._ended} of {len(self._steps)} runs ended"

    def _refresh_total(self) -> None:
        self._progress.update(self._all, completed=sum(self._at.values()), note=self._count)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def describe(row: Row) -> str:
    """One evaluation as a line."""
    parts = [f"step {row['step']:>7}", f"return {_number(row['true_return']):>7}"]
    if row["success_rate"] is not None:
        parts.append(f"success {_share(row['success_rate'])}")
    if row["labels"]:
        parts.append(f"labels {row['labels']}")
    if row["reward_accuracy"] is not None:
        parts.append(f"accuracy {_share(row['reward_accuracy'])}")
    if row["implicit_to_direct"] is not None:
        parts.append(f"implicit/direct {row['implicit_to_direct']:.2g}")
        parts.append(f"CG {row['solver_iterations']:.0f} it to {row['solver_residual']:.0e}")
    if row["unconverged_solves"]:
        parts.append(f"({row['unconverged_solves']} not converged)")
    return "  ".join(parts)


def summary_table(random: Evaluation, rows: list[Row]) -> Table:
    """Random policy, first and last evaluation side by side."""
    with_success = rows[-1]["success_rate"] is not None
    table = Table(title="True return")
    for column in ("", "step", "mean", "std", "× random", *(["success"] if with_success else [])):
        table.add_column(column, justify="left" if not column else "right")
    random_row: Row = {
        "step": None,
        "true_return": random.true_return,
        "true_return_std": random.true_return_std,
        "success_rate": random.success_rate,
    }
    named = (("random policy", random_row), ("first evaluation", rows[0]), ("last evaluation", rows[-1]))
    for name, row in named:
        value = float(row["true_return"] or 0.0)
        cells = [
            name,
            "" if row["step"] is None else str(row["step"]),
            _number(value),
            _number(row["true_return_std"]),
            f"{value / random.true_return:.1f}" if random.true_return > 0 else "–",
        ]
        table.add_row(*cells, *([_share(row["success_rate"])] if with_success else []))
    return table


def _number(value: float | None) -> str:
    """Four digits, and never a power of ten where all digits before the point tell more."""
    if value is None:
        return "–"
    return f"{value:.1f}" if abs(value) >= 100.0 else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.0f}%"
