"""DM Control through the interface, against the suite itself."""

import copy

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


# One of each domain, the one with most to remember: targets in the model, attributes of the task, drawn stiffness.
STATEFUL = [
    "acrobot-swingup",
    "ball_in_cup-catch",
    "cartpole-swingup",
    "cheetah-run",
    "dog-fetch",
    "finger-turn_hard",
    "fish-swim",
    "hopper-hop",
    "humanoid-run",
    "humanoid_CMU-stand",
    "lqr-lqr_6_2",
    "manipulator-insert_peg",
    "pendulum-swingup",
    "point_mass-hard",
    "quadruped-fetch",
    "reacher-hard",
    "stacker-stack_4",
    "swimmer-swimmer6",
    "walker-walk",
]


def _seen(env):
    """What the task tells of the present state: observation, reward, termination."""
    task, physics = env._environment.task, env._environment.physics
    return (
        env._flatten(task.get_observation(physics)).tobytes(),
        task.get_reward(physics),
        task.get_termination(physics),
    )


def _go_on(env, count):
    """Bytes of everything that the following steps and the next episode give."""
    steps = [env.step(action) for action in _actions(env, count, seed=1)]
    given = [(step.observation.tobytes(), step.reward, step[2:]) for step in steps]
    first, observations, rewards = _episode(env, 3)
    return [*given, first.tobytes(), observations.tobytes(), rewards]


@pytest.mark.parametrize("task", STATEFUL)
def test_state_repeats_steps_and_resets_in_another_instance(task):
    env = _make(task, 1)
    _episode(env, 30)
    env._environment.task.random.randn()  # normals are made in pairs; the other one is state too
    state, seen = env.state(), _seen(env)
    expected = _go_on(env, 30)
    other = _make(task, 99)
    other.set_state(state)  # never reset before
    assert _seen(other) == seen
    assert _go_on(other, 30) == expected
    env.set_state(state)  # an episode further on
    assert _go_on(env, 30) == expected


def test_state_before_the_first_reset_and_at_an_end():
    env, other = _make("walker-walk", 1), _make("walker-walk", 2)
    other.reset()
    other.set_state(env.state())
    with pytest.raises(RuntimeError, match="call reset first"):
        other.step(np.zeros(6))
    np.testing.assert_array_equal(other.reset(), env.reset())
    for _ in range(1000):
        env.step(np.zeros(6))
    other.set_state(env.state())
    with pytest.raises(RuntimeError, match="ended after 1000 steps"):
        other.step(np.zeros(6))
    np.testing.assert_array_equal(other.reset(), env.reset())


def test_the_time_limit_counts_from_the_start_of_the_episode():
    env, other = _make("walker-walk", 1), _make("walker-walk", 2)
    env.reset()
    for _ in range(999):
        env.step(np.zeros(6))
    other.set_state(env.state())
    assert other.step(np.zeros(6)).truncated


def test_a_state_is_a_copy_and_holds_only_what_can_be_stored():
    env = _make("point_mass-hard", 1)
    env.reset()
    state = env.state()
    copied = copy.deepcopy(state)
    _episode(env, 5)
    np.testing.assert_equal(state, copied)

    def check(value):
        if isinstance(value, dict):
            return all(isinstance(key, str) and check(inner) for key, inner in value.items())
        return value is None or isinstance(value, np.ndarray | bool | int | float | str)

    assert check(state)


def test_a_state_of_another_task_or_a_broken_one_is_refused():
    env = _make("walker-walk", 1)
    env.reset()
    state = env.state()
    with pytest.raises(ValueError, match="dm_control/walker-run: it is one of dm_control/walker-walk"):
        _make("walker-run", 1).set_state(state)
    simulator = state["simulator"]
    for changes, message in (
        ({"physics": simulator["physics"][1:]}, r"the simulation's state must have shape \(91,\), got \(90,\)"),
        ({"model": {"body_pos": np.zeros(3)}}, r"the model has no body_pos of shape \(3,\)"),
        ({"random": {"bit_generator": "PCG64"}}, "must come from state"),
    ):
        with pytest.raises(ValueError, match=message):
            env.set_state({**state, "simulator": {**simulator, **changes}})
    with pytest.raises(ValueError, match="'model' is missing"):
        env.set_state({**state, "simulator": {}})
    with pytest.raises(RuntimeError, match="call reset first"):
        env.step(np.zeros(6))


def test_what_cannot_be_saved_is_named():
    env = _make("walker-walk", 1)
    env.reset()
    env._environment.task.helper = object()
    with pytest.raises(ParlError, match=r"PlanarWalker.helper has changed and is a object, which cannot be saved"):
        env.state()


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
