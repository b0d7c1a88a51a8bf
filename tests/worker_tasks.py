"""Tasks for worker processes, which import this by its name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from parl_core.errors import NonFiniteError


def square(task, report):
    """Reports its process and square, and does whatever the task says happens to it."""
    report((os.getpid(), task["number"] ** 2))
    if task.get("fate") == "raise":
        raise ZeroDivisionError("no such square")
    if task.get("fate") == "refuse":
        raise NonFiniteError("the square must be finite")
    if task.get("fate") == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return task["number"] ** 2


def report_for_ever(task, report):
    """Writes its process's id into a file, then reports until nobody listens."""
    Path(task["file"]).write_text(str(os.getpid()))
    while True:
        report("alive")
        time.sleep(0.02)
