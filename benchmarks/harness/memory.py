"""Peak memory of a call, through Linux's /proc."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def peak_mib(call: Callable[[], Any]) -> float | None:
    """MiB at the peak of `call`, beyond what is resident before it; None where the system does not tell."""
    if not _CLEAR_REFS.exists():
        return None
    # What earlier calls left free goes back, or this one could use it without being seen; then the peak starts anew.
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")
    before = resident("VmRSS")
    call()
    return round((resident("VmHWM") - before) / 2**20, 2)


def resident(field: str) -> int:
    """Bytes, now (VmRSS) or at the peak (VmHWM)."""
    lines = _STATUS.read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))
