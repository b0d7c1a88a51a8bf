"""What a result was computed with, in words: every sitting that did a part of it is told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..provenance import SIMULATORS


class Sitting(NamedTuple):
    """One time that a folder was worked on."""

    environment: dict[str, Any]
    """The `FACTS` of where and with what."""
    jobs: int
    tasks: int
    """Tasks of the result that were done in it."""
    wall_seconds: float
    """From its begin to the end of its last task."""


def dates(sittings: Sequence[Sitting]) -> str:
    """When it was computed."""
    return _joined(sitting.environment["date"] for sitting in sittings)


def code(sittings: Sequence[Sitting]) -> str:
    """Version and commit of this package."""
    return f"parl-core {_joined(sitting.environment['parl_core'] for sitting in sittings)} at {commits(sittings)}"


def commits(sittings: Sequence[Sitting]) -> str:
    """The commits, and whether any of them had changes on top."""
    names = [sitting.environment["commit"] for sitting in sittings]
    dirty = any(sitting.environment["dirty"] for sitting in sittings)
    known = _joined("an unknown commit" if name is None else f"commit {name[:12]}" for name in names)
    return known + (" with uncommitted changes" if dirty else "")


def versions(sittings: Sequence[Sitting]) -> str:
    """Of Python and of the packages that were there; simulators, where they are told of, come last."""
    named = (("Python", "python"), ("NumPy", "numpy"), ("torch", "torch"), ("numba", "numba"))
    parts = []
    for name, key in (*named, *zip(SIMULATORS, SIMULATORS, strict=True)):
        values = [sitting.environment.get(key) for sitting in sittings]
        if any(values):
            parts.append(f"{name} {_joined(value or 'none' for value in values)}")
    return ", ".join(parts)


def processors(sittings: Sequence[Sitting]) -> str:
    """The CPUs, and on how many processes."""
    cpus = _joined(sitting.environment["cpu"] or "processor unknown" for sitting in sittings)
    jobs = _joined(sitting.jobs for sitting in sittings)
    return f"{cpus}, {jobs} {'process' if jobs == '1' else 'processes'}"


def _joined(values: Iterable[Any]) -> str:
    """Every value once, in the order of the sittings."""
    return " and ".join(dict.fromkeys(map(str, values)))
