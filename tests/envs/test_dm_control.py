"""DM Control through the interface, against the suite itself."""

import json

import numpy as np
import pytest

from parl_core.envs import make_env
from parl_core.envs.dm_control import DMControlEnvironment
from parl_core.errors import NonFiniteError, ParlError


def _make(task: str, seed: int) -> DMControlEnvironment:
    env = make_env(f"dm_control/{task}", seed)
    assert isinstance(env, DMControlEnvironment)
    return env


def _actions(env, count, seed=0):
    return np.random.default_rng(seed).uniform(-1.0, 1.0, size=(count, env.act_dim))


def _episode(env, count):
    first = env.reset()
    steps = [env.step(action) for action in _actions(env, count)]
    return first, np.array([step.observation for step in steps]), [step.reward for step in steps]


def test_walker_is_the_suite_itself():
    env = _make("walker-walk", 3)
    assert (env.name, env.obs_dim, env.act_dim, env.horizon) == ("dm_control/walker-walk", 24, 6, 1000)
    assert not env.reports_success
    from dm_control import suite

    peer = suite.load("walker", "walk", task_kwargs={"random": 3})

    def flat(observation):  # in the documented order
        parts = [observation["orientations"], [observation["height"]], observation["velocity"]]
        return np.concatenate(parts).astype(np.float32)

    for _ in range(2):  # the second episode too: the random numbers go on in step
        observation = env.reset()
        assert observation.dtype == np.float32
        np.testing.assert_array_equal(observation, flat(peer.reset().observation))
        for action in _actions(env, 20):
            step, expected = env.step(action), peer.step(action)
            np.testing.assert_array_equal(step.observation, flat(expected.observation))
            assert step.reward == expected.reward and type(step.reward) is float


def test_the_time_limit_truncates_and_does_not_terminate():
    env = _make("walker-walk", 0)
    env.reset()
    steps = [env.step(np.zeros(6)) for _ in range(1000)]
    assert [step.truncated for step in steps] == [False] * 999 + [True]
    assert not any(step.terminated or step.success for step in steps)
    with pytest.raises(RuntimeError, match="ended after 1000 steps"):
        env.step(np.zeros(6))


def test_a_last_discount_of_zero_terminates():
    """lqr ends once the system is at rest in the origin; it has no time limit of its own."""
    env = _make("lqr-lqr_2_1", 0)
    assert env.horizon == 1000
    env.reset()
    physics = env._environment.physics
    physics.data.qpos[:], physics.data.qvel[:] = 0.0, 0.0
    physics.forward()
    step = env.step(np.zeros(1))
    assert step.terminated and not step.truncated


def test_actions_are_scaled_to_the_actuators():
    env = _make("quadruped-walk", 0)
    env.reset()
    limits = env._environment.physics.model.actuator_ctrlrange
    assert not np.array_equal(limits, np.tile([-1.0, 1.0], (12, 1)))  # else this shows nothing
    for action, expected in ((-1.0, limits[:, 0]), (1.0, limits[:, 1]), (0.0, limits.mean(1))):
        env.step(np.full(12, action))
        np.testing.assert_allclose(env._environment.physics.control(), expected, atol=1e-12)


def test_actuators_without_limits_take_actions_as_they_are():
    env = _make("lqr-lqr_2_1", 0)
    env.reset()
    env.step(np.array([0.5]))
    np.testing.assert_array_equal(env._environment.physics.control(), [0.5])


def test_seeds_decide():
    first, again, other = (_make("walker-walk", seed) for seed in (5, 5, 6))
    np.random.seed(0)
    one = _episode(first, 10)
    np.random.seed(1)  # global random numbers play no part
    two = _episode(again, 10)
    for left, right in zip(one, two, strict=True):
        np.testing.assert_array_equal(left, right)
    assert not np.array_equal(other.reset(), one[0])


@pytest.mark.parametrize("task", ["walker-walk", "cartpole-swingup"])
def test_rng_state_round_trips_through_json(task):
    env = _make(task, 1)
    _episode(env, 5)
    env._environment.task.random.randn()  # normals are made in pairs; the other one is state too
    state = json.loads(json.dumps(env.rng_state()))
    expected = [_episode(env, 5) for _ in range(2)]
    for target in (env, _make(task, 99)):
        target.set_rng_state(state)
        for episode in expected:
            for left, right in zip(_episode(target, 5), episode, strict=True):
                np.testing.assert_array_equal(left, right)
    with pytest.raises(ValueError, match="state must come from rng_state"):
        env.set_rng_state({"bit_generator": "PCG64"})


def test_a_simulation_that_breaks_down_says_where():
    env = _make("walker-walk", 0)
    env.reset()
    env.step(np.zeros(6))
    env._environment.physics.data.qvel[:] = 1e30
    with pytest.raises(NonFiniteError, match="dm_control/walker-walk: the simulation broke down at step 2"):
        env.step(np.zeros(6))


def test_the_task_that_needs_opengl_says_what_to_set(monkeypatch):
    env = _make("quadruped-escape", 0)

    def no_opengl():
        raise RuntimeError("No OpenGL rendering backend is available.")

    monkeypatch.setattr(env._environment, "reset", no_opengl)
    with pytest.raises(ParlError, match=r"dm_control/quadruped-escape .* set MUJOCO_GL=egl"):
        env.reset()
