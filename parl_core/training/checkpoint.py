"""Checkpoints: a nested state as a folder of tensors in safetensors form, the rest in JSON, and a manifest of both.

    tensors-7.safetensors   every tensor and array
    tree-7.json             how they, numbers and strings are nested
    manifest.json           names, sizes and SHA-256 of those two; versions; the SHA-256 of the manifest itself

The folder holds the checkpoint that its manifest names. A new one is written beside it under the next number, brought to
the disk, and takes its place by the one rename that replaces the manifest; only then is the old one removed. So a kill,
a full disk or a power failure at any moment leaves the one or the other. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..errors import RunFolderError, import_extra
from ..files import sha256, sync, write_atomically

FORMAT = "parl-core checkpoint"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_DATA_FILE = re.compile(r"(?:tensors|tree)-(\d+)\.(?:safetensors|json)|\.tmp.*")
"""And what safetensors leaves of a file if it is killed while it writes one."""

_Files = dict[str, dict[str, Any]]
"""Name of a data file -> its `bytes` and `sha256`."""


def save_checkpoint(folder: Path, state: Mapping[str, Any], *, step: int | None = None) -> None:
    """Replace the checkpoint in `folder`, which is made if need be, by `state`.

    Tensors are written from where they lie: only those that are strided, shared or on an accelerator are copied first.

    Args:
        folder: of this checkpoint alone.
        state: nested dicts (keys: strings, numbers), lists and tuples of tensors, arrays, numbers, strings and None.
        step: the environment step it was taken at, for whoever reads the manifest.

    Raises:
        RunFolderError: it could not be written (disk full, read-only folder, …); the previous one is still there.
        TypeError: a value of a kind that cannot be stored.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = json.dumps(_pack(state, "state", tensors)).encode()
    files = _write_data(folder, tensors, tree)
    try:
        _write_manifest(folder, step, files)
    except RunFolderError:
        _remove_if_possible(folder / name for name in files)
        raise
    try:
        sync(folder)  # before the files that the manifest named until now are gone
        for file, _ in _data_files(folder):
            if file.name not in files:
                file.unlink()
    except OSError as error:
        raise RunFolderError(f"Cannot tidy up the checkpoint {folder}: {_reason(error)}") from error


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, after comparing every file with its SHA-256.

    The tensors are mapped from the file, privately: memory is taken only where they are written to. Another process may
    replace the checkpoint meanwhile: then the new one is read.

    Raises:
        RunFolderError: there is no checkpoint; it is of another format or version; a file of it is missing or damaged.
    """
    while True:
        manifest = _read_manifest(folder)
        try:
            return _read_data(folder, manifest["files"])
        except RunFolderError:
            if _read_manifest(folder) == manifest:  # the files were not removed for a newer checkpoint's sake
                raise


def _read_data(folder: Path, files: _Files) -> dict[str, Any]:
    safetensors = import_extra("safetensors", "train", needed_for="a checkpoint")
    try:
        for name, expected in files.items():
            _check_file(folder / name, expected)
        named = {Path(name).suffix: folder / name for name in files}
        tree = json.loads(named[".json"].read_bytes())
        with safetensors.safe_open(named[".safetensors"], framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, safetensors.SafetensorError) as error:
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(f"The checkpoint {folder} cannot be read: {_reason(error)}") from error
    state: dict[str, Any] = _unpack(tree, tensors)
    return state


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that this version can read.

    Raises:
        RunFolderError: why it cannot.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunFolderError(f"There is no checkpoint in {folder}: it has no {MANIFEST}") from error
    except OSError as error:
        raise RunFolderError(f"The checkpoint {folder} cannot be read: {_reason(error)}") from error
    except ValueError as error:
        raise RunFolderError(f"The checkpoint {folder} is damaged: {MANIFEST} is not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        given = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise RunFolderError(f"{path} is not of a checkpoint: its format must be {FORMAT!r}, got {given!r}")
    if manifest.get("sha256") != _digest(manifest):
        raise RunFolderError(f"The checkpoint {folder} is damaged: {MANIFEST} does not match its own SHA-256")
    if manifest["format_version"] != FORMAT_VERSION:
        raise RunFolderError(
            f"The checkpoint {folder} has version {manifest['format_version']} of the format, expected {FORMAT_VERSION}: "
            f"go on with parl-core {manifest['parl_core']}, which wrote it"
        )
    if manifest["parl_core"] != __version__:  # what is in a state may change with any version
        raise RunFolderError(
            f"The checkpoint {folder} was written by parl-core {manifest['parl_core']}, and this is {__version__}: "
            "go on with the version it was begun with"
        )
    return manifest


def _write_data(folder: Path, tensors: Mapping[str, torch.Tensor], tree: bytes) -> _Files:
    """Bring a state to the disk under names that no manifest holds.

    Raises:
        RunFolderError: it could not be written; nothing of it is left, if that was possible.
    """
    safetensors = import_extra("safetensors", "train", needed_for="a checkpoint")
    save_file = import_extra("safetensors.torch", "train", needed_for="a checkpoint").save_file
    files: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)
        number = 1 + max((int(match[1] or 0) for _, match in _data_files(folder)), default=0)
        files = [folder / f"tree-{number}.json", folder / f"tensors-{number}.safetensors"]
        files[0].write_bytes(tree)
        save_file(_without_shared_memory(tensors), files[1])
        shutil.copymode(*files)  # safetensors keeps its files from all other users
        for path in (*files, folder):
            sync(path)
        return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}
    except (OSError, safetensors.SafetensorError) as error:
        _remove_if_possible(files)
        raise RunFolderError(f"Cannot write the checkpoint {folder}: {_reason(error)}") from error


def _write_manifest(folder: Path, step: int | None, files: _Files) -> None:
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "parl_core": __version__,
        "torch": torch.__version__,
        "step": step,
        "files": files,
    }
    text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=2)
    write_atomically(folder / MANIFEST, text.encode())


def _digest(manifest: Mapping[str, Any]) -> str:
    """Of everything in a manifest but the digest itself."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise RunFolderError(f"The checkpoint {path.parent} is not complete: {path.name} is missing") from error
    if size != expected["bytes"]:
        raise RunFolderError(
            f"The checkpoint {path.parent} is damaged: {path.name} has {size} bytes, expected {expected['bytes']}"
        )
    if sha256(path) != expected["sha256"]:
        raise RunFolderError(
            f"The checkpoint {path.parent} is damaged: the contents of {path.name} do not match their SHA-256"
        )


