"""From a study to its folder: does the tasks that are not done yet, then writes, prints and draws what they gave."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError, Interrupted, import_extra
from ..files import write_atomically
from ..provenance import describe_environment
from ..workers import Failed, Finished, Report, Task, TaskError, do_tasks, run_tasks
from .csv_files import plain_rows
from .folder import Sitting, StudyFolder, read_record, read_rows
from .provenance import code, commits, dates
from .study import Rows, Study
from .tables import to_text

_PLAIN_REPORTS, _PLAIN_PAUSE = 10, 2.0
"""Lines that tell of progress where there is no terminal, at most, and the seconds between two of them, at least."""


def reproduce(study: Study, path: Path, *, jobs: int, command: str, console: Any) -> None:
    """Do a study in the folder `path`, or what is left of it; print its tables and draw its figures there.

    Args:
        jobs: processes, at least 1.
        command: what the user typed, for the record.
        console: a rich Console.

    Raises:
        ConfigError: settings that the study's `tasks` refuses, that make no task, or other than those the folder was
            begun with.
        RunFolderError: the folder cannot be used.
        TaskError: a task failed; what is done is kept.
        Interrupted: Ctrl-C; what is done is kept.
    """
    command_name = f"parl reproduce {study.name}"  # what it needs is asked for before minutes of work
    import_extra("matplotlib", "train", needed_for=command_name)
    if study.needs_numba:
        import_extra("numba", "numba", needed_for=command_name)
    tasks = list(study.tasks())
    if not tasks:
        raise ConfigError(f"{study.name} has no tasks with these settings")
    folder = StudyFolder.open(path, study)
    try:
        if folder.complete:
            _say(console, _nothing_to_do(path))
        else:
            _compute(study, tasks, folder, jobs, command, console)
        rows = read_rows(path)
        for table in study.tables(rows):
            _say(console, "\n" + to_text(table))
        figures = study.figures(rows, path)
        folder.name_figures(figures)
        _say(console, f"\nResult folder: {path}   figures: {', '.join(figure.name for figure in figures)}")
    finally:
        folder.close()


def _nothing_to_do(path: Path) -> str:
    sittings, now = read_record(path).sittings, describe_environment()
    lines = [
        f"{path} is complete: computed {dates(sittings)} at {commits(sittings)}; remove it, or choose another --output, to "
        "compute again"
    ]
    if any(sitting.environment[fact] != now[fact] for sitting in sittings for fact in ("parl_core", "commit")):
        here = code([Sitting(now, jobs=1, tasks=0, wall_seconds=0.0)])
        lines.append(f"warning: it was computed by {code(sittings)}, but this is {here}")
    return "\n".join(lines)


def _compute(study: Study, tasks: Sequence[Task], folder: StudyFolder, jobs: int, command: str, console: Any) -> None:
    left = [task for task in tasks if not folder.is_done(task)]
    done = len(tasks) - len(left)
    failure = folder.path / "failure.txt"
    folder.begin({"command": command, "jobs": jobs, **describe_environment()})
    start = time.perf_counter()
    kept = "{} of {} tasks done; the same command goes on"
    try:
        with (
            _progress(study.name, done, len(tasks), console) as advance,
            closing(_results(study, left, jobs)) as finished,
        ):
            for result in finished:
                if isinstance(result, Failed):
                    raise result.error
                folder.add(result, time.perf_counter() - start)
                done += 1
                advance(done)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted: {kept.format(done, len(tasks))}") from error
    except TaskError as error:
        where = ""
        if error.details:
            write_atomically(failure, error.details.encode())
            where = f" (its traceback is in {failure})"
        raise TaskError(f"{error}{where}; {kept.format(done, len(tasks))}") from error
    failure.unlink(missing_ok=True)
    folder.finish(tasks)


def _results(study: Study, tasks: Sequence[Task], jobs: int) -> Generator[Finished | Failed, None, None]:
    """What the tasks give, in this process if that is enough."""
    do = partial(_rows, study)
    return run_tasks(do, tasks, jobs, _ignore) if jobs > 1 else do_tasks(do, tasks, _ignore)


def _rows(study: Study, task: Task, _: Report) -> Rows:
    return plain_rows(study.run(task))


def _ignore(task: Task, message: Any) -> None:
    """Studies' tasks report nothing."""


@contextmanager
def _progress(name: str, done: int, total: int, console: Any) -> Iterator[Any]:
    """Shows how far the work is: a bar on a terminal, elsewhere a line now and then. Yields advance(tasks done)."""
    if console.is_terminal:
        rich = import_extra("rich.progress", "train", needed_for="parl reproduce")
        bar = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("elapsed"),
            rich.TimeElapsedColumn(),
            rich.TextColumn("remaining"),
            rich.TimeRemainingColumn(),
            console=console,
        )
        shown = bar.add_task(name, total=total, completed=done)
        try:
            with bar:
                yield lambda now: bar.update(shown, completed=now)
        finally:
            console.show_cursor()  # which a Ctrl-C while the bar is being put up would leave hidden
        return
    start, first = time.perf_counter(), done
    last = start
    _say(console, f"{name}: {done} of {total} tasks done")

    def advance(now: int) -> None:
        nonlocal last
        tenth = now * _PLAIN_REPORTS // total > (now - 1) * _PLAIN_REPORTS // total
        if now == total or (tenth and time.perf_counter() - last >= _PLAIN_PAUSE):
            last = time.perf_counter()
            elapsed = last - start
            remaining = elapsed / (now - first) * (total - now)
            _say(
                console, f"{name}: {now} of {total} tasks done, {elapsed:.0f} s elapsed, about {remaining:.0f} s remain"
            )

    yield advance


def _say(console: Any, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
