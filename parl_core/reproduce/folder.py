"""The folder of one reproduction.

settings.json      the study and its settings, from the start
progress.jsonl     a line for every finished task and one for every time the work was taken up, as it goes
*.csv              the rows of all tasks, in the order of the study's tasks, at the end
environment.json   commit, versions, processor, times: the last to be written, so a folder that has it is complete
figures.json       names of the figures, in the order in which the results page shows them
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from ..errors import ConfigError, RunFolderError
from ..files import write_atomically
from .csv_files import read_csv, write_csv
from .study import Rows, Study
from .workers import Finished, Task


class Results(NamedTuple):
    """What a complete folder holds."""

    study: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    rows: Rows
    figures: list[Path]


class StudyFolder:
    """The files of one reproduction; a kill at any moment loses at most the tasks that were under way."""

    def __init__(self, path: Path, study: Study) -> None:
        self.path, self._study = path, study
        self._progress = path / "progress.jsonl"
        self._sittings: list[dict[str, Any]] = []
        self._finished: dict[str, dict[str, Any]] = {}
        self._lock: Any = None

    @classmethod
    def open(cls, path: Path, study: Study) -> StudyFolder:
        """Make the folder, or go on with the one that is there.

        Raises:
            RunFolderError: it holds something else or another study, cannot be read or written, or is in use.
            ConfigError: it was begun with other settings, or by another version and is not complete.
        """
        folder = cls(path, study)
        try:
            path.mkdir(parents=True, exist_ok=True)
            names = [name for name in os.listdir(path) if not name.endswith(".partial")]
        except OSError as error:
            raise RunFolderError(f"Cannot make the folder {path}: {error.strerror or error}") from error
        if "settings.json" in names:
            folder._refuse_changes(_read_json(path / "settings.json"))
        elif names:
            raise RunFolderError(f"{path} is not empty and no folder of parl reproduce: choose another --output")
        else:
            _write_json(path / "settings.json", _settings(study))
        if not folder.complete:
            folder._take_lock()
            folder._read_progress()
        return folder

    @property
    def complete(self) -> bool:
        """Whether every task is done and the CSVs are written."""
        return (self.path / "environment.json").exists()

    def is_done(self, task: Task) -> bool:
        """Whether the task was finished, now or earlier."""
        return _key(task) in self._finished

    def begin(self, environment: Mapping[str, Any]) -> None:
        """Note under which circumstances the tasks that follow are done."""
        self._append({"environment": dict(environment)})
        self._sittings.append({"environment": dict(environment), "wall_seconds": 0.0})

    def add(self, done: Finished, wall_seconds: float) -> None:
        """Keep a finished task; `wall_seconds` have passed since `begin`."""
        line = {
            "task": dict(done.task),
            "rows": done.rows,
            "seconds": round(done.seconds, 3),
            "wall_seconds": round(wall_seconds, 3),
        }
        self._append(line)
        self._take_up(line)

    def finish(self, tasks: Sequence[Task]) -> None:
        """Write the CSVs and environment.json, from which the folder counts as complete.

        Raises:
            ValueError: tasks whose rows of one CSV have different columns.
        """
        rows: Rows = {}
        for task in tasks:
            for name, lines in self._finished[_key(task)]["rows"].items():
                rows.setdefault(name, []).extend(lines)
        for name, lines in rows.items():
            write_csv(self.path / f"{name}.csv", lines)
        last, earlier = self._sittings[-1]["environment"], [sitting["environment"] for sitting in self._sittings[:-1]]
        facts = {
            **last,
            "earlier_commits": sorted({one["commit"] for one in earlier} - {last["commit"], None}),
            "dirty": any(one["dirty"] for one in (*earlier, last)) if last["dirty"] is not None else None,
            "wall_seconds": round(sum(sitting["wall_seconds"] for sitting in self._sittings), 1),
            "task_seconds": round(sum(self._finished[_key(task)]["seconds"] for task in tasks), 1),
            "tasks": len(tasks),
            "rows": {name: len(lines) for name, lines in rows.items()},
        }
        _write_json(self.path / "environment.json", facts)

    def name_figures(self, figures: Sequence[Path]) -> None:
        """Note which figures there are, and their order."""
        _write_json(self.path / "figures.json", [figure.name for figure in figures])

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock is not None:
            self._lock.close()

    def _refuse_changes(self, before: Any) -> None:
        now = json.loads(json.dumps(_settings(self._study)))
        where = f"{self.path / 'settings.json'}"
        if not isinstance(before, dict) or not isinstance(before.get("settings"), dict):
            raise RunFolderError(f"{where} cannot be read: it is none of parl reproduce")
        if before.get("study") != now["study"]:
            raise RunFolderError(f"{self.path} holds the study {before.get('study')}: choose another --output")
        old, new = before["settings"], now["settings"]
        changed = [
            f"{name} = {new.get(name)} (it was {old.get(name)})"
            for name in {**old, **new}
            if name not in old or name not in new or json.dumps(old[name]) != json.dumps(new[name])
        ]
        if changed:
            raise ConfigError(
                f"{self.path} was begun with other settings: {', '.join(changed)}; choose another --output"
            )
        if before.get("parl_core") != __version__ and not self.complete:
            raise ConfigError(
                f"{self.path} was begun by parl-core {before.get('parl_core')} and this is {__version__}: choose another "
                "--output"
            )

    def _take_lock(self) -> None:
        """Two commands must not work in one folder; a lock ends with its process, however that ends."""
        with suppress(ImportError):  # on Windows, where nobody is kept out
            import fcntl

            try:
                self._lock = open(self._progress, "ab")  # noqa: SIM115 (closed by `close`)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunFolderError(f"{self.path} is in use by another parl reproduce") from error
            except OSError as error:
                raise RunFolderError(f"Cannot write {self._progress}: {error.strerror or error}") from error

    def _read_progress(self) -> None:
        """Take up what was kept; a last line torn by a kill is cut off, so that the next begins on its own."""
        try:
            data = self._progress.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                os.truncate(self._progress, len(whole))
        except OSError as error:
            raise RunFolderError(f"Cannot read {self._progress}: {error.strerror or error}") from error
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self._take_up(json.loads(line))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise RunFolderError(
                    f"{self._progress} is damaged in line {number}: delete that line to have its task done again"
                ) from error

    def _take_up(self, line: dict[str, Any]) -> None:
        if "environment" in line:
            self._sittings.append({"environment": line["environment"], "wall_seconds": 0.0})
        else:
            self._finished[_key(line["task"])] = {"rows": line["rows"], "seconds": line["seconds"]}
            self._sittings[-1]["wall_seconds"] = line["wall_seconds"]

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            with open(self._progress, "ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise RunFolderError(f"Cannot write {self._progress}: {error.strerror or error}") from error


def read_results(path: Path) -> Results:
    """Everything that a results page needs from a complete folder.

    Raises:
        RunFolderError: it is no folder of parl reproduce, is not complete, or a file in it cannot be read.
    """
    if not (path / "settings.json").exists():
        raise RunFolderError(f"{path} is no folder of parl reproduce: it has no settings.json")
    if not (path / "environment.json").exists():
        raise RunFolderError(f"{path} is not complete: run its parl reproduce to the end first")
    settings = _read_json(path / "settings.json")
    figures = [path / name for name in _read_json(path / "figures.json")]
    missing = [str(figure) for figure in figures if not figure.exists()]
    if missing:
        raise RunFolderError(f"{', '.join(missing)} is missing: the folder's parl reproduce draws it again")
    return Results(
        study=settings["study"],
        settings=settings["settings"],
        environment=_read_json(path / "environment.json"),
        rows=read_rows(path),
        figures=figures,
    )


def study_of(path: Path) -> str | None:
    """The study that a folder belongs to; None if it is no folder of parl reproduce."""
    try:
        study = _read_json(path / "settings.json")["study"]
    except (RunFolderError, KeyError, TypeError):
        return None
    return study if isinstance(study, str) else None


def read_rows(path: Path) -> Rows:
    """The CSVs of a complete folder.

    Raises:
        RunFolderError: one cannot be read, or has lost or gained rows.
    """
    rows: Rows = {}
    for name, number in _read_json(path / "environment.json")["rows"].items():
        rows[name] = read_csv(path / f"{name}.csv")
        if len(rows[name]) != number:
            raise RunFolderError(
                f"{path / name}.csv must have the {number} rows it was written with, got {len(rows[name])}"
            )
    return rows


def _settings(study: Study) -> dict[str, Any]:
    return {"study": study.name, "settings": asdict(study), "parl_core": __version__}  # type: ignore[call-overload]


def _key(task: Mapping[str, Any]) -> str:
    return json.dumps(task, sort_keys=True)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunFolderError(f"{path} cannot be read: {reason}") from error


def _write_json(path: Path, data: Any) -> None:
    write_atomically(path, (json.dumps(data, indent=2) + "\n").encode())
