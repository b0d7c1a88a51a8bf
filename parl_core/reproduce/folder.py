"""The folder of one reproduction.

settings.json      the study and its settings, from the start
progress.jsonl     a line for every finished task and one for every time the work was taken up, as it goes
*.csv              the rows of all tasks, in the order of the study's tasks, at the end
environment.json   commits, versions, processors, times: after all CSVs, so a folder that has it is complete
figures.json       names of the figures, in the order in which the results page shows them
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from ..errors import ConfigError, RunFolderError
from ..files import lock_folder, write_atomically
from ..provenance import FACTS
from ..workers import Finished, Task
from .csv_files import read_csv, write_csv
from .study import Rows, Study

DEFAULT_OUTPUT = Path("runs", "reproduce")
"""Where a study's folder is made unless another is named."""


class Sitting(NamedTuple):
    """One time that a folder was worked on."""

    environment: dict[str, Any]
    """The `FACTS` of where and with what."""
    jobs: int
    tasks: int
    """Tasks of the result that were done in it."""
    wall_seconds: float
    """From its begin to the end of its last task."""


class Record(NamedTuple):
    """How a complete folder came about."""

    command: str
    """What the user typed last."""
    sittings: list[Sitting]
    """Those that did at least one task, in their order."""
    rows: dict[str, int]
    """CSV name -> number of its rows."""


class Results(NamedTuple):
    """What a complete folder holds."""

    study: str
    settings: dict[str, Any]
    record: Record
    rows: Rows
    figures: list[Path]


