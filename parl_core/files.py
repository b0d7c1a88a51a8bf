"""Writing files so that nothing that was complete on disk is ever lost, to a kill or to another process."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from .errors import RunFolderError

_PIECE = 2**20


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


def sync(path: Path) -> None:
    """Wait until the disk has what was written to a file, or until a folder there names its files as it does now."""
    if path.is_dir() and os.name != "posix":
        return  # a folder cannot be opened
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal digits; the file is read piece by piece."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def lock_folder(path: Path, command: str) -> int:
    """Make the folder if need be, and keep other commands out of it until the descriptor that is returned is closed.

    The lock ends with its process, however that ends.

    Raises:
        RunFolderError: it cannot be made or locked, or another `command` is at work in it.
    """
    try:
        import fcntl
    except ImportError as error:
        raise RunFolderError(f"{command} needs a POSIX system: elsewhere it cannot lock its folder") from error
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise RunFolderError(f"Cannot make the folder {path}: {error.strerror or error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise RunFolderError(f"{path} is in use by another {command}") from error
        raise RunFolderError(
            f"{path} cannot be locked ({error.strerror or error}): choose an --output on another file system"
        ) from error
    return lock
