"""The folder of a comparison.

comparison.json    the settings, from the start; later also the command, and where, when and with what every run was done
metrics.csv        every evaluation of every run
results.csv        the numbers of the tables
table.md           the tables
curves.png         the curves
runs/              a run folder each, with checkpoints and TensorBoard events: nothing else needs them
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, RunFolderError
from ..files import write_atomically
from ..results.csv_files import read_csv, write_csv
from ..results.sittings import Sitting, code, dates, processors, versions
from ..results.tables import Table, to_markdown
from ..training.config import TrainConfig, flatten, to_dict
from ..training.run_folder import RunFolder, read_metrics
from .curves import draw_curves
from .results import Run, grouped, results

_COLUMNS = ("step", "true_return", "success_rate", "labels")
"""What the comparison's metrics.csv has of a run's."""
_WHOLE = ("step", "labels")
_SHOWN_CHANGES = 4


class ComparisonFolder:
    """The files of one comparison; `path` exists already.

    Args:
        path: empty, or the folder of the same comparison.
        configs: of every run, by its name.

    Raises:
        RunFolderError: it holds something else, or cannot be read or written.
        ConfigError: it holds another comparison.
    """

    def __init__(self, path: Path, configs: Mapping[str, TrainConfig]) -> None:
        self.path, self._configs = path, configs
        self._file = path / "comparison.json"
        self._settings = _settings(configs)
        try:
            names = [name for name in os.listdir(path) if not name.endswith(".partial")]
        except OSError as error:
            raise RunFolderError(f"Cannot read the folder {path}: {error.strerror or error}") from error
        if names and self._file.name not in names:
            raise RunFolderError(f"{path} is not empty and no folder of parl compare: choose another --output")
        if names:
            self._record = self._read_record()
            _refuse_changes(path, self._record["settings"], self._settings)
        else:
            self._record = {"settings": self._settings}
            write_json(self._file, self._record)

    def run_path(self, name: str) -> Path:
        """The folder of a run."""
        return self.path / "runs" / name

    def done(self) -> dict[str, Run]:
        """The runs that are done by name: from their folders, or where runs/ is gone from the comparison's own files."""
        paths = {name: self.run_path(name) for name in self._configs}
        kept = {} if all(path.exists() for path in paths.values()) else self._kept()
        done = {}
        for name, config in self._configs.items():
            path = paths[name]
            if RunFolder(path).summarised_steps() == config.steps and RunFolder.open(path)[1] == config:
                sittings = read_json(path / "sittings.json")
                done[name] = Run(config.env, config.algorithm, config.seed, read_metrics(path), sittings)
            elif not path.exists() and name in kept:
                done[name] = kept[name]
        return done

    def write(self, runs: Sequence[Run], tables: Sequence[Table], command: str) -> Path:
        """Write everything but runs/ from the runs that are done; returns the picture."""
        groups = grouped(runs)
        ordered = [run for algorithms in groups.values() for group in algorithms.values() for run in group]
        write_csv(self.path / "metrics.csv", [row for run in ordered for row in _tidy(run)])
        write_csv(self.path / "results.csv", [_without_none(row) for row in results(runs)])
        page = "\n\n".join([f"`{command}`", _provenance(runs), *map(to_markdown, tables)])
        write_atomically(self.path / "table.md", (page + "\n").encode())
        curves = {
            env: {name: [run.rows for run in group] for name, group in algorithms.items()}
            for env, algorithms in groups.items()
        }
        picture = draw_curves(curves, self.path / "curves.png")
        facts = {run.name: {**_identity(run), "sittings": list(run.sittings)} for run in ordered}
        self._record = {"command": command, "runs": facts, "settings": self._settings}
        write_json(self._file, self._record)
        return picture

    def _read_record(self) -> dict[str, Any]:
        record = read_json(self._file)
        try:
            whole = isinstance(record["settings"]["configs"], dict) and "seeds" in record["settings"]
        except (KeyError, TypeError):
            whole = False
        if not whole:
            raise RunFolderError(f"{self._file} cannot be read: it is none of parl compare")
        return dict(record)

    def _kept(self) -> dict[str, Run]:
        facts = self._record.get("runs")
        if not facts:
            return {}
        rows: dict[tuple[Any, ...], list[dict[str, float]]] = {}
        try:
            for row in read_csv(self.path / "metrics.csv"):
                cells = {column: float(row[column]) for column in _COLUMNS if row[column] != ""}
                rows.setdefault((row["env"], row["algorithm"], row["seed"]), []).append(cells)
            return {
                name: Run(**identity, rows=rows[tuple(identity.values())], sittings=fact["sittings"])
                for name, fact in facts.items()
                for identity in [{key: fact[key] for key in ("env", "algorithm", "seed")}]
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunFolderError(
                f"{self.path / 'metrics.csv'} and {self._file} do not belong together ({error!r}): remove {self.path}"
            ) from error


def _settings(configs: Mapping[str, TrainConfig]) -> dict[str, Any]:
    """Every number of the runs, as JSON gives it back: environment -> algorithm -> configuration without the seed."""
    tables: dict[str, dict[str, Any]] = {}
    for config in configs.values():
        table = json.loads(json.dumps(to_dict(config)))
        of_env = tables.setdefault(table.pop("env"), {})
        del table["seed"]
        of_env[table.pop("algorithm")] = table
    return {"seeds": len({config.seed for config in configs.values()}), "configs": tables}


def _refuse_changes(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    def outline(settings: Mapping[str, Any]) -> dict[str, Any]:
        names = {name for algorithms in settings["configs"].values() for name in algorithms}
        return {
            "envs": " ".join(sorted(settings["configs"])),
            "algorithms": " ".join(sorted(names)),
            "seeds": settings["seeds"],
        }

    old, new = outline(before), outline(now)
    if old == new:
        old, new = flatten(before["configs"]), flatten(now["configs"])
    changed = [
        f"{name} = {new.get(name, 'unset')} (it was {old.get(name, 'unset')})"
        for name in {**old, **new}
        if old.get(name, ...) != new.get(name, ...)
    ]
    if changed:
        more = len(changed) - _SHOWN_CHANGES
        shown = ", ".join(changed[:_SHOWN_CHANGES]) + (f" and {more} more" if more > 0 else "")
        raise ConfigError(f"{path} holds another comparison: {shown}; remove it, or choose another --output")


def _provenance(runs: Sequence[Run]) -> str:
    facts = [sitting for run in runs for sitting in run.sittings]
    sittings = [Sitting(dict(fact), fact["jobs"], tasks=1, wall_seconds=fact["seconds"]) for fact in facts]
    return f"Computed {dates(sittings)} by {code(sittings)}, {versions(sittings)}; {processors(sittings)}."


def _identity(run: Run) -> dict[str, Any]:
    return {"env": run.env, "algorithm": run.algorithm, "seed": run.seed}


def _tidy(run: Run) -> list[dict[str, Any]]:
    return [
        _without_none(
            {**_identity(run), **{c: int(row[c]) if c in _WHOLE and c in row else row.get(c) for c in _COLUMNS}}
        )
        for row in run.rows
    ]


def _without_none(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "" if value is None else value for name, value in row.items()}


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        RunFolderError: it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunFolderError(f"{path} cannot be read: {reason}") from error


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, atomically."""
    write_atomically(path, (json.dumps(data, indent=2) + "\n").encode())