class StudyFolder:
    """The files of one reproduction; a kill at any moment loses at most the tasks that were under way."""

    def __init__(self, path: Path, study: Study) -> None:
        self.path, self._study = path, study
        self._progress = path / "progress.jsonl"
        self._command = ""
        self._sittings: list[Sitting] = []
        self._finished: dict[str, dict[str, Any]] = {}
        self._lock: int | None = None

    @classmethod
    def open(cls, path: Path, study: Study) -> StudyFolder:
        """Make the folder, or go on with the one that is there; until `close` nobody else can.

        Raises:
            RunFolderError: it holds something else or another study, cannot be read or written, or is in use.
            ConfigError: it was begun with other settings, or by another version and is not complete.
        """
        folder = cls(path, study)
        folder._lock = lock_folder(
            path, "parl reproduce"
        )  # before anything in it is looked at: two commands may begin it at once
        try:
            folder._take_over()
        except BaseException:
            folder.close()
            raise
        return folder

    @property
    def complete(self) -> bool:
        """Whether every task is done and the CSVs are written."""
        return (self.path / "environment.json").exists()

    def is_done(self, task: Task) -> bool:
        """Whether the task was finished, now or earlier."""
        return _key(task) in self._finished

    def begin(self, environment: Mapping[str, Any]) -> None:
        """Note under which circumstances the tasks that follow are done: `command`, `jobs` and the environment's facts."""
        line = {"environment": dict(environment)}
        self._append(line)
        self._take_up(line)

    def add(self, done: Finished, wall_seconds: float) -> None:
        """Keep a finished task; `wall_seconds` have passed since `begin`."""
        line = {
            "task": dict(done.task),
            "rows": done.result,
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
        counts = Counter(self._finished[_key(task)]["sitting"] for task in tasks)
        sittings = [
            sitting._replace(tasks=counts[number])._asdict()
            for number, sitting in enumerate(self._sittings)
            if counts[number]
        ]
        facts = {
            "command": self._command,
            "sittings": sittings,
            "task_seconds": round(sum(self._finished[_key(task)]["seconds"] for task in tasks), 1),
            "rows": {name: len(lines) for name, lines in rows.items()},
        }
        _write_json(self.path / "environment.json", facts)

    def name_figures(self, figures: Sequence[Path]) -> None:
        """Note which figures there are, and their order."""
        _write_json(self.path / "figures.json", [figure.name for figure in figures])

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_over(self) -> None:
        try:
            names = [name for name in os.listdir(self.path) if not name.endswith(".partial")]
        except OSError as error:
            raise RunFolderError(f"Cannot read the folder {self.path}: {error.strerror or error}") from error
        if "settings.json" in names:
            self._refuse_changes(_read_settings(self.path))
        elif names:
            raise RunFolderError(f"{self.path} is not empty and no folder of parl reproduce: choose another --output")
        else:
            _write_json(self.path / "settings.json", _settings(self._study))
        if not self.complete:
            self._read_progress()

    def _refuse_changes(self, before: dict[str, Any]) -> None:
        now = json.loads(json.dumps(_settings(self._study)))
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
                f"{self.path} was begun with other settings: {', '.join(changed)}; remove it, or choose another --output"
            )
        if before.get("parl_core") != __version__ and not self.complete:
            raise ConfigError(
                f"{self.path} was begun by parl-core {before.get('parl_core')} and this is {__version__}: remove it, or "
                "choose another --output"
            )

    def _read_progress(self) -> None:
        """Take up what was kept; a last line torn by a kill is cut off, so that the next begins on its own."""
        try:
            self._progress.touch()
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
                    f"{self._progress} is damaged in line {number}: delete it and all lines after it, to have "
                    "their tasks done again"
                ) from error

    def _take_up(self, line: dict[str, Any]) -> None:
        if "environment" in line:
            facts = dict(line["environment"])
            self._command, jobs = facts.pop("command"), facts.pop("jobs")
            self._sittings.append(Sitting(facts, jobs, tasks=0, wall_seconds=0.0))
        else:
            self._sittings[-1] = self._sittings[-1]._replace(wall_seconds=line["wall_seconds"])
            done = {"rows": line["rows"], "seconds": line["seconds"], "sitting": len(self._sittings) - 1}
            self._finished[_key(line["task"])] = done

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
    settings = _read_settings(path)
    figures = _read_figures(path)
    missing = [str(figure) for figure in figures if not figure.exists()]
    if missing:
        raise RunFolderError(f"{', '.join(missing)} is missing: the folder's parl reproduce draws it again")
    return Results(
        study=str(settings.get("study")),
        settings=settings["settings"],
        record=read_record(path),
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


def read_record(path: Path) -> Record:
    """How a complete folder came about.

    Raises:
        RunFolderError: its environment.json cannot be read, or is not as this version writes it.
    """
    data = _read_json(path / "environment.json")
    try:
        sittings = [Sitting(**sitting) for sitting in data["sittings"]]
        record = Record(data["command"], sittings, dict(data["rows"]))
        whole = bool(sittings) and all(sitting.environment.keys() >= FACTS for sitting in sittings)
    except (AttributeError, KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise RunFolderError(
            f"{path / 'environment.json'} is not as this parl reproduce writes it: remove {path} and compute it again"
        )
    return record


def read_rows(path: Path) -> Rows:
    """The CSVs of a complete folder.

    Raises:
        RunFolderError: one cannot be read, or has lost or gained rows.
    """
    rows: Rows = {}
    for name, number in read_record(path).rows.items():
        rows[name] = read_csv(path / f"{name}.csv")
        if len(rows[name]) != number:
            raise RunFolderError(
                f"{path / name}.csv must have the {number} rows it was written with, got {len(rows[name])}"
            )
    return rows


def _read_settings(path: Path) -> dict[str, Any]:
    settings = _read_json(path / "settings.json")
    if not isinstance(settings, dict) or not isinstance(settings.get("settings"), dict):
        raise RunFolderError(f"{path / 'settings.json'} cannot be read: it is none of parl reproduce")
    return settings


def _read_figures(path: Path) -> list[Path]:
    again = "the folder's parl reproduce draws it again"
    if not (path / "figures.json").exists():
        raise RunFolderError(f"{path / 'figures.json'} is missing: {again}")
    names = _read_json(path / "figures.json")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RunFolderError(f"{path / 'figures.json'} must be a list of file names: {again}")
    return [path / name for name in names]


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
