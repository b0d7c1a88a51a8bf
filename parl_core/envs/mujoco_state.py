"""What a MuJoCo task's following steps depend on: the simulation's state, the model as the task has changed it, and the
attributes of the task's own object."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ParlError

# The parts of a model that make it large. They are its fixed shapes and pictures; no task changes them.
_FIXED = ("bvh_", "flex", "mesh_", "names", "oct_", "paths", "skin_", "tex_data", "text_", "_sizes")


class ModelChanges:
    """The arrays of a model that a task has changed since it was loaded, such as a target's position.

    Args:
        model: an `mjModel` just loaded.
        drawn: arrays that differ from one instance of the task to the next: they count as changed.
    """

    def __init__(self, model: Any, *, drawn: Collection[str] = ()) -> None:
        self._model = model
        self._loaded = {
            name: array.copy()
            for name in dir(model)
            if not name.startswith(("__", *_FIXED)) and isinstance(array := getattr(model, name), np.ndarray)
        }
        self._loaded_bytes = {name: b"" if name in drawn else array.tobytes() for name, array in self._loaded.items()}

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Copies of the changed arrays by name."""
        return {
            name: getattr(self._model, name).copy()
            for name, loaded in self._loaded_bytes.items()
            if getattr(self._model, name).tobytes() != loaded
        }

    def set_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Make the model the one that `state` was taken of."""
        for name, array in state.items():
            if name not in self._loaded or array.shape != self._loaded[name].shape:
                raise ValueError(f"the model has no {name} of shape {array.shape}")
        for name, loaded in self._loaded.items():
            # Numbers that MuJoCo reads at every step: left alone where they are the same.
            target, wanted = getattr(self._model, name), state.get(name, loaded)
            if target.tobytes() != wanted.tobytes():
                target[...] = wanted


def integration_state(model: Any, data: Any) -> npt.NDArray[np.float64]:
    """All that MuJoCo integrates from (positions, velocities, activations, controls, mocap bodies, warm start, time), as
    one vector."""
    import mujoco

    what = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(model, what))
    mujoco.mj_getState(model, data, state, what)
    return state


def set_integration_state(model: Any, data: Any, state: npt.NDArray[np.float64]) -> None:
    """Set what `integration_state` returned. Nothing is computed from it yet.

    Raises:
        ValueError: a state of another model.
    """
    import mujoco

    what = mujoco.mjtState.mjSTATE_INTEGRATION
    size = mujoco.mj_stateSize(model, what)
    if state.shape != (size,):
        raise ValueError(f"the simulation's state must have shape ({size},), got {state.shape}")
    mujoco.mj_setState(model, data, np.asarray(state, dtype=np.float64), what)


class Attributes:
    """The attributes of a task's object that are numbers, strings, arrays, lists of numbers or strings, or None.

    Arrays that are views of the simulation's data, such as a body's position, are saved as what they are a view of.
    Attributes of other types must stay the ones that they were when the object was made; else `state` raises.

    Args:
        owner: the object.
        data: the `mjData` that its arrays may be views of.
        skip: names of attributes that are saved otherwise, or that no step depends on.
    """

    def __init__(self, owner: object, data: Any, skip: Collection[str]) -> None:
        self._owner = owner
        self._data = data
        self._skip = frozenset(skip)
        self._made_with = {name: _mark(value) for name, value in self._own() if not _is_plain(value)}

    def state(self) -> dict[str, Any]:
        """The attributes by name.

        Raises:
            ParlError: one of another type than can be saved has appeared or changed.
        """
        state: dict[str, Any] = {}
        for name, value in self._own():
            if isinstance(value, np.ndarray):
                state[name] = self._view(name, value) or value.copy()
            elif isinstance(value, np.generic):
                state[name] = np.asarray(value)  # keeps the type, on which the arithmetic depends
            elif _is_plain(value):
                state[name] = list(value) if isinstance(value, list) else value
            elif self._made_with.get(name) != _mark(value):
                raise ParlError(
                    f"{type(self._owner).__name__}.{name} has changed and is a {type(value).__name__}, which cannot be "
                    "saved: expected a number, a string, an array, a list of numbers or strings, or None"
                )
        return state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Set them, and delete those that `state` does not have."""
        attributes = vars(self._owner)
        for name in [name for name, value in self._own() if _is_plain(value) and name not in state]:
            del attributes[name]
        for name, value in state.items():
            if isinstance(value, Mapping):
                source = getattr(self._data, value["view_of"]).reshape(-1)
                shape = tuple(value["shape"].tolist())
                attributes[name] = source[value["start"] :][: int(np.prod(shape))].reshape(shape)
            elif isinstance(value, np.ndarray):
                attributes[name] = value.copy() if value.ndim else value[()]
            else:
                attributes[name] = list(value) if isinstance(value, list) else value

    def _own(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in vars(self._owner).items() if name not in self._skip]

    def _view(self, name: str, array: npt.NDArray[Any]) -> dict[str, Any] | None:
        """Where in the simulation's data the array lies, if it does."""
        if array.flags.owndata:
            return None
        address = _address(array)
        for source_name in dir(self._data):
            source = getattr(self._data, source_name) if not source_name.startswith("_") else None
            if not isinstance(source, np.ndarray):
                continue
            if not (array.nbytes and 0 <= address - _address(source) < source.nbytes):
                continue
            if array.dtype != source.dtype or not array.flags.c_contiguous:
                raise ParlError(f"{type(self._owner).__name__}.{name} is a view of {source_name} that cannot be saved")
            start = (address - _address(source)) // source.itemsize
            return {"view_of": source_name, "start": start, "shape": np.array(array.shape, dtype=np.int64)}
        return None


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _is_plain(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype != object
    if isinstance(value, list):
        return all(isinstance(element, _NUMBER_OR_STRING) for element in value)
    return value is None or isinstance(value, (*_NUMBER_OR_STRING, np.generic))


def _mark(value: object) -> object:
    """What tells that a value has changed: a container's contents, another object's identity."""
    return repr(value) if isinstance(value, list | tuple | dict) else id(value)


_NUMBER_OR_STRING = (bool, int, float, str)
