"""Child processes that may fail, hang, or lose their CUDA context: nothing of that may reach the one that started them."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from .store import ROOT


def start(command: Sequence[str], log: Path, *, piped: bool = False, **environment: str) -> subprocess.Popen[str]:
    """Start in the checkout, with a process group of its own; what is not piped goes to the end of `log`.

    Args:
        environment: variables beside this process's.
    """
    with open(log, "a") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if piped else file,
            stderr=file,
            text=True,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[str], until: float) -> int | None:
    """Its exit status; None if it was not over at `until` (of `time.monotonic`), and is now."""
    try:
        return process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        stop(process)
        return None


def stop(process: subprocess.Popen[str]) -> None:
    """End it and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Lines:
    """The lines that a process writes, each waited for no longer than it may take."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def next(self, until: float) -> str | None:
        """The next line; None after the last one.

        Raises:
            TimeoutError: there was none at `until`.
        """
        try:
            return self._lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
