"""MetaWorld through the interface: positions that change, 500 steps, success that does not end an episode."""

import copy

import numpy as np
import pytest

from parl_core.envs import make_env
from parl_core.envs.metaworld import MetaWorldEnvironment

TASKS = ["door-open", "button-press"]


def _make(task: str, seed: int) -> MetaWorldEnvironment:
    env = make_env(f"metaworld/{task}", seed)
    assert isinstance(env, MetaWorldEnvironment)
    return env


def _episode(env, count, seed=0):
    first = env.reset()
    actions = np.random.default_rng(seed).uniform(-1.0, 1.0, size=(count, env.act_dim))
    steps = [env.step(action) for action in actions]
    return first, np.array([step.observation for step in steps]), [step.reward for step in steps]


def _positions(env, count):
    """The randomly drawn object position of each of `count` episodes, (count, 3)."""
    drawn = []
    for _ in range(count):
        env.reset()
        drawn.append(np.array(env._environment.obj_init_pos))
    return np.array(drawn)


@pytest.mark.parametrize("task", TASKS)
def test_shape_of_the_task(task):
    env = _make(task, 0)
    assert (env.name, env.obs_dim, env.act_dim, env.horizon) == (f"metaworld/{task}", 39, 4, 500)
    assert env.reports_success
    observation = env.reset()
    assert observation.dtype == np.float32
    np.testing.assert_array_equal(observation[-3:], 0.0)  # the goal is hidden
    step = env.step(np.zeros(4))
    assert step.observation.dtype == np.float32 and type(step.reward) is float and step.success is False


@pytest.mark.parametrize("task", TASKS)
def test_every_episode_and_every_seed_has_its_own_position(task):
    first, again, other = (_positions(_make(task, seed), 4) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(np.concatenate([first, other]), axis=0)) == 8


# Lists of numbers, views of bodies' positions, joints and targets in the model: what the 50 tasks have between them.
@pytest.mark.parametrize("task", [*TASKS, "assembly", "basketball", "hammer", "lever-pull", "pick-place-wall", "sweep"])
def test_state_repeats_steps_and_resets_in_another_instance(task):
    def go_on(env):
        actions = np.random.default_rng(1).uniform(-1.0, 1.0, size=(20, 4))
        given = [(step.observation.tobytes(), step[1:]) for step in (env.step(action) for action in actions)]
        first, observations, rewards = _episode(env, 3)
        return [*given, first.tobytes(), observations.tobytes(), rewards]

    env = _make(task, 1)
    _episode(env, 20)
    state = env.state()
    copied = copy.deepcopy(state)
    expected = go_on(env)
    np.testing.assert_equal(state, copied)  # what it holds did not change meanwhile
    for target in (_make(task, 99), env):
        target.set_state(state)
        np.random.seed(0)  # global random numbers play no part
        assert go_on(target) == expected


def test_views_of_the_simulation_are_views_again():
    env, other = _make("button-press", 1), _make("button-press", 2)
    env.reset()
    for state in (env.state(), _make("button-press", 3).state()):
        other.set_state(state)
        inner = other._environment
        other.reset()
        other.step(np.ones(4))
        np.testing.assert_array_equal(inner.init_left_pad, inner.get_body_com("leftpad"))


def test_a_broken_state_is_refused():
    env = _make("button-press", 1)
    env.reset()
    state = env.state()
    with pytest.raises(ValueError, match=r"state must come from state\(\) of metaworld/button-press"):
        env.set_state({**state, "simulator": {**state["simulator"], "random": {"bit_generator": "MT19937"}}})
    with pytest.raises(RuntimeError, match="call reset first"):
        env.step(np.zeros(4))


@pytest.mark.filterwarnings("ignore:Constant")  # MetaWorld: the expert asks for more than 1
def test_a_solved_episode_goes_on_to_500_steps():
    """MetaWorld's scripted policy presses the button: success is reported and does not end the episode."""
    from metaworld.policies import SawyerButtonPressV3Policy

    env = _make("button-press", 0)
    expert = SawyerButtonPressV3Policy()
    observation = env.reset()
    steps = []
    for _ in range(500):
        action = expert.get_action(observation.astype(np.float64))
        steps.append(env.step(np.clip(action, -1.0, 1.0)))
        observation = steps[-1].observation
    assert any(step.success for step in steps[:400])
    assert not any(step.terminated for step in steps)
    assert [step.truncated for step in steps] == [False] * 499 + [True]
    assert 400.0 < sum(step.reward for step in steps) < 5000.0
    with pytest.raises(RuntimeError, match="ended after 500 steps"):
        env.step(np.zeros(4))
