"""Estimators from episodes: against the library's engine on the same data, a model built by hand, and the exact vector."""

import numpy as np
import pytest
import torch

import parl_core as parl
from parl_core.envs.tabular import (
    BilevelMDP,
    FourRooms,
    ParametricReward,
    TabularMDP,
    exact_hypergradient,
    random_mdp,
    sampled,
    soft_policy_iteration,
    soft_value_iteration,
)
from parl_core.envs.tabular.sampled import Episodes, sample_episodes

ALL = (sampled.hpgd, sampled.bc_hg, sampled.sobirl_shortcut, sampled.fisher, sampled.certainty_equivalent)


class SmallProblem(BilevelMDP):
    """Five states, three actions, episodes that end with probability .1 to .4; rewards linear in six parameters."""

    num_params = 6

    def __init__(self, seed=0, temperature=4.0):
        rng = np.random.default_rng(seed)
        mdp = random_mdp(5, 3, 0.9, seed)
        keep = rng.uniform(0.6, 0.9, size=(5, 3, 1))
        self.mdp = TabularMDP(mdp.transitions * keep, np.eye(5)[2], 0.9)
        self.temperature = temperature
        self._lower, self._upper = rng.normal(size=(2, 5, 3, 6))
        self._fixed = rng.normal(size=(5, 3))

    def lower(self, params):
        return ParametricReward(self._lower @ params, self._lower)

    def upper(self, params):
        return ParametricReward(self._fixed + self._upper @ params, self._upper)


PARAMS = np.random.default_rng(3).normal(size=6)


def _episodes(problem, num_steps, seed=0, horizon=20):
    return sample_episodes(problem.mdp, problem.response(PARAMS), num_steps, horizon, seed)


def _trajectories(problem, episodes):
    """As the engine takes them: one-hot states."""
    offsets = np.concatenate([[0], np.flatnonzero(episodes.last) + 1])
    observations = torch.eye(problem.mdp.num_states, dtype=torch.float64)[torch.from_numpy(episodes.states)]
    return parl.Trajectories(observations, torch.from_numpy(episodes.actions), torch.from_numpy(offsets))


class Reward(torch.nn.Module):
    """The problem's lower reward as a module."""

    def __init__(self, problem):
        super().__init__()
        self.params = torch.nn.Parameter(torch.from_numpy(PARAMS.copy()))
        self.register_buffer("features", torch.from_numpy(problem.lower(PARAMS).jacobian))

    def forward(self, observations, actions):
        table = self.features @ self.params
        return table[observations.argmax(-1), actions.reshape(-1)]


def _policy(problem):
    policy = parl.policies.CategoricalPolicy(problem.mdp.num_states, problem.mdp.num_actions).double()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
        logits = torch.from_numpy(np.log(problem.response(PARAMS)))
        next(p for p in policy.parameters() if p.shape == logits.T.shape).copy_(logits.T)
    return policy


def _table_steps(table, trajectories):
    return table[trajectories.observations.argmax(-1), trajectories.actions.reshape(-1)]


def _upper_loss(problem):
    """Mean discounted upper reward, its own parameters held fixed: the implicit term alone is compared."""
    table = torch.from_numpy(problem.upper(PARAMS).value)

    def per_trajectory(reward, trajectories):
        return parl.ops.discounted_returns(_table_steps(table, trajectories), 0.9, trajectories.offsets)[
            trajectories.offsets[:-1]
        ]

    return parl.TrajectoryLoss(per_trajectory)


def _discounted_advantages(problem, trajectories):
    """(T,) γ^t A_U at every step, from averages over visits by dictionaries."""
    steps = _table_steps(torch.from_numpy(problem.upper(PARAMS).value), trajectories)
    returns = parl.ops.discounted_returns(steps, 0.9, trajectories.offsets).tolist()
    states = trajectories.observations.argmax(-1).tolist()
    pairs = list(zip(states, trajectories.actions.reshape(-1).tolist(), strict=True))
    by_pair, by_state = {}, {}
    for state, pair, value in zip(states, pairs, returns, strict=True):
        by_pair.setdefault(pair, []).append(value)
        by_state.setdefault(state, []).append(value)
    advantages = [np.mean(by_pair[pair]) - np.mean(by_state[state]) for state, pair in zip(states, pairs, strict=True)]
    return 0.9 ** trajectories.time.double() * torch.tensor(advantages, dtype=torch.float64)


def _engine(problem, lower, upper, **chosen):
    """Implicit term of the library's hypergradient."""
    reward = Reward(problem)
    return parl.hypergradient(
        _policy(problem), reward, lower, upper, loss=_upper_loss(problem), discount=0.9, **chosen
    ).implicit.numpy()


