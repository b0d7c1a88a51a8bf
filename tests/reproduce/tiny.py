"""A study whose tasks take no time, but can be slowed down, made to fail and made to die."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parl_core.errors import ConfigError
from parl_core.reproduce.study import Study, Table


@dataclass(frozen=True)
class Tiny(Study):
    """Squares, and numbers that a CSV may lose."""

    name = "tiny"
    title = "Tiny | study"
    source = "nowhere"

    size: int = 6
    """Tasks."""
    factors: tuple[float, ...] = (1.0, 0.5)
    """Each a row."""
    pause: float = 0.0
    """Seconds that a task takes, twice as long for the first."""
    trouble: str = ""
    """A file: while it holds "raise 3" or "die 3", task 3 does so; at "ctrl-c 3" its process alone is struck by that."""

    def tasks(self):
        if self.size < 1:
            raise ConfigError(f"--size must be at least 1, got {self.size}")
        return [{"seed": seed, "kind": "even" if seed % 2 == 0 else "odd"} for seed in range(self.size)]

    def run(self, task):
        seed = task["seed"]
        time.sleep(self.pause * (2 if seed == 0 else 1))
        trouble = Path(self.trouble).read_text() if self.trouble and Path(self.trouble).exists() else ""
        if trouble == f"raise {seed}":
            raise ZeroDivisionError("no such square")
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


def main() -> int:
    """`parl` with this study in place of all others."""
    from parl_core import cli
    from parl_core.reproduce import registry

    registry._STUDIES.clear()
    registry._STUDIES["tiny"] = registry._Entry("tiny", "Tiny", "squares")
    sys.modules["parl_core.reproduce.studies.tiny"] = sys.modules["tests.reproduce.tiny"]
    return cli.main(sys.argv[1:])
