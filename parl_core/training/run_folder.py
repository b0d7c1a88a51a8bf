"""The folder of one run.

config.json        every number that the run depends on
environment.json   commit, versions and processor, once for each time that the run was begun or taken up again
metrics.csv        a row for every evaluation
checkpoint/        the latest checkpoint (see `checkpoint.py`)
events.out.*       TensorBoard's
curve.png          the returns, at the end
summary.json       the first and last of them, at the end
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, RunFolderError
from ..files import write_atomically
from ..provenance import SIMULATORS, describe_environment, version
from .checkpoint import MANIFEST, load_checkpoint, save_checkpoint
from .config import TrainConfig, from_dict, to_dict

COLUMNS = (
    "step",
    "true_return",
    "true_return_std",
    "success_rate",
    "labels",
    "queries",
    "episodes",
    "reward_accuracy",
    "fresh_accuracy",
    "reward_loss",
    "implicit_to_direct",
    "implicit_signal",
    "solver_iterations",
    "solver_residual",
    "unconverged_solves",
    "temperature",
    "critic_loss",
)
"""Of metrics.csv, one row per evaluation; a cell is empty where the quantity does not exist."""

Row = dict[str, float | int | None]


class RunFolder:
    """Paths and files of one run. Everything is replaced atomically: a kill or a full disk loses nothing written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> RunFolder:
        """Make a new folder with its config.

        Raises:
            RunFolderError: the folder holds something already, or cannot be written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            # A kill before the config was complete leaves no more than a part of it.
            occupied = any(entry.name != "config.json.partial" for entry in path.iterdir())
        except OSError as error:
            raise RunFolderError(f"Cannot make the run folder {path}: {error.strerror or error}") from error
        if occupied:
            raise RunFolderError(
                f"The run folder {path} is not empty: go on with it by --resume {path}, or choose another --run-dir"
            )
        folder = cls(path)
        folder.write_json("config.json", to_dict(config))
        return folder

    @classmethod
    def open(cls, path: Path) -> tuple[RunFolder, TrainConfig]:
        """An existing folder and its config.

        Raises:
            RunFolderError: it is no run folder, or its config cannot be read.
        """
        try:
            config = from_dict(json.loads((path / "config.json").read_text()))
        except FileNotFoundError as error:
            raise RunFolderError(f"{path} is not a run folder: it has no config.json") from error
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise RunFolderError(f"{path / 'config.json'} cannot be read: {reason}") from error
        return cls(path), config

    @property
    def checkpoint_path(self) -> Path:
        """The file that is there if, and only if, there is a checkpoint."""
        return self.path / "checkpoint" / MANIFEST

    def add_row(self, row: Mapping[str, float | int | None]) -> None:
        """Append one evaluation to metrics.csv."""
        unknown = set(row) - set(COLUMNS)
        if unknown:
            raise ConfigError(f"metrics.csv has no column {', '.join(sorted(unknown))}")
        self.rows.append({name: row.get(name) for name in COLUMNS})
        self._write_rows()

    def save(self, state: Mapping[str, Any], step: int | None = None) -> None:
        """Replace the checkpoint, the rows so far included; `step` is noted in its manifest."""
        save_checkpoint(self.checkpoint_path.parent, {"rows": self.rows, **state}, step=step)

    def load(self) -> dict[str, Any]:
        """Read the checkpoint; changes nothing on disk."""
        return load_checkpoint(self.checkpoint_path.parent)

    def add_sitting(self, step: int) -> None:
        """Note in environment.json where and with what the run is begun, or gone on with, at `step`.

        Raises:
            RunFolderError: the file cannot be read or written.
        """
        path = self.path / "environment.json"
        try:
            sittings = json.loads(path.read_text())["sittings"] if path.exists() else []
            sittings.append({"step": step, **describe_environment(), **{name: version(name) for name in SIMULATORS}})
        except OSError as error:
            raise RunFolderError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunFolderError(f"{path} is not as parl train writes it: remove it to go on without it") from error
        self.write_json(path.name, {"sittings": sittings})

    def set_rows(self, rows: list[Row]) -> None:
        """Make metrics.csv hold these rows, as when a run goes back to its last checkpoint."""
        self.rows = list(rows)
        self._write_rows()

    def summarised_steps(self) -> int | None:
        """The `TrainConfig.steps` of the run that summary.json speaks of; None without a readable one."""
        try:
            return json.loads((self.path / "summary.json").read_text()).get("steps")
        except (OSError, ValueError, AttributeError):
            return None

    def set_aside_rows(self) -> Path | None:
        """Move a metrics.csv that no checkpoint belongs to out of the way; returns its new name."""
        if not (self.path / "metrics.csv").exists():
            return None
        number = 1
        while (aside := self.path / f"metrics.{number}.csv").exists():
            number += 1
        try:
            os.replace(self.path / "metrics.csv", aside)
        except OSError as error:
            raise RunFolderError(f"Cannot rename {self.path / 'metrics.csv'}: {error.strerror or error}") from error
        return aside

    def write_json(self, name: str, data: Any) -> None:
        """Write a small JSON file into the folder."""
        write_atomically(self.path / name, (json.dumps(data, indent=2) + "\n").encode())

    def _write_rows(self) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.rows:
            writer.writerow(["" if row[name] is None else row[name] for name in COLUMNS])
        write_atomically(self.path / "metrics.csv", text.getvalue().encode())


def free_run_path(root: Path, config: TrainConfig) -> Path:
    """A folder name for this run that is not taken: env_algorithm_seed, then _2, _3, …"""
    stem = f"{config.env.replace('/', '-')}_{config.algorithm}_seed{config.seed}"
    path, number = root / stem, 2
    while path.exists() and (not path.is_dir() or os.listdir(path)):
        path, number = root / f"{stem}_{number}", number + 1
    return path


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv; empty cells are left out.

    Raises:
        RunFolderError: there is no such file, or it does not hold numbers.
    """
    file = path / "metrics.csv"
    try:
        with open(file, newline="") as text:
            rows = list(csv.DictReader(text))
        table = [{key: float(cell) for key, cell in row.items() if key and cell} for row in rows]
    except FileNotFoundError as error:
        raise RunFolderError(f"{path} is not a run folder with evaluations: it has no metrics.csv") from error
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}") from error
    for number, row in enumerate(table, start=1):
        if not {"step", "true_return"} <= row.keys():
            raise RunFolderError(f"{file} must hold step and true_return in every row, but row {number} does not")
    return table
