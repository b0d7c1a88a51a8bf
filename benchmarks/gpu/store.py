"""What has been done, on disk: a JSON file for each step, so that the same command goes on where it was stopped.

A step counts as done only for the sources, the device and the mode that it was done with.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parl_core.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]

_SOURCES = ("CMakeLists.txt", "csrc", "bindings", "kernels", "parl_core", "benchmarks", "tests")
_SUFFIXES = frozenset({".py", ".cpp", ".h", ".cu", ".cuh", ".txt", ".sh"})


class Store:
    """The folder of a run.

    Args:
        folder: made if it is not there.
        key: what a step depends on besides its name; steps of another key count as not done.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, step: str) -> Path:
        """Of the step's file; names are kept readable, and apart."""
        return (
            self.folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', step)}-{hashlib.sha256(step.encode()).hexdigest()[:6]}.json"
        )

    def read(self, step: str) -> dict[str, Any] | None:
        """What `write` was given; None if it was not, or for another key."""
        try:
            document = json.loads(self.path(step).read_text())
        except (OSError, ValueError):
            return None
        return document["outcome"] if document.get("key") == self.key else None

    def write(self, step: str, outcome: dict[str, Any]) -> None:
        """Keep the outcome of a step."""
        text = json.dumps({"step": step, "key": self.key, "outcome": outcome}, indent=1, ensure_ascii=False)
        write_atomically(self.path(step), text.encode())

    def forget(self) -> None:
        """All steps."""
        for path in self.folder.glob("*.json"):
            path.unlink()


def fingerprint(*facts: object, root: Path = ROOT) -> str:
    """Of all sources that decide what a step does, and of further facts."""
    digest = hashlib.sha256(repr(facts).encode())
    for path in source_files(root, *_SOURCES):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def source_files(root: Path, *names: str) -> Iterator[Path]:
    """All source files under the files and folders called `names`, in order."""
    for name in names:
        top = root / name
        files = sorted(top.rglob("*")) if top.is_dir() else [top]
        yield from (path for path in files if path.suffix in _SUFFIXES and path.is_file())
