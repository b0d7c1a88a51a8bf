"""Tabular MDPs as environments: what they draw against their tables, and what ends an episode by hand.

Statistical tests have fixed seeds; each would give a false alarm with probability 1e-6 over seeds.
"""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import scipy.stats

from parl_core.envs import make_env
from parl_core.envs.tabular import TabularMDP
from parl_core.envs.tabular.environment import TabularEnvironment, TabularTask
from parl_core.envs.tabular.problems.four_rooms import CELLS, GOALS, MAP, START, four_rooms_mdp
from parl_core.envs.tabular.problems.rand_mdp import rand_mdp
from parl_core.envs.tabular.tasks import make, task_names
from parl_core.errors import NonFiniteError

FALSE_ALARM = 1e-6
TASKS = ["tabular/four-rooms", "tabular/rand-mdp"]


def _boxes(actions, num_actions):
    """Boxes in which the largest entry is the action's."""
    return np.where(np.arange(num_actions) == np.asarray(actions)[:, None], 0.5, -0.25)


def _cells(observation):
    """Cell and goal as (row, column), from the map's own measure: free cells lie in rows and columns 1 to 11."""
    row, column, goal_row, goal_column = np.rint(6 + 5 * np.asarray(observation, np.float64)).astype(int).tolist()
    return (row, column), (goal_row, goal_column)


def _walk(env, actions, see):
    """Take the actions, through as many episodes as it takes: (variant, state, action, successor or None, step)."""
    visited = []
    state = see(env.reset())
    for action, box in zip(actions, _boxes(actions, env.act_dim), strict=True):
        step = env.step(box)
        after = see(step.observation)
        visited.append((state, int(action), None if step.terminated else after, step))
        state = see(env.reset()) if step.terminated or step.truncated else after
    return visited


def _assert_drawn_from(counts, expected):
    """Exact two-sided binomial tests of counts (rows, outcomes) against probabilities, with Bonferroni's correction."""
    counts, expected = np.asarray(counts, np.int64), np.asarray(expected)
    assert not counts[expected == 0.0].any(), "what has probability zero was drawn"
    number = np.broadcast_to(counts.sum(axis=1, keepdims=True), counts.shape)
    random = (expected > 0.0) & (expected < 1.0) & (number > 0)
    law = scipy.stats.binom(number[random], expected[random])
    assert random.any()
    tails = np.minimum(law.cdf(counts[random]), law.sf(counts[random] - 1))
    assert 2.0 * tails.min() * random.sum() > FALSE_ALARM


def _goes_on_or_ends(ends=0.0):
    """States 0 → 1 → 2 → 0 by action 1, 0 → 2 → 1 → 0 by action 2, and 0 stays; from 2 every step ends with `ends`."""
    transitions = np.zeros((3, 3, 3))
    for state in range(3):
        for action in range(3):
            transitions[state, action, (state + action) % 3] = 1.0 - ends * (state == 2)
    return TabularMDP(transitions, np.array([0.0, 1.0, 0.0]), 0.9)


def _small(ends=0.0, horizon=5, ends_in_success=False, observations=((1.0, 0.0), (0.5, -1.0), (0.0, 3.0))):
    task = TabularTask(_goes_on_or_ends(ends), np.arange(9.0).reshape(3, 3), np.array(observations, np.float32))
    return TabularEnvironment("small", [task], horizon=horizon, ends_in_success=ends_in_success, seed=0)


def test_rewards_are_for_the_state_before_and_the_action_and_the_horizon_truncates():
    env = _small()
    np.testing.assert_array_equal(env.reset(), [0.5, -1.0])  # state 1, the only first one
    steps = [env.step(box) for box in _boxes([1, 1, 2, 0, 2], 3)]  # to 2, 0, 2, 2, 1
    assert [step.reward for step in steps] == [4.0, 7.0, 2.0, 6.0, 8.0]
    assert [step.observation.tolist() for step in steps] == [[0, 3], [1, 0], [0, 3], [0, 3], [0.5, -1]]
    assert [step.truncated for step in steps] == [False] * 4 + [True]
    assert not any(step.terminated or step.success for step in steps) and not env.reports_success
    assert all(type(step.reward) is float and step.observation.dtype == np.float32 for step in steps)
    with pytest.raises(RuntimeError, match="ended after 5 steps"):
        env.step(np.zeros(3))


