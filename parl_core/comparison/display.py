"""What a person sees while several runs go on."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..training.display import number

_PLAIN_PAUSE = 60.0
"""Seconds between two lines that tell where several runs stand, where there is no terminal."""


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
        self._progress.update(self._lines[name], completed=step, note=f"return {number(true_return)}")
        self._refresh_total()
        if not self._console.is_terminal and time.monotonic() - self._told >= _PLAIN_PAUSE:
            self._told = time.monotonic()
            under_way = (f"{run} {self._at[run]} return {number(self._returns[run])}" for run in self._lines)
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
