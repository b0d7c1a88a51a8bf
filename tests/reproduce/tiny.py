"""A study whose tasks take no time, but can be held up, made to fail and made to die."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parl_core.errors import ConfigError, NonFiniteError
from parl_core.reproduce.study import Study
from parl_core.results.tables import Table


@dataclass(frozen=True)
class Tiny(Study):
    """Squares, and numbers that a CSV may lose."""

    name = "tiny"
    title = "Tiny | study"
    source = "nowhere"
    needs_numba = False

    size: int = 6
    """Tasks."""
    factors: tuple[float, ...] = (1.0, 0.5)
    """Each a row."""
    hold: str = ""
    """A file: while it names tasks, as in "3 4", these wait."""
    trouble: str = ""
    """A file: while it holds "raise 3", "refuse 3" or "die 3", task 3 does so; at "ctrl-c 3" its process alone is struck."""

    def tasks(self):
        if self.size < 1:
            raise ConfigError(f"--size must be at least 1, got {self.size}")
        return [{"seed": seed, "kind": "even" if seed % 2 == 0 else "odd"} for seed in range(self.size)]

    def run(self, task):
        seed = task["seed"]
        deadline = time.monotonic() + 60
        while str(seed) in _read(self.hold).split():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        trouble = _read(self.trouble)
        if trouble == f"raise {seed}":
            raise ZeroDivisionError("no such square")
        if trouble == f"refuse {seed}":
            raise NonFiniteError("the square must be finite")
        if trouble == f"die {seed}":
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == f"ctrl-c {seed}":
            os.kill(os.getpid(), signal.SIGINT)
        lines = [{"seed": seed, "factor": f, "square": np.float64(f * seed) ** 2 / 3} for f in self.factors]
        odd = {"seed": np.int64(seed), "nan": math.nan, "inf": -math.inf, "small": 5e-324, "kind": task["kind"]}
        return {"squares": lines, "odd": [{**odd, "threads": int(os.environ.get("OPENBLAS_NUM_THREADS", 0))}]}

    def tables(self, rows):
        lines = tuple((str(row["seed"]), f"{row['square']:.3f}") for row in rows["squares"])
        return [Table("Squares", ("seed", "square"), lines, "A | note.")]

    def figures(self, rows, directory):
        assert [row["seed"] for row in rows["odd"]] == list(range(self.size))
        names = [directory / "b.png", directory / "a.png"]
        for path in names:
            path.write_bytes(b"\x89PNG")
        return names


def _read(path):
    try:
        return Path(path).read_text() if path else ""
    except FileNotFoundError:
        return ""


def main() -> int:
    """`parl` with this study in place of all others."""
    from parl_core import cli
    from parl_core.reproduce import registry

    registry._STUDIES.clear()
    registry._STUDIES["tiny"] = registry._Entry("tiny", "Tiny", "squares")
    sys.modules["parl_core.reproduce.studies.tiny"] = sys.modules["tests.reproduce.tiny"]
    return cli.main(sys.argv[1:])