def test_the_largest_entry_is_the_action_and_the_first_one_of_several():
    env = _small(horizon=100)
    for box, action in (
        ([-1.0, 1.0, -1.0], 1),
        ([-0.5, -1.0, -0.4], 2),
        ([0.1, 0.3, 0.3], 1),
        ([0.0, 0.0, 0.0], 0),
        ([-1.0, -1.0, -1.0], 0),
        ([0.2, 0.1, 0.2], 0),
    ):
        env.reset()
        assert env.step(np.array(box)).reward == 3.0 + action


@pytest.mark.parametrize("is_success", [True, False])
def test_an_episode_that_the_mdp_ends_terminates_also_at_the_horizon_and_stays_where_it_was(is_success):
    env = _small(ends=1.0, horizon=2, ends_in_success=is_success)
    assert env.reports_success == is_success
    for _ in range(3):
        env.reset()
        first, last = env.step([0.0, 1.0, 0.0]), env.step([0.0, 1.0, 0.0])
        assert not first.terminated and not first.truncated and not first.success
        assert last.terminated and not last.truncated and last.success == is_success
        assert last.reward == 7.0
        np.testing.assert_array_equal(last.observation, [0.0, 3.0])


def test_an_episode_ends_as_often_as_the_mdp_says():
    env = _small(ends=0.3, horizon=10_000)
    ended = 0
    for _ in range(20_000):
        env.reset()
        env.step([0.0, 1.0, 0.0])
        ended += env.step([1.0, 0.0, 0.0]).terminated
    assert scipy.stats.binomtest(ended, 20_000, 0.3).pvalue > FALSE_ALARM


def test_what_is_handed_out_is_not_the_table_itself():
    env = _small()
    env.reset()[:] = 7.0
    env.step([1.0, 0.0, 0.0]).observation[:] = 7.0
    np.testing.assert_array_equal(env.step([1.0, 0.0, 0.0]).observation, [0.5, -1.0])


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"observations must have shape \(S, do\) with S = 3, got \(2, 2\)"):
        _small(observations=((1.0, 0.0), (0.5, -1.0)))
    with pytest.raises(ValueError, match="horizon must be at least 1, got 0"):
        _small(horizon=0)
    mdp, observations = _goes_on_or_ends(), np.zeros((3, 1), np.float32)
    options = dict(horizon=1, ends_in_success=False, seed=0)
    good = TabularTask(mdp, np.zeros((3, 3)), observations)
    with pytest.raises(ValueError, match=r"rewards must have shape \(3, 3\)"):
        TabularEnvironment("x", [good._replace(rewards=np.zeros((3, 2)))], **options)
    with pytest.raises(NonFiniteError, match="rewards"):
        TabularEnvironment("x", [good._replace(rewards=np.full((3, 3), np.nan))], **options)
    with pytest.raises(ValueError, match=r"agree in \(do, A\), got \[\(1, 3\), \(2, 3\)\]"):
        TabularEnvironment("x", [good, good._replace(observations=np.zeros((3, 2), np.float32))], **options)
    with pytest.raises(ValueError, match="at least one task"):
        TabularEnvironment("x", [], **options)


