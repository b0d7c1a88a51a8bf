"""Writing files so that nothing that was complete on disk is ever lost, to a kill or to another process."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import RunFolderError

_PIECE = 2**20


class NoLockError(RunFolderError):
    """A system or a file system that cannot lock a folder."""


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
        RunFolderError: it cannot be made, or another `command` is at work in it.
        NoLockError: it cannot be locked here.
    """
    try:
        import fcntl
    except ImportError as error:
        raise NoLockError(f"{command} needs a POSIX system: elsewhere it cannot lock its folder") from error
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
        raise NoLockError(
            f"{path} cannot be locked ({error.strerror or error}): choose an --output on another file system"
        ) from error
    return lock


@contextlib.contextmanager
def locked_if_possible(path: Path, command: str) -> Iterator[None]:
    """`lock_folder` for as long as the context lasts; where there are no locks, as on some network disks, nothing.

    Raises:
        RunFolderError: the folder cannot be made, or another `command` is at work in it.
    """
    try:
        lock = lock_folder(path, command)
    except NoLockError:
        yield
        return
    try:
        yield
    finally:
        os.close(lock)
