"""What a person sees while a run goes on: a progress bar with the numbers that matter, and a table at its end."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..rl.rollout import Evaluation
from .config import TrainConfig
from .run_folder import Row
from .trainer import Evaluated, Event, Ticked
from .upper_level import SessionEnded


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
            self._shown["return"] = number(event.row["true_return"])
            self._progress.update(self._task, completed=event.row["step"], **self._shown)
            self._console.print(describe(event.row), highlight=False, markup=False, soft_wrap=True)


def describe(row: Row) -> str:
    """One evaluation as a line."""
    parts = [f"step {row['step']:>7}", f"return {number(row['true_return']):>7}"]
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
            number(value),
            number(row["true_return_std"]),
            f"{value / random.true_return:.1f}" if random.true_return > 0 else "–",
        ]
        table.add_row(*cells, *([_share(row["success_rate"])] if with_success else []))
    return table


def number(value: float | None) -> str:
    """Four digits, and never a power of ten where all digits before the point tell more."""
    if value is None:
        return "–"
    return f"{value:.1f}" if abs(value) >= 100.0 else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.0f}%"
