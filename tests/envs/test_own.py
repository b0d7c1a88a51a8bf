"""Environments of users behind the interface."""

import re
import sys

import numpy as np
import pytest

from parl_core.envs import make_env
from parl_core.envs.own import load_function
from parl_core.errors import NonFiniteError, UnknownNameError
from tests.envs.own_tasks import Box, Drift, Gym, SavedDrift, SharedDrift


def test_the_bare_form():
    env, peer = make_env("tests.envs.own_tasks:Drift", 3), Drift(3)
    assert (env.name, env.obs_dim, env.act_dim, env.horizon) == ("tests.envs.own_tasks:Drift", 2, 1, 4)
    assert not env.reports_success and not env.restores_state
    for _ in range(2):
        first = env.reset()
        given = [first.copy()]
        np.testing.assert_array_equal(first, peer.reset().astype(np.float32))
        for time in range(4):
            step, expected = env.step([0.5]), peer.step(np.array([0.5]))
            np.testing.assert_array_equal(step.observation, expected[0].astype(np.float32))
            assert step.reward == expected[1] and type(step.reward) is float
            assert (step.terminated, step.truncated, step.success) == (False, time == 3, False)
        np.testing.assert_array_equal(first, given[0])  # although the object writes to its own array
        with pytest.raises(RuntimeError, match="ended after 4 steps"):
            env.step([0.5])


def test_a_callable_is_as_good_as_its_name():
    by_name, by_itself = make_env("tests.envs.own_tasks:Drift", 5), make_env(Drift, 5)
    assert by_itself.name == by_name.name
    np.testing.assert_array_equal(by_itself.reset(), by_name.reset())
    assert make_env(lambda seed: Drift(seed), 0).name.endswith("<lambda>")


def test_the_form_of_gymnasium():
    made = Gym()
    made.reports_success = True
    env = make_env(lambda seed: made, 11)
    assert (env.obs_dim, env.act_dim, env.horizon, env.reports_success) == (6, 2, 5, True)
    np.testing.assert_array_equal(env.reset(), np.arange(6, dtype=np.float32))
    env.reset()
    assert made.seeds == [11, None]  # the seed once, then the random numbers go on
    successes = [env.step(action).success for action in ([-1.0, 0.25], [1.0, -1.0], [0.0, 0.0])]
    assert successes == [False, True, False]
    # The first entry is scaled to [-2, 4]; the second has no upper bound and stays, but not below its lower one.
    np.testing.assert_array_equal(made.actions, [[[-2.0, 0.25]], [[4.0, 0.0]], [[1.0, 0.0]]])
    assert {action.dtype for action in made.actions} == {np.dtype(np.float32)}


def test_a_wrapper_that_hands_on_any_keyword_is_given_the_seed():
    made = Gym()
    inner = made.reset
    made.reset = lambda **kwargs: inner(**kwargs)
    env = make_env(lambda seed: made, 11)
    env.reset()
    env.reset()
    assert made.seeds == [11, None]


@pytest.mark.parametrize(("ends", "expected"), [((True, False), (True, False)), ((False, True), (False, True))])
def test_ends_are_told_apart_and_a_terminated_episode_is_not_truncated_too(ends, expected):
    made = Gym()
    made.ends = ends
    env = make_env(lambda seed: made, 0)
    env.reset()
    step = env.step([0.0, 0.0])
    assert (step.terminated, step.truncated) == expected
    made.ends = (False, False)
    env.reset()
    for _ in range(4):
        env.step([0.0, 0.0])
    made.ends = ends
    step = env.step([0.0, 0.0])  # at the horizon
    assert (step.terminated, step.truncated) == expected


def test_gymnasium_itself():
    gymnasium = pytest.importorskip("gymnasium")
    env = make_env(lambda seed: gymnasium.make("Pendulum-v1"), 4)
    peer = gymnasium.make("Pendulum-v1")
    assert (env.obs_dim, env.act_dim, env.horizon) == (3, 1, 200)
    np.testing.assert_array_equal(env.reset(), peer.reset(seed=4)[0])
    step, expected = env.step([0.5]), peer.step(np.array([1.0], np.float32))
    np.testing.assert_array_equal(step.observation, expected[0])
    assert step.reward == expected[1] and not env.restores_state


