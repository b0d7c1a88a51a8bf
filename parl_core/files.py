"""Writing files so that nothing that was complete on disk is ever lost."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .errors import RunFolderError


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step, so that neither a kill nor a full disk leaves half a file.

    Raises:
        RunFolderError: it could not be written; what was there before still is.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a read-only folder; the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise RunFolderError(f"Cannot write {path}: {error.strerror or error}") from error