@pytest.mark.parametrize("number", [0.0, np.nextafter(1.0, 0.0)])
def test_the_extreme_random_numbers_lead_to_no_state_of_probability_zero_and_no_end(number):
    """Where only state 1 of three is possible, also if rounding has left its probability at 1 − 1e-10."""
    transitions = np.broadcast_to([0.0, 1.0 - 1e-10, 0.0], (3, 1, 3))
    mdp = TabularMDP(transitions, np.array([0.0, 1.0, 0.0]), 0.5)
    task = TabularTask(mdp, np.zeros((3, 1)), np.eye(3, dtype=np.float32))
    env = TabularEnvironment("x", [task], horizon=9, ends_in_success=False, seed=0)

    class Extreme:
        def integers(self, _):
            return 0

        def random(self):
            return number

    env._random = Extreme()
    np.testing.assert_array_equal(env.reset(), [0.0, 1.0, 0.0])
    step = env.step([0.0])
    assert not step.terminated
    np.testing.assert_array_equal(step.observation, [0.0, 1.0, 0.0])


def test_four_rooms_by_hand():
    env = make_env("tabular/four-rooms", 0)
    assert (env.name, env.obs_dim, env.act_dim, env.horizon) == ("tabular/four-rooms", 4, 4, 200)
    assert env.reports_success
    first = {tuple((10 * env.reset()).tolist()) for _ in range(50)}
    assert first == {(-4.0, -10.0, -10.0, 6.0), (-4.0, -10.0, 10.0, 10.0)}  # from (4, 1) to (1, 9) or (11, 11)


def test_a_move_into_a_wall_stays_and_every_other_slip_is_as_likely():
    """From (4, 1), whose left is a wall: .56 for what is intended, .44/3 for each other move."""
    env, after = make_env("tabular/four-rooms", 1), {move: Counter() for move in range(4)}
    for _ in range(2000):
        for move, counts in after.items():
            env.reset()
            counts[_cells(env.step(_boxes([move], 4)[0]).observation)[0]] += 1
    up, right, down, stays = (3, 1), (4, 2), (5, 1), START
    for move, counts in after.items():
        assert set(counts) == {up, right, down, stays}
        for outcome, cell in enumerate((up, right, down, stays)):
            probability = 0.56 if outcome == move else 0.44 / 3
            assert scipy.stats.binomtest(counts[cell], 2000, probability).pvalue > FALSE_ALARM / 16


def test_four_rooms_moves_by_its_transition_matrices_and_ends_at_its_goals():
    actions = np.random.default_rng(0).integers(4, size=40_000)
    counts = {goal: np.zeros((len(CELLS), 4, len(CELLS) + 1)) for goal in GOALS}
    for (cell, goal), action, after, step in _walk(make_env("tabular/four-rooms", 2), actions, _cells):
        assert MAP[cell[0]][cell[1]] == "."
        at_goal = cell == goal
        assert step.terminated == step.success == at_goal  # arriving does not end it: the next step does
        assert step.reward == float(at_goal)
        successor = len(CELLS) if after is None else CELLS.index(after[0])
        counts[goal][CELLS.index(cell), action, successor] += 1
    for number, goal in enumerate(GOALS):
        mdp = four_rooms_mdp(number)
        expected = np.concatenate((mdp.transitions, mdp.ends[..., None]), axis=-1)
        _assert_drawn_from(counts[goal].reshape(-1, len(CELLS) + 1), expected.reshape(-1, len(CELLS) + 1))


def test_the_goals_are_equally_likely_and_a_random_policy_succeeds_as_often_as_computed():
    """Uniformly random boxes are uniformly random moves: success within 200 steps, from powers of their matrix."""
    computed = []
    for number in range(2):
        mdp = four_rooms_mdp(number)
        cells, arrived = mdp.initial, 0.0
        for _ in range(200):
            arrived += float(cells @ mdp.ends.mean(axis=1))
            cells = cells @ mdp.transitions.mean(axis=1)
        computed.append(arrived)
    env, random = make_env("tabular/four-rooms", 3), np.random.default_rng(1)
    goals, successes, lengths = Counter(), Counter(), []
    for _ in range(400):
        _, goal = _cells(env.reset())
        goals[goal] += 1
        for length in range(1, 201):  # noqa: B007
            step = env.step(random.uniform(-1.0, 1.0, size=4))
            if step.terminated or step.truncated:
                break
        successes[goal] += step.success
        lengths.append(length)
        assert step.terminated != step.truncated
        assert step.truncated <= (length == 200)
    first = sum(_cells(env.reset())[1] == GOALS[0] for _ in range(5000))
    assert scipy.stats.binomtest(first, 5000, 0.5).pvalue > FALSE_ALARM
    for goal, probability in zip(GOALS, computed, strict=True):
        assert scipy.stats.binomtest(successes[goal], goals[goal], probability).pvalue > FALSE_ALARM / 2
    assert 12 <= min(lengths) < max(lengths) == 200