def test_state_with_and_without_the_methods_for_it():
    def go(env):
        return [env.step([0.1]).observation.tolist() for _ in range(2)], env.reset().tolist()

    env = make_env(SavedDrift, 1)
    env.reset()
    env.step([0.0])
    state = env.state()
    expected = go(env)
    other = make_env(SavedDrift, 2)
    other.set_state(state)
    assert go(other) == expected

    bare = make_env("tests.envs.own_tasks:Drift", 1)
    bare.reset()
    assert bare.state() == {"restores_state": False}
    bare.set_state(bare.state())
    with pytest.raises(RuntimeError, match="call reset first"):
        bare.step([0.0])
    with pytest.raises(ValueError, match=r"it holds an episode, but the environment has no state\(\)"):
        bare.set_state(state)


def test_a_state_is_the_environments_no_longer():
    env = make_env(SharedDrift, 1)
    env.reset()
    state = env.state()
    saved = state["simulator"]["own"]["point"].tolist()
    env.step([1.0])
    env.set_state(state)
    env.step([1.0])
    assert state["simulator"]["own"]["point"].tolist() == saved


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_tusks:Drift", "expected <module>:<function>, and there is no module 'own_tusks'"),
        (":Drift", "expected <module>:<function>, and there is no module ''"),
        ("tests.envs.own_tasks:Drfit", "did you mean tests.envs.own_tasks:Drift"),
        ("tests.envs.own_tasks:not_a_function", "Unknown environment 'tests.envs.own_tasks:not_a_function'"),
        ("tests.envs.own_tasks:", "Unknown environment 'tests.envs.own_tasks:'"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UnknownNameError, match=re.escape(message)):
        make_env(name, 0)


def test_functions_for_something_else_are_called_what_they_are():
    assert load_function("tests.envs.own_tasks:fails_to_start").__name__ == "fails_to_start"
    with pytest.raises(UnknownNameError, match="Unknown label source 'own_tusks:Drift'"):
        load_function("own_tusks:Drift", "label source")


def test_modules_of_the_working_folder_and_what_they_lack(tmp_path, monkeypatch):
    (tmp_path / "lies_here.py").write_text("from tests.envs.own_tasks import Drift as make\n")
    (tmp_path / "lacks.py").write_text("import no_such_module_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert make_env("lies_here:make", 0).name == "lies_here:make"
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        make_env("lacks:make", 0)


class _Broken(Drift):
    def __init__(self, **changes):
        super().__init__(0)
        vars(self).update(changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"reset": None}, TypeError, "must return an object with reset() and step(), got a _Broken"),
        ({"horizon": 0}, ValueError, "horizon must be a whole number of at least 1, got 0"),
        ({"horizon": None}, TypeError, "must have horizon, or gymnasium's spec.max_episode_steps"),
        ({"obs_dim": 2.5}, ValueError, "obs_dim must be a whole number of at least 1, got 2.5"),
    ],
)
def test_objects_that_do_not_fit(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make_env(lambda seed: _Broken(**changes), 0)


def test_spaces_that_are_no_boxes():
    made = Gym()
    made.action_space = object()
    with pytest.raises(TypeError, match=r"action_space must be a gymnasium.spaces.Box, got <object"):
        make_env(lambda seed: made, 0)
    del made.action_space
    with pytest.raises(TypeError, match="must have act_dim, or gymnasium's action_space, and has neither"):
        make_env(lambda seed: made, 0)
    made.action_space = Box([-1.0], [1.0])
    del made.observation_space
    with pytest.raises(TypeError, match="must have obs_dim, or gymnasium's observation_space, and has neither"):
        make_env(lambda seed: made, 0)


@pytest.mark.parametrize(
    ("changes", "given", "error", "message"),
    [
        ({}, (np.zeros(2), 0.0, False), TypeError, "step must return (observation, reward, terminated, truncated)"),
        ({}, (np.zeros(2), 0.0, False, False, True), TypeError, "needs reports_success = True"),
        ({"reports_success": True}, (np.zeros(2), 0.0, False, False), TypeError, "must return success as a fifth"),
        ({"reports_success": True}, (np.zeros(2), 0.0, False, False, {}), TypeError, "must return success as a fifth"),
        ({}, (np.zeros(3), 0.0, False, False), ValueError, "must have shape (2,), got (3,)"),
        ({}, (np.zeros(2), np.nan, False, False), NonFiniteError, "the reward of step 1 of the episode must be finite"),
    ],
)
def test_steps_that_do_not_fit(changes, given, error, message):
    env = make_env(lambda seed: _Broken(step=lambda action: given, **changes), 0)
    env.reset()
    with pytest.raises(error, match=re.escape(message)):
        env.step([0.0])
