"""Where and with what a result was computed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import __version__

_PACKAGE = Path(__file__).resolve().parent
_CPUINFO = Path("/proc/cpuinfo")
_VERSIONED = ("parl_core", "kernels", "csrc", "bindings")
"""What of the repository decides the numbers."""

FACTS = frozenset({"commit", "dirty", "date", "parl_core", "python", "numpy", "torch", "numba", "cpu"})
"""What `describe_environment` tells."""

SIMULATORS = ("gymnasium", "mujoco", "dm_control", "metaworld")
"""Packages whose versions decide what an environment does."""


def describe_environment() -> dict[str, Any]:
    """Commit, date, versions and processor, as JSON scalars; None where something is not there or cannot be known."""
    return {
        **_commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "parl_core": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "torch", "numba")},
        "cpu": _processor(),
    }


def version(package: str) -> str | None:
    """Of an installed package; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _commit() -> dict[str, Any]:
    """The commit that the package is at, and whether its code has changes on top; None outside a clone of it."""
    # A package that is merely installed somewhere inside another project's clone is not tracked there.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": None, "dirty": None}
    root = _git("rev-parse", "--show-toplevel") or "."
    changes = _git("-C", root, "status", "--porcelain", "--", *_VERSIONED)
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if changes is None else changes != ""}


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(_PACKAGE), *arguments)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str | None:
    """The model where the system names it, else the architecture."""
    if platform.system() == "Darwin":
        model = _output("sysctl", "-n", "machdep.cpu.brand_string")
    else:
        try:
            lines = _CPUINFO.read_text().splitlines()
        except OSError:
            lines = []
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return model or platform.machine() or None
