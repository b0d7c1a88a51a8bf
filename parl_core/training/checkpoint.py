"""Checkpoints: a nested state as one file, tensors in safetensors form and the rest as JSON in its header. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import RunFolderError, import_extra
from ..files import write_atomically

FORMAT = "parl-core checkpoint 1"


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` (nested dicts, lists and tuples of tensors, arrays, numbers, strings, None) to `path`, atomically.

    The file is complete under its name or the previous one is still there.

    Raises:
        RunFolderError: it could not be written (disk full, read-only folder, …).
        TypeError: a value of a kind that cannot be stored.
    """
    safetensors = import_extra("safetensors.torch", "train", needed_for="a checkpoint")
    tensors: dict[str, torch.Tensor] = {}
    tree = _pack(state, "state", tensors)
    blob = safetensors.save(tensors, metadata={"format": FORMAT, "tree": json.dumps(tree)})
    write_atomically(path, blob)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote.

    Raises:
        RunFolderError: there is no such file, or it is not a checkpoint of this format, or it is damaged.
    """
    safetensors = import_extra("safetensors", "train", needed_for="a checkpoint")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise RunFolderError(
                    f"{path} is not a checkpoint of this version: its format is {metadata.get('format')!r}, expected "
                    f"{FORMAT!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise RunFolderError(f"There is no checkpoint at {path}") from error
    except (OSError, safetensors.SafetensorError) as error:
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(f"The checkpoint {path} cannot be read: {error}") from error
    return _unpack(json.loads(metadata["tree"]), tensors)


def _pack(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[place] = value.detach().cpu().contiguous().clone()
        return {"kind": "tensor", "name": place}
    if isinstance(value, np.ndarray):
        tensors[place] = torch.from_numpy(np.ascontiguousarray(value).copy())
        return {"kind": "array", "name": place, "dtype": str(value.dtype)}
    if isinstance(value, Mapping):
        items = [[key, _pack(item, f"{place}/{key}", tensors)] for key, item in value.items()]
        return {"kind": "dict", "items": items}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{place}/{i}", tensors) for i, item in enumerate(value)]
        return {"kind": "tuple" if isinstance(value, tuple) else "list", "items": items}
    if value is None or isinstance(value, bool | int | float | str):
        return {"kind": "plain", "value": value}
    raise TypeError(f"{place} must be a tensor, array, number, string, dict or list, got {type(value).__name__}")


def _unpack(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    kind = tree["kind"]
    if kind == "tensor":
        return tensors[tree["name"]]
    if kind == "array":
        return tensors[tree["name"]].numpy().astype(tree["dtype"], copy=False)
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in tree["items"]}
    if kind == "plain":
        return tree["value"]
    items = [_unpack(item, tensors) for item in tree["items"]]
    return tuple(items) if kind == "tuple" else items
