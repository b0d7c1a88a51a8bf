"""From a name such as `dm_control/walker-walk` to an environment."""

from __future__ import annotations

import difflib
import importlib
import operator
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from ..errors import MissingExtraError, unknown_name
from .interface import Environment
from .own import PATTERN, MakeEnvironment, OwnEnvironment, load_function, name_of


class _Family(NamedTuple):
    module: str
    """Module of this package with `task_names()` and `make(task, seed)`, which import its simulator if it has one."""
    pattern: str


_FAMILIES = {
    "dm_control": _Family("dm_control", "dm_control/<domain>-<task>"),
    "metaworld": _Family("metaworld", "metaworld/<task>"),
    "tabular": _Family("tabular.tasks", "tabular/<task>"),
}


def make_env(name: str | MakeEnvironment, seed: int) -> Environment:
    """Make a task.

    Args:
        name: `dm_control/<domain>-<task>` for any task of the DM Control suite (`dm_control/walker-walk`,
            `dm_control/ball_in_cup-catch`), `metaworld/<task>` for any MetaWorld v3 task
            (`metaworld/door-open`), or `tabular/four-rooms`, `tabular/rand-mdp`, which need no simulator.
            `<module>:<function>`, or the function itself, for an environment of your own: see `OwnEnvironment`.
        seed: of the environment's own random numbers, 0 ≤ seed < 2³². The same seed gives the same episodes.

    Raises:
        UnknownNameError: no such environment; the message offers near misses.
        MissingExtraError: the task's simulator is not installed.
        ValueError, TypeError: the seed is out of range or no integer.
    """
    seed = operator.index(seed)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must satisfy 0 <= seed < 2**32, got {seed}")
    if not isinstance(name, str):
        return OwnEnvironment(name_of(name), name, seed)
    if ":" in name:
        return OwnEnvironment(name, load_function(name), seed)
    family, _, task = name.partition("/")
    if family not in _FAMILIES:
        # A hundred names help nobody, so without a near miss the message shows how names are made.
        near = difflib.get_close_matches(name, environment_names(), cutoff=0.5)
        raise unknown_name("environment", name, near or [*(known.pattern for known in _FAMILIES.values()), PATTERN])
    names = _task_names(family)
    if task not in names:
        raise unknown_name("environment", name, [f"{family}/{known}" for known in names])
    make: Callable[[str, int], Environment] = _module(family).make
    return make(task, seed)


def environment_names() -> tuple[str, ...]:
    """Names of the tabular tasks and of those of the simulators installed here, sorted. Imports them: a second or two."""
    names: list[str] = []
    for family in _FAMILIES:
        try:
            names += [f"{family}/{task}" for task in _task_names(family)]
        except MissingExtraError:
            continue
    return tuple(sorted(names))


def _task_names(family: str) -> tuple[str, ...]:
    names: tuple[str, ...] = _module(family).task_names()
    return names


def _module(family: str) -> ModuleType:
    return importlib.import_module(f".{_FAMILIES[family].module}", __package__)