def test_newtons_method_finds_the_optimum_of_value_iteration():
    for problem in (SmallProblem(), FourRooms(0, 0.003, 1.0)):
        params = np.random.default_rng(0).normal(size=problem.num_params)
        rewards = problem.lower(params).value
        slow = soft_value_iteration(problem.mdp, rewards, problem.temperature, tolerance=1e-14)
        fast = soft_policy_iteration(problem.mdp, rewards, problem.temperature)
        assert fast.converged and fast.iterations < 12 < slow.iterations
        np.testing.assert_allclose(fast.value, slow.value, atol=1e-11)
        np.testing.assert_allclose(fast.policy, slow.policy, atol=1e-9)


def test_episodes_follow_the_mdp_and_the_policy():
    problem = SmallProblem()
    policy = problem.response(PARAMS)
    episodes = _episodes(problem, 200_000)
    begins = np.concatenate([[True], episodes.last[:-1] > 0])
    assert (episodes.states[begins] == 2).all()
    lengths = np.diff(np.flatnonzero([*begins, True]))
    assert lengths.max() == 20 and (episodes.last[np.cumsum(lengths) - 1][lengths == 20] > 0).all()
    assert (lengths[episodes.last[np.cumsum(lengths) - 1] == 2][:-1] == 20).all()
    # Each frequency is a mean of independent draws. 5·3·6 transition and 15 action frequencies: a false alarm at 6 standard
    # errors has probability below 105·2e-9.
    for state in range(5):
        here = episodes.states == state
        for action in range(3):
            share, expected = np.mean(episodes.actions[here] == action), policy[state, action]
            assert abs(share - expected) < 6 * np.sqrt(expected * (1 - expected) / here.sum())
            known = np.flatnonzero(here & (episodes.actions == action) & (episodes.last != 2))
            ended = episodes.last[known] == 1
            following = episodes.states[np.minimum(known + 1, len(episodes.states) - 1)]
            assert len(known) > 100
            for successor in range(6):
                hits = ended if successor == 5 else ~ended & (following == successor)
                expected = [*problem.mdp.transitions[state, action], problem.mdp.ends[state, action]][successor]
                assert abs(hits.mean() - expected) < 6 * np.sqrt(expected * (1 - expected) / len(known))


def test_the_same_seed_gives_the_same_episodes_and_prefixes_are_cut():
    problem = SmallProblem()
    first, again, other = (_episodes(problem, 1000, seed) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first.states != other.states).any()
    within = int(np.flatnonzero(first.last == 0)[5]) + 1
    assert first.prefix(within).last[-1] == 2 and first.last[within - 1] == 0
    ended = int(np.flatnonzero(first.last == 1)[2]) + 1
    assert first.prefix(ended).last[-1] == 1 and first.prefix(ended).number == np.count_nonzero(first.last[:ended])


def test_returns_by_hand():
    episodes = Episodes(np.array([0, 1, 1]), np.array([0, 0, 1]), np.array([0, 1, 2]))
    rewards = np.array([[1.0, 9.0], [10.0, 100.0]])
    np.testing.assert_allclose(episodes.returns(rewards, 0.5), [1.0 + 5.0, 100.0])
    assert episodes.number == 2


def test_estimators_from_visits_equal_the_engines():
    problem = SmallProblem()
    episodes = _episodes(problem, 3000)
    data = _trajectories(problem, episodes)
    returns = torch.from_numpy(episodes.returns(problem.upper(PARAMS).value, 0.9))

    def advantages(trajectories):
        return _discounted_advantages(problem, trajectories)

    temperature = problem.temperature
    # the engine's HPGD weighs U − baseline, so the baseline leaves it the advantage
    expected = _engine(
        problem,
        data,
        data,
        estimator=parl.HPGD(temperature),
        baseline=lambda t: returns[t.trajectory_index] - advantages(t),
    )
    np.testing.assert_allclose(sampled.hpgd(problem, PARAMS, episodes).implicit, expected, rtol=1e-9)
    expected = _engine(problem, data, data, estimator=parl.BCHG(temperature, advantages=advantages))
    np.testing.assert_allclose(sampled.bc_hg(problem, PARAMS, episodes).implicit, expected, rtol=1e-9)
    expected = _engine(problem, data, data, estimator=parl.SoBiRL(temperature, advantages=advantages))
    np.testing.assert_allclose(sampled.sobirl_shortcut(problem, PARAMS, episodes).implicit, expected, rtol=1e-9)


