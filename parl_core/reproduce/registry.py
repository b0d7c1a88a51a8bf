"""The studies by name. Their modules are imported when one is asked for, not before."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from ..errors import unknown_name
from .study import Study


class _Entry(NamedTuple):
    module: str
    study: str
    summary: str


_STUDIES = {
    "four-rooms": _Entry("four_rooms", "FourRoomsStudy", "the published table of Four-Rooms, by many estimators"),
    "samples": _Entry("samples", "SamplesStudy", "environment steps for a good hypergradient of Four-Rooms"),
    "rand-mdp": _Entry("rand_mdp", "RandMDPStudy", "SoBiRL's random MDP: objective and ‖gradient‖ by step"),
    "convergence": _Entry("convergence", "ConvergenceStudy", "Theorem 1: T·mean‖∇L‖² by T, bias by lower steps"),
    "lemma1": _Entry("lemma1", "Lemma1Study", "Lemma 1: eight f-divergences against the policy's distance"),
    "leaders": _Entry("leaders", "LeadersStudy", "commitment games and taxes: ascent against search"),
}


def study_names() -> tuple[str, ...]:
    """All studies, in the order of the results page."""
    return tuple(_STUDIES)


def study_class(name: str) -> type[Study]:
    """The study of this name.

    Raises:
        UnknownNameError: there is none; the message offers near misses.
    """
    if name not in _STUDIES:
        raise unknown_name("study", name, _STUDIES)
    entry = _STUDIES[name]
    study: type[Study] = getattr(importlib.import_module(f".studies.{entry.module}", __package__), entry.study)
    return study


def study_from_settings(name: str, settings: dict[str, Any]) -> Study:
    """A study with the settings that its folder holds; JSON's lists are tuples again.

    Raises:
        UnknownNameError: there is no such study.
        TypeError: settings that the study does not have.
    """
    return study_class(name)(**{key: _tupled(value) for key, value in settings.items()})


def summaries() -> str:
    """A line for every study."""
    width = max(map(len, _STUDIES))
    return "\n".join(f"  {name:<{width}}  {entry.summary}" for name, entry in _STUDIES.items())


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value
