"""Results of benchmarks as they lie on disk: a JSON file for each topic, with the environment they were measured in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contestant in a contest. Times are of one call."""

    name: str
    ours: bool
    limited: str | None = None
    """What it cannot do that the others can, for example serve other parameters than those it was compiled for."""
    withheld: str | None = None
    """Why it has no times: its package is not installed, it does not exist here, or its answer is wrong."""
    error: float | None = None
    """Of its answer against the reference, in the contest's own measure."""
    median: float | None = None
    """Seconds, as the quartiles."""
    lower_quartile: float | None = None
    upper_quartile: float | None = None
    rounds: int = 0
    speedup: float | None = None
    """The best peer's time over this one's, medians over rounds; of a peer: of the best *other* peer's."""
    speedup_unlimited: float | None = None
    """The same against the best peer that is not `limited`; only where some peer is."""
    to_floor: float | None = None
    """This time over the floor's."""
    gradients: float | None = None
    """This time over that of one forward and backward pass of the same network."""
    peak_mib: float | None = None
    """Memory at the peak of one call, beyond what was resident before it."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """One problem and its contestants, measured in turns within one process."""

    topic: str
    """The benchmark file, without test_ and .py."""
    name: str
    entries: tuple[Entry, ...]
    floor: float | None = None
    """Seconds below which the machine cannot go, as measured in the same rounds."""
    floor_of: str | None = None
    """What the floor consists of."""
    gradient: float | None = None
    """Seconds of one forward and backward pass."""

    @property
    def broken(self) -> list[Entry]:
        """Contestants that failed or gave a wrong answer; one that is not here did neither."""
        return [entry for entry in self.entries if entry.withheld is not None and not is_missing(entry)]

    @property
    def fastest(self) -> Entry | None:
        """By the median."""
        timed = [entry for entry in self.entries if entry.median is not None]
        return min(timed, key=lambda entry: entry.median or 0.0, default=None)


MISSING = "not installed"
ABSENT = "not here"


def is_missing(entry: Entry) -> bool:
    """Whether the contestant has no times because it cannot run here at all."""
    return entry.withheld is not None and entry.withheld.startswith((MISSING, ABSENT))


@dataclass(frozen=True)
class Results:
    """The contests of a file or of several."""

    environment: dict[str, Any]
    contests: tuple[Contest, ...]


def write_results(folder: Path, results: Results) -> list[Path]:
    """Write `<topic>.json` into `folder` for each topic; returns the files.

    Raises:
        RunFolderError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for topic in dict.fromkeys(contest.topic for contest in results.contests):
        contests = [asdict(contest) for contest in results.contests if contest.topic == topic]
        document = {"environment": results.environment, "contests": contests}
        path = folder / f"{topic}.json"
        write_atomically(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
        paths.append(path)
    return paths


def read_results(path: Path) -> Results:
    """Of a file, or of all files in a folder that hold contests; the environment is then the first one's.

    Raises:
        ConfigError: there is no such file, or nothing in it is a result of `parl bench`.
    """
    files = read_files(path)
    return Results(files[0].environment, tuple(contest for results in files for contest in results.contests))


def read_files(path: Path) -> list[Results]:
    """As `read_results`, each file by itself."""
    paths = sorted(path.glob("*.json")) if path.is_dir() else [path]
    files = [results for file in paths if (results := _read(file)) is not None]
    if not files:
        raise ConfigError(f"{path} holds no results of parl bench")
    return files


def _read(path: Path) -> Results | None:
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror or error}") from error
    except ValueError:
        return None
    if not isinstance(document, dict) or "contests" not in document:
        return None
    try:
        return Results(document["environment"], tuple(map(contest_of, document["contests"])))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} was written by another version of parl bench ({error})") from error


def contest_of(fields: dict[str, Any]) -> Contest:
    """The contest that `dataclasses.asdict` made `fields` of."""
    return Contest(**{**fields, "entries": tuple(Entry(**entry) for entry in fields["entries"])})


def by_name(contests: Sequence[Contest]) -> dict[tuple[str, str], Contest]:
    """Contests by topic and name."""
    return {(contest.topic, contest.name): contest for contest in contests}
