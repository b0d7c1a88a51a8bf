"""Names, near misses, missing simulators, and imports that wait until they are needed."""

import os
import subprocess
import sys

import pytest

from parl_core.envs import environment_names, make_env
from parl_core.errors import MissingExtraError, UnknownNameError

TABULAR = ("tabular/four-rooms", "tabular/rand-mdp")


def test_names_hold_every_task_of_both_simulators_and_the_tabular_ones():
    names = environment_names()
    assert {"dm_control/walker-walk", "dm_control/ball_in_cup-catch", "metaworld/door-open", *TABULAR} <= set(names)
    assert len(names) == len(set(names)) and list(names) == sorted(names)
    assert sum(name.startswith("metaworld/") for name in names) == 50


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("dm_control/walker-wlak", "did you mean dm_control/walker-walk"),
        ("dm_control/walker", "did you mean dm_control/walker-"),
        ("dm_contol/walker-walk", "did you mean dm_control/walker-walk"),
        ("walker-walk", "did you mean dm_control/walker-walk"),
        ("metaworld/door", "metaworld/door-open"),
        ("metaworld/door-open-v3", "did you mean metaworld/door-open"),
        ("tabular/four_rooms", "did you mean tabular/four-rooms"),
        ("four-rooms", "did you mean tabular/four-rooms"),
        ("tabluar/rand-mdp", "did you mean tabular/rand-mdp"),
        ("atari/pong", "known: <module>:<function>, dm_control/<domain>-<task>, metaworld/<task>, tabular/<task>"),
    ],
)
def test_unknown_names_offer_near_misses(name, offered):
    with pytest.raises(UnknownNameError, match=f"Unknown environment '{name}'.*{offered}"):
        make_env(name, 0)


@pytest.mark.parametrize("name", ["dm_control/walker-walk", "tabular/four-rooms"])
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range_are_refused(name, seed):
    with pytest.raises(ValueError, match=r"seed must satisfy 0 <= seed < 2\*\*32"):
        make_env(name, seed)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("dm_control/walker-walk", "dm_control.suite", "dm-control"),
        ("dm_control/walker-walk", "mujoco", "dm-control"),
        ("metaworld/door-open", "metaworld", "metaworld"),
    ],
)
def test_a_missing_simulator_names_its_extra(monkeypatch, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"parl-core\[{extra}\]"):
        make_env(name, 0)


def test_unknown_names_are_answered_without_any_simulator(monkeypatch):
    for module in ("mujoco", "metaworld"):
        monkeypatch.setitem(sys.modules, module, None)
    assert environment_names() == TABULAR
    with pytest.raises(UnknownNameError, match="dm_control/<domain>-<task>"):
        make_env("atari/pong", 0)


def test_simulators_are_imported_late_quietly_and_without_touching_opengl():
    """In a fresh process without MUJOCO_GL or a screen: no import before make_env, no word, no OpenGL."""
    script = """
import os, sys
import parl_core.envs
assert not {"mujoco", "dm_control", "metaworld", "gymnasium", "numba"} & set(sys.modules)
for name in ("dm_control/walker-walk", "metaworld/door-open"):
    env = parl_core.envs.make_env(name, 0)
    env.reset()
    env.close()
assert "MUJOCO_GL" not in os.environ and "PYOPENGL_PLATFORM" not in os.environ
assert not any(name.partition(".")[0] == "OpenGL" for name in sys.modules)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
