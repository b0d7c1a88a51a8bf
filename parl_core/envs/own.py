"""Environments that users bring: a function from a seed to an object with `reset` and `step`."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UnknownNameError, unknown_name
from .interface import Environment, Step

PATTERN = "<module>:<function>"

MakeEnvironment = Callable[[int], Any]
"""From a seed to an object with `reset` and `step`."""


class OwnEnvironment(Environment):
    """An object with `reset` and `step` behind the interface.

    `reset()` returns an observation, or a pair (observation, info) as gymnasium's do. `step(action)` returns
    (observation, reward, terminated, truncated) and, if it likes, a fifth: whether the task counts as solved, or a dict
    with that under "success". The fifth counts if the object's attribute `reports_success` is True.

    Sizes come from the attributes `obs_dim`, `act_dim` and `horizon`. Where they are missing, they come from gymnasium's
    `observation_space` and `action_space`, both of which must be `Box`, and from `spec.max_episode_steps`. Actions are
    then scaled from [−1, 1] to the space's bounds. Observations are flattened. An episode is truncated after `horizon`
    steps if it has not ended before.

    If the object has methods `state()` and `set_state(state)`, for nested dicts of NumPy arrays, numbers, strings and None,
    a resumed run continues its episodes; else it begins new ones, see `restores_state`.

    Args:
        name: as `make_env` takes it.
        function: makes the object from a seed. A `reset` that takes `seed=` or any keyword, as gymnasium's and its
            wrappers' do, is given the seed at the first reset only.
        seed: 0 ≤ seed < 2³².

    Raises:
        TypeError: the object lacks a method, or a size that nothing tells, or its spaces are no boxes.
        ValueError: a size below 1.
    """

    def __init__(self, name: str, function: MakeEnvironment, seed: int) -> None:
        self._environment = environment = function(seed)
        for method in ("reset", "step"):
            if not callable(getattr(environment, method, None)):
                raise TypeError(f"{name} must return an object with reset() and step(), got {_described(environment)}")
        self.restores_state = all(callable(getattr(environment, method, None)) for method in ("state", "set_state"))
        self._seed: int | None = seed if _takes_seed(environment.reset) else None
        self._space = None if hasattr(environment, "act_dim") else _box(name, environment, "action_space", "act_dim")
        if self._space is not None:
            low, high = np.asarray(self._space.low, np.float64), np.asarray(self._space.high, np.float64)
            bounded = np.isfinite(low) & np.isfinite(high)
            # Without both bounds there is no range to scale to: such actions stay as they are.
            self._center = np.where(bounded, low + (high - low) / 2, 0.0)
            self._half_range = np.where(bounded, (high - low) / 2, 1.0)
        super().__init__(
            name,
            obs_dim=_size(name, environment, "obs_dim", "observation_space"),
            act_dim=_size(name, environment, "act_dim", "action_space"),
            horizon=_horizon(name, environment),
            reports_success=bool(getattr(environment, "reports_success", False)),
        )

    def close(self) -> None:
        close = getattr(self._environment, "close", None)
        if callable(close):
            close()

    def _state(self) -> dict[str, Any]:
        # Copies, here and below: what the object goes on writing to must not change what was saved, nor the reverse.
        return {"own": copy.deepcopy(self._environment.state()), "seed": self._seed}

    def _set_state(self, state: Mapping[str, Any]) -> None:
        self._environment.set_state(copy.deepcopy(state["own"]))
        self._seed = state["seed"]

    def _reset(self) -> npt.NDArray[np.float32]:
        if self._seed is None:
            given = self._environment.reset()
        else:
            given, self._seed = self._environment.reset(seed=self._seed), None
        if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping):
            given = given[0]
        return _flat(given)

    def _step(self, action: npt.NDArray[np.float64]) -> Step:
        taken: npt.NDArray[Any] = action.copy()  # what it does with it is its own affair
        if self._space is not None:
            taken = self._center + self._half_range * action.reshape(self._center.shape)
            # Rounding may lead beyond the bounds, in the space's own type above all.
            taken = np.clip(taken.astype(self._space.dtype), self._space.low, self._space.high)
        given = self._environment.step(taken)
        if not isinstance(given, tuple) or len(given) not in (4, 5):
            raise TypeError(
                f"{self.name}: step must return (observation, reward, terminated, truncated) and, if it likes, success "
                f"or an info dict, got {_described(given)}"
            )
        observation, reward, terminated, truncated = given[:4]
        return Step(
            observation=_flat(observation),
            reward=float(reward),
            terminated=bool(terminated),
            truncated=not terminated and (bool(truncated) or self._num_steps >= self.horizon),
            success=self._success(given[4] if len(given) == 5 else None),
        )

    def _success(self, given: Any) -> bool:
        if isinstance(given, Mapping):
            given = given.get("success")
            if not self.reports_success:
                return False
        if self.reports_success and given is None:
            raise TypeError(
                f"{self.name} has reports_success, so step must return success as a fifth or in its info dict"
            )
        if not self.reports_success and given is not None:
            raise TypeError(
                f"{self.name}: step returned success as a fifth, so the object needs reports_success = True"
            )
        return bool(given)


def load_function(name: str, kind: str = "environment") -> Callable[..., Any]:
    """The function that `<module>:<function>` names; modules are looked for in the working folder too.

    Args:
        name: of the function.
        kind: what it makes, for the message.

    Raises:
        UnknownNameError: there is no such module, or no such function in it.
    """
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:  # a console script starts with its own folder instead
        sys.path.append(os.getcwd())
    try:
        if not all(part.isidentifier() for part in module_name.split(".")):
            raise ModuleNotFoundError(name=module_name)
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there and needs one that is not
        raise UnknownNameError(
            f"Unknown {kind} '{name}': expected {PATTERN}, and there is no module '{module_name}' in {os.getcwd()} or "
            "on Python's path"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise unknown_name(kind, name, [f"{module_name}:{known}" for known in _functions(module)] or [PATTERN])
    loaded: Callable[..., Any] = function
    return loaded


def name_of(function: MakeEnvironment) -> str:
    """What an environment made by the function is called."""
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}:{kind.__qualname__}"


def _functions(module: Any) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def _takes_seed(reset: Callable[..., Any]) -> bool:
    parameters = inspect.signature(reset).parameters
    # A wrapper's reset(**kwargs) hands on whatever it is given.
    return "seed" in parameters or any(taken.kind is inspect.Parameter.VAR_KEYWORD for taken in parameters.values())


def _box(name: str, environment: Any, attribute: str, instead_of: str) -> Any:
    space = getattr(environment, attribute, None)
    if space is None:
        raise TypeError(f"{name}: the environment must have {instead_of}, or gymnasium's {attribute}, and has neither")
    if not all(hasattr(space, part) for part in ("low", "high", "shape")):
        raise TypeError(f"{name}: {attribute} must be a gymnasium.spaces.Box, got {space}")
    return space


def _size(name: str, environment: Any, attribute: str, space: str) -> int:
    if hasattr(environment, attribute):
        return _positive(name, attribute, getattr(environment, attribute))
    return _positive(name, f"the size of {space}", math.prod(_box(name, environment, space, attribute).shape))


def _horizon(name: str, environment: Any) -> int:
    horizon = getattr(environment, "horizon", None)
    if horizon is None:
        horizon = getattr(getattr(environment, "spec", None), "max_episode_steps", None)
    if horizon is None:
        raise TypeError(
            f"{name}: the environment must have horizon, or gymnasium's spec.max_episode_steps, and has neither"
        )
    return _positive(name, "horizon", horizon)


def _positive(name: str, what: str, value: Any) -> int:
    if int(value) != value or value < 1:
        raise ValueError(f"{name}: {what} must be a whole number of at least 1, got {value}")
    return int(value)


def _flat(observation: npt.ArrayLike) -> npt.NDArray[np.float32]:
    return np.array(observation, dtype=np.float32).reshape(-1)  # a copy: the object may go on writing to its own


def _described(value: object) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"a {type(value).__name__}"