def test_rand_mdp_moves_and_pays_by_its_tables():
    env = make_env("tabular/rand-mdp", 4)
    assert (env.name, env.obs_dim, env.act_dim, env.horizon) == ("tabular/rand-mdp", 10, 5, 100)
    assert not env.reports_success
    problem = rand_mdp(0)
    mdp, rewards = problem.mdp, problem.lower(problem.start).value
    actions = np.random.default_rng(2).integers(5, size=30_000)

    def state_of(observation):
        assert sorted(observation.tolist()) == [0.0] * 9 + [1.0]
        return int(observation.argmax())

    counts, first = np.zeros((10, 5, 10)), np.zeros(10)
    for state, action, after, step in _walk(env, actions, state_of):
        assert step.reward == rewards[state, action]
        assert after is not None and not step.success
        counts[state, action, after] += 1
    _assert_drawn_from(counts.reshape(-1, 10), mdp.transitions.reshape(-1, 10))
    for _ in range(1000):
        first[state_of(env.reset())] += 1
    _assert_drawn_from(first[None], np.full((1, 10), 0.1))


def _episodes(env, number, seed=0):
    random, seen = np.random.default_rng(seed), []
    for _ in range(number):
        seen.append(env.reset().tolist())
        for _ in range(env.horizon):
            step = env.step(random.uniform(-1.0, 1.0, size=env.act_dim))
            seen.append((step.observation.tolist(), *step[1:]))
            if step.terminated or step.truncated:
                break
    return seen


@pytest.mark.parametrize("name", TASKS)
def test_seeds_decide(name):
    np.random.seed(0)
    first = _episodes(make_env(name, 5), 4)
    np.random.seed(1)  # global random numbers play no part
    assert _episodes(make_env(name, 5), 4) == first
    assert _episodes(make_env(name, 6), 4) != first


@pytest.mark.parametrize("name", TASKS)
def test_state_repeats_the_episode_under_way_and_the_next_ones(name):
    def go_on(env):
        actions = np.random.default_rng(0).uniform(-1.0, 1.0, (100, env.act_dim))
        given = []
        for action in actions:
            step = env.step(action)
            given.append((step.observation.tolist(), *step[1:]))
            if step.terminated or step.truncated:
                break
        return given, _episodes(env, 4)

    env = make_env(name, 1)
    _episodes(env, 2)
    env.reset()
    env.step(np.zeros(env.act_dim))
    state = json.loads(json.dumps(env.state()))
    expected = go_on(env)
    for target in (env, make_env(name, 99)):
        target.set_state(state)
        assert go_on(target) == expected
    for simulator in ({"task": 0, "state": 10**6}, {"task": -1, "state": 0}):
        with pytest.raises(ValueError, match=r"state must come from state.* there is no state"):
            env.set_state({**state, "simulator": {**state["simulator"], **simulator}})


def test_names():
    assert list(task_names()) == sorted(task_names())
    for task in task_names():
        assert make(task, 0).name == f"tabular/{task}"


def test_numpy_and_torch_are_all_that_is_needed():
    script = """
import sys
for name in ("numba", "scipy", "dm_control", "mujoco", "metaworld", "gymnasium"):
    sys.modules[name] = None
from parl_core.envs import environment_names, make_env
assert environment_names() == ("tabular/four-rooms", "tabular/rand-mdp")
for name in environment_names():
    env = make_env(name, 0)
    env.reset()
    env.step([0.0] * env.act_dim)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