def test_fisher_equals_the_engines():
    problem = SmallProblem()
    episodes = _episodes(problem, 2000, seed=1)
    split = int(np.flatnonzero(episodes.last)[episodes.number // 2 - 1]) + 1
    halves = [Episodes(*(a[part] for a in episodes)) for part in (slice(split), slice(split, None))]
    assert abs(halves[0].number - halves[1].number) <= 1
    upper, lower = (_trajectories(problem, half) for half in halves)
    table = torch.from_numpy(problem.upper(PARAMS).value)

    def baseline(trajectories):
        """U up to the step, and from there the mean over visits to the state of what follows."""
        steps = _table_steps(table, trajectories)
        after = parl.ops.discounted_returns(steps, 0.9, trajectories.offsets)
        states = trajectories.observations.argmax(-1)
        value = torch.stack([after[states == state].mean() for state in range(5)])
        total = after[trajectories.offsets[:-1]][trajectories.trajectory_index]
        return total - 0.9 ** trajectories.time.double() * (after - value[states])

    expected = _engine(
        problem,
        lower,
        upper,
        curvature=parl.Fisher(problem.temperature),
        solver=parl.CG(rtol=1e-12),
        baseline=baseline,
    )
    np.testing.assert_allclose(sampled.fisher(problem, PARAMS, episodes).implicit, expected, rtol=1e-8)


def test_certainty_equivalent_is_exact_in_the_mdp_of_the_frequencies():
    problem = SmallProblem()
    episodes = _episodes(problem, 400, seed=2)
    counts = np.zeros((5, 3, 6))
    for t, (state, action, last) in enumerate(zip(*episodes, strict=True)):
        if last != 2:
            counts[state, action, 5 if last else episodes.states[t + 1]] += 1
    assert (counts.sum(-1) > 0).all() and (episodes.last == 2).any()
    transitions = counts[:, :, :5] / counts.sum(-1, keepdims=True)
    policy = counts.sum(-1) / counts.sum((1, 2))[:, None]
    discounted = 0.9 * np.einsum("sa,sat->st", policy, transitions)
    visits = np.linalg.inv(np.eye(5) - discounted)[2][:, None] * policy
    lower, upper = problem.lower(PARAMS), problem.upper(PARAMS)

    def values(reward):  # (S, A, …) -> Q, V
        value = np.tensordot(np.linalg.inv(np.eye(5) - discounted), np.einsum("sa,sa...->s...", policy, reward), 1)
        return reward + 0.9 * np.tensordot(transitions, value, 1), value

    q_upper, v_upper = values(upper.value)
    q_slope, v_slope = values(lower.jacobian)
    advantage = visits * (q_upper - v_upper[:, None]) / problem.temperature
    result = sampled.certainty_equivalent(problem, PARAMS, episodes)
    np.testing.assert_allclose(
        result.implicit, np.einsum("sa,sap->p", advantage, q_slope - v_slope[:, None]), rtol=1e-10
    )
    np.testing.assert_allclose(result.objective, v_upper[2], rtol=1e-12)
    np.testing.assert_allclose(result.direct, np.einsum("sa,sap->p", visits, upper.jacobian), rtol=1e-12)


@pytest.mark.parametrize("estimator", [e for e in ALL if e is not sampled.sobirl_shortcut])
def test_estimators_are_consistent(estimator):
    """400 000 steps bring every one within 6% of the exact term, and leave less than half of the error of 25 000."""
    problem = SmallProblem()
    exact = problem.hypergradient(PARAMS, exact_hypergradient)

    def error(num_steps, seed):
        episodes = _episodes(problem, num_steps, seed, horizon=400)
        estimate = estimator(problem, PARAMS, episodes)
        return np.linalg.norm(estimate.implicit - exact.implicit) / np.linalg.norm(exact.implicit)

    few, many = np.median([error(25_000, k) for k in range(5)]), np.median([error(400_000, k) for k in range(5)])
    assert many < 0.06 and many < 0.5 * few


def test_sobirl_is_not_consistent():
    problem = SmallProblem()
    exact = problem.hypergradient(PARAMS, exact_hypergradient).implicit
    estimate = sampled.sobirl_shortcut(problem, PARAMS, _episodes(problem, 400_000)).implicit
    assert np.linalg.norm(estimate - exact) > 0.15 * np.linalg.norm(exact)


@pytest.mark.parametrize("estimator", ALL)
def test_visits_that_were_cut_say_nothing(estimator):
    """A state that is only ever reached by an episode's last, cut step, and states never seen, leave no NaN."""
    problem = FourRooms(0, 0.003, 1.0)
    weights = np.zeros(105)
    episodes = sample_episodes(problem.mdp, problem.response(weights), 700, 200, 0)
    assert len(set(episodes.states.tolist())) < 104
    result = estimator(problem, weights, episodes)
    assert np.isfinite(result.total).all() and np.abs(result.implicit).max() > 0


def test_user_mistakes():
    problem = SmallProblem()
    with pytest.raises(ValueError, match="one state, got 5"):
        mdp = TabularMDP(problem.mdp.transitions, np.full(5, 0.2), 0.9)
        sample_episodes(mdp, problem.response(PARAMS), 10, 5, 0)
    for options in ({"num_steps": 0, "horizon": 5}, {"num_steps": 5, "horizon": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            sample_episodes(problem.mdp, problem.response(PARAMS), seed=0, **options)
    with pytest.raises(ValueError, match="at least 3"):
        sampled.fisher(problem, PARAMS, _episodes(problem, 2))