def _data_files(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    """The files that some manifest names or named, or would have named; others are not ours to touch."""
    return [(file, match) for file in folder.iterdir() if (match := _DATA_FILE.fullmatch(file.name))]


def _remove_if_possible(files: Iterable[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            file.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    return str((error.strerror if isinstance(error, OSError) else None) or error)


def _without_shared_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, no two of which share memory, as safetensors asks."""
    seen: set[int] = set()
    alone = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        alone[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return alone


def _pack(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The JSON tree of `value`; its tensors go into `tensors`, numbered, since keys may hold any character."""
    if isinstance(value, torch.Tensor):
        name = f"{len(tensors)} {place}"
        tensors[name] = value.detach().cpu().contiguous()
        return {"kind": "tensor", "name": name}
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc":
            raise TypeError(f"{place} must be an array of numbers, got one of {value.dtype}")
        name = f"{len(tensors)} {place}"
        tensors[name] = torch.from_numpy(np.require(value, requirements=("C", "W")))
        return {"kind": "array", "name": name}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str | int | float | bool):
                raise TypeError(f"{place} must have strings or numbers as keys, got {key!r}")
        items = [[key, _pack(item, f"{place}/{key}", tensors)] for key, item in value.items()]
        return {"kind": "dict", "items": items}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{place}/{i}", tensors) for i, item in enumerate(value)]
        return {"kind": "tuple" if isinstance(value, tuple) else "list", "items": items}
    if isinstance(value, np.integer | np.floating | np.bool_):
        return {"kind": "scalar", "dtype": str(value.dtype), "value": value.item()}
    if value is None or isinstance(value, bool | int | float | str):
        return {"kind": "plain", "value": value}
    raise TypeError(f"{place} must be a tensor, array, number, string, dict or list, got {type(value).__name__}")


def _unpack(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    kind = tree["kind"]
    if kind == "tensor":
        return tensors[tree["name"]]
    if kind == "array":
        return tensors[tree["name"]].numpy()
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in tree["items"]}
    if kind == "plain":
        return tree["value"]
    if kind == "scalar":
        return np.dtype(tree["dtype"]).type(tree["value"])
    items = [_unpack(item, tensors) for item in tree["items"]]
    return tuple(items) if kind == "tuple" else items
