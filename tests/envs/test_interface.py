"""What every environment checks, shown on a tiny one."""

import numpy as np
import pytest

from parl_core.envs import Environment, Step
from parl_core.errors import NonFiniteError


class Counter(Environment):
    """Two numbers that count steps; it returns what the test plants at a given step."""

    def __init__(self, horizon=3, planted=None, at_step=1):
        super().__init__("test/counter", obs_dim=2, act_dim=2, horizon=horizon, reports_success=True)
        self.planted = planted or {}
        self.at_step = at_step
        self.seen = []
        self.generator = np.random.default_rng(0)

    def _state(self):
        return {"random": self.generator.bit_generator.state}

    def _set_state(self, state):
        self.generator.bit_generator.state = state["random"]

    def _reset(self):
        return self.planted.get("reset", self.generator.uniform(size=2).astype(np.float32))

    def _step(self, action):
        self.seen.append(action)
        step = Step(np.full(2, self._num_steps, np.float32), 1.0, False, self._num_steps == self.horizon, False)
        planted = {key: value for key, value in self.planted.items() if key != "reset"}
        return step._replace(**planted) if self._num_steps == self.at_step else step


def test_an_episode_runs_from_reset_to_its_end():
    env = Counter()
    for _ in range(2):
        assert env.reset().shape == (2,)
        assert [env.step([0.0, 0.0]).truncated for _ in range(3)] == [False, False, True]
        with pytest.raises(
            RuntimeError, match=r"test/counter: .* call reset first \(the last one ended after 3 steps\)"
        ):
            env.step([0.0, 0.0])


def test_termination_ends_the_episode_too():
    env = Counter(planted={"terminated": True})
    env.reset()
    assert env.step([0.0, 0.0]).terminated
    with pytest.raises(RuntimeError, match="call reset first"):
        env.step([0.0, 0.0])


def test_a_step_before_the_first_reset_is_refused():
    with pytest.raises(RuntimeError, match=r"call reset first$"):
        Counter().step([0.0, 0.0])


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        ([0.0], ValueError, r"action must have shape \(2,\), got \(1,\)"),
        ([[0.0, 0.0]], ValueError, r"action must have shape \(2,\), got \(1, 2\)"),
        ([0.0, 1.1], ValueError, r"action must lie in \[-1, 1\], got \[0.0, 1.1\]"),
        ([-1.00001, 0.0], ValueError, r"action must lie in \[-1, 1\]"),
        ([0.0, float("nan")], NonFiniteError, "action must be finite"),
        ([float("inf"), 0.0], NonFiniteError, "action must be finite"),
    ],
)
def test_bad_actions_are_refused_before_the_simulator_sees_them(action, error, message):
    env = Counter()
    env.reset()
    with pytest.raises(error, match=message):
        env.step(action)
    assert not env.seen
    env.step([1.0, -1.0])  # the episode goes on


def test_rounding_beyond_the_bounds_is_clipped():
    env = Counter()
    env.reset()
    env.step(np.array([1.0 + 5e-7, -1.0 - 5e-7]))
    env.step(np.array([0.25, -0.5], dtype=np.float32))
    np.testing.assert_array_equal(env.seen, [[1.0, -1.0], [0.25, -0.5]])


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (
            {"observation": np.array([0.0, np.nan], np.float32)},
            "test/counter: the observation after step 2 of the episode must be finite, got nan at index 1",
        ),
        (
            {"observation": np.array([np.inf, 0.0], np.float32)},
            "test/counter: the observation after step 2 of the episode must be finite, got inf at index 0",
        ),
        (
            {"reward": float("nan")},
            "test/counter: the reward of step 2 of the episode must be finite, got nan",
        ),
    ],
)
def test_what_the_simulator_returns_must_be_finite(planted, message):
    env = Counter(planted=planted, at_step=2)
    env.reset()
    env.step([0.0, 0.0])
    with pytest.raises(NonFiniteError, match=message):
        env.step([0.0, 0.0])
    with pytest.raises(RuntimeError, match="call reset first"):
        env.step([0.0, 0.0])


def test_what_reset_returns_must_be_finite_and_of_the_right_size():
    with pytest.raises(NonFiniteError, match="the observation that reset returned must be finite, got nan at index 0"):
        Counter(planted={"reset": np.array([np.nan, 0.0], np.float32)}).reset()
    with pytest.raises(ValueError, match=r"the observation that reset returned must have shape \(2,\), got \(3,\)"):
        Counter(planted={"reset": np.zeros(3, np.float32)}).reset()


def test_state_holds_the_episode_and_how_far_it_is():
    env = Counter()
    env.reset()
    env.step([0.0, 0.0])
    state = env.state()
    env.step([0.0, 0.0])
    following = env.reset()
    env.set_state(state)
    assert [env.step([0.0, 0.0]).truncated for _ in range(2)] == [False, True]
    np.testing.assert_array_equal(env.reset(), following)
    other = Counter()
    other.set_state(Counter().state())
    with pytest.raises(RuntimeError, match="call reset first"):
        other.step([0.0, 0.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "test/other"}, "it is one of test/other"),
        ({"simulator": {}}, "'random' is missing"),
        ({"simulator": {"random": {"bit_generator": "MT19937"}}}, ""),
        ({"num_steps": None}, ""),
    ],
)
def test_a_foreign_state_is_refused_and_leaves_no_episode(changes, message):
    env = Counter()
    env.reset()
    with pytest.raises(ValueError, match=rf"state must come from state\(\) of test/counter: .*{message}"):
        env.set_state({**env.state(), **changes})
    with pytest.raises(RuntimeError, match="call reset first"):
        env.step([0.0, 0.0])
