"""Tabular MDPs: every exact quantity against an independent way to the same number."""

import itertools
import sys
from typing import Any

import numpy as np
import pytest
import torch

from parl_core.envs.tabular import (
    SoftSolution,
    TabularMDP,
    enumerate_trajectories,
    exact_hypergradient,
    expected_return,
    occupancy,
    policy_value,
    random_mdp,
    soft_policy_iteration,
    soft_policy_vjp,
    soft_value_iteration,
)
from parl_core.errors import MissingExtraError, NonFiniteError
from tests.envs.tabular_problems import central_difference, make_problem

TEMPERATURE = 0.3


def _random_policy(num_states, num_actions, seed):
    return np.random.default_rng(seed).dirichlet(np.ones(num_actions), size=num_states)


def test_soft_values_are_the_fixed_point():
    mdp, reward, _, params = make_problem()
    rewards, _ = reward(params)
    solution = soft_value_iteration(mdp, rewards, TEMPERATURE)
    assert solution.converged
    np.testing.assert_allclose(
        solution.value, TEMPERATURE * np.log(np.exp(solution.q / TEMPERATURE).sum(1)), rtol=1e-12
    )
    np.testing.assert_allclose(solution.q, rewards + mdp.discount * mdp.transitions @ solution.value, atol=1e-10)
    np.testing.assert_allclose(
        solution.policy, np.exp((solution.q - solution.value[:, None]) / TEMPERATURE), rtol=1e-12
    )
    np.testing.assert_allclose(solution.policy.sum(1), 1.0, rtol=1e-14)


def test_soft_value_iteration_contracts_by_the_discount():
    mdp, reward, _, params = make_problem(discount=0.7)
    rewards, _ = reward(params)
    exact = soft_value_iteration(mdp, rewards, TEMPERATURE).value
    errors = [
        np.abs(soft_value_iteration(mdp, rewards, TEMPERATURE, max_iterations=k).value - exact).max()
        for k in range(1, 30)
    ]
    assert all(later <= 0.7 * earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(errors))


def test_the_soft_optimum_is_optimal_and_attains_its_value():
    mdp, reward, _, params = make_problem()
    rewards, _ = reward(params)
    solution = soft_value_iteration(mdp, rewards, TEMPERATURE)
    own = policy_value(mdp, solution.policy, rewards, TEMPERATURE)
    np.testing.assert_allclose(own.value, solution.value, atol=1e-10)
    np.testing.assert_allclose(own.q, solution.q, atol=1e-10)
    for seed in range(20):
        other = _random_policy(mdp.num_states, mdp.num_actions, seed)
        assert (policy_value(mdp, other, rewards, TEMPERATURE).value < solution.value).all()


def test_a_small_temperature_does_not_overflow_and_tends_to_the_greedy_policy():
    mdp, reward, _, params = make_problem()
    rewards, _ = reward(params)
    solution = soft_value_iteration(mdp, 100.0 * rewards, 1e-3)
    assert solution.converged
    np.testing.assert_allclose(solution.value, solution.q.max(1), atol=1e-6)


def test_unreachable_successors_are_skipped_rightly():
    """A chain 0 → 1 → 2 → 2 with reward 1 in state 2, by hand: V(2) = (1 + τ log 2)/(1−γ) and so on back."""
    transitions = np.zeros((3, 2, 3))
    transitions[0, :, 1] = transitions[1, :, 2] = transitions[2, :, 2] = 1.0
    mdp = TabularMDP(transitions, np.array([1.0, 0.0, 0.0]), 0.5)
    rewards = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    entropy = TEMPERATURE * np.log(2.0)
    last = (1.0 + entropy) / 0.5
    middle = entropy + 0.5 * last
    np.testing.assert_allclose(
        soft_value_iteration(mdp, rewards, TEMPERATURE).value,
        [entropy + 0.5 * middle, middle, last],
        rtol=1e-11,
    )


def test_running_out_of_iterations_is_reported():
    mdp, reward, _, params = make_problem(discount=0.99)
    rewards, jacobian = reward(params)
    solution = soft_value_iteration(mdp, rewards, TEMPERATURE, max_iterations=5)
    assert not solution.converged and solution.iterations == 5 and solution.residual > 1e-3
    with pytest.raises(ValueError, match=r"solution must have converged, got a residual of .* after 5 iterations"):
        exact_hypergradient(mdp, rewards, jacobian, rewards, temperature=TEMPERATURE, max_iterations=5)


def test_occupancy_flows_and_sums():
    mdp, reward, _, params = make_problem()
    policy = _random_policy(mdp.num_states, mdp.num_actions, 1)
    visits = occupancy(mdp, policy)
    np.testing.assert_allclose(visits.sum(), 1.0 / (1.0 - mdp.discount), rtol=1e-12)
    inflow = mdp.initial + mdp.discount * np.einsum("sa,sat->t", visits, mdp.transitions)
    np.testing.assert_allclose(visits.sum(1), inflow, rtol=1e-12)
    np.testing.assert_allclose(visits, visits.sum(1, keepdims=True) * policy, rtol=1e-12)
    rewards, _ = reward(params)
    np.testing.assert_allclose(
        expected_return(mdp, policy, rewards),
        mdp.initial @ policy_value(mdp, policy, rewards).value,
        rtol=1e-12,
    )


def test_policy_value_is_the_discounted_sum_with_entropy():
    mdp, reward, _, params = make_problem(discount=0.6)
    policy = _random_policy(mdp.num_states, mdp.num_actions, 2)
    policy[0] = [1.0, 0.0, 0.0]  # no entropy here, and no log of zero
    rewards, _ = reward(params)
    bonus = -(policy * np.log(np.where(policy > 0, policy, 1.0))).sum(1)
    value = np.zeros(mdp.num_states)
    for _ in range(100):
        value = (policy * (rewards + 0.6 * mdp.transitions @ value)).sum(1) + TEMPERATURE * bonus
    np.testing.assert_allclose(policy_value(mdp, policy, rewards, TEMPERATURE).value, value, rtol=1e-12)


def test_policy_vjp_of_any_function_of_the_policy():
    """½‖π‖², the upper objective of RandMDP, which no reward of the upper level could express."""
    mdp, reward, _, params = make_problem()

    def objective(flat):
        rewards = flat.reshape(mdp.num_states, mdp.num_actions)
        return 0.5 * np.sum(soft_value_iteration(mdp, rewards, TEMPERATURE, tolerance=1e-14).policy ** 2)

    rewards, _ = reward(params)
    solution = soft_value_iteration(mdp, rewards, TEMPERATURE)
    numeric = central_difference(objective, rewards.ravel())
    exact = soft_policy_vjp(mdp, solution, solution.policy).ravel()
    assert np.linalg.norm(exact - numeric) <= 1e-7 * np.linalg.norm(numeric)


def test_enumeration_agrees_with_backward_induction():
    mdp, reward, _, params = make_problem(num_states=3, num_actions=2, discount=0.8)
    policy = _random_policy(3, 2, 3)
    rewards, _ = reward(params)
    horizon = 4
    value = np.zeros(3)
    for _ in range(horizon):
        value = (policy * (rewards + 0.8 * mdp.transitions @ value)).sum(1)

    trajectories = enumerate_trajectories(mdp, policy, horizon)
    assert trajectories.num_trajectories == (3 * 2) ** horizon
    assert trajectories.observations.dtype == torch.float64 and trajectories.observations.shape[1] == 3
    assert trajectories.actions.dtype == torch.int64 and trajectories.actions.shape[1:] == (1,)
    assert (trajectories.lengths == horizon).all()
    assert trajectories.weights.sum().item() == pytest.approx(1.0, abs=1e-12)
    states = trajectories.observations.argmax(1)
    step_rewards = torch.from_numpy(rewards)[states, trajectories.actions[:, 0]] * 0.8 ** trajectories.time.double()
    mean = (trajectories.weights * trajectories.sum_steps(step_rewards)).sum().item()
    assert mean == pytest.approx(float(mdp.initial @ value), rel=1e-12)


def test_each_enumerated_probability_is_the_product_along_the_trajectory():
    mdp = random_mdp(3, 2, 0.8, 5)
    policy = _random_policy(3, 2, 5)
    trajectories = enumerate_trajectories(mdp, policy, 3)
    states = trajectories.observations.argmax(1).reshape(-1, 3).numpy()
    actions = trajectories.actions.reshape(-1, 3).numpy()
    seen = set()
    for row, chosen, weight in zip(states, actions, trajectories.weights.tolist(), strict=True):
        product = mdp.initial[row[0]] * policy[row, chosen].prod()
        product *= mdp.transitions[row[:-1], chosen[:-1], row[1:]].prod()
        assert weight == pytest.approx(product, rel=1e-12)
        seen.add((*row, *chosen))
    assert len(seen) == len(states)


def test_branches_of_probability_zero_are_dropped():
    transitions = np.zeros((2, 2, 2))
    transitions[:, 0, 0] = transitions[:, 1, 1] = 1.0  # the action chooses the state
    mdp = TabularMDP(transitions, np.array([1.0, 0.0]), 0.9)
    trajectories = enumerate_trajectories(mdp, np.array([[0.25, 0.75], [0.0, 1.0]]), 2)
    assert trajectories.weights.tolist() == pytest.approx([0.0625, 0.1875, 0.75])
    assert trajectories.actions[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert trajectories.observations.argmax(1).tolist() == [0, 0, 0, 0, 0, 1]


def test_too_many_trajectories_are_refused_before_any_is_made():
    mdp = random_mdp(10, 5, 0.9, 0)
    with pytest.raises(ValueError, match="horizon must leave at most"):
        enumerate_trajectories(mdp, _random_policy(10, 5, 0), 30)


def test_random_mdp_is_reproducible():
    first, again, other = random_mdp(4, 2, 0.9, 1), random_mdp(4, 2, 0.9, 1), random_mdp(4, 2, 0.9, 2)
    np.testing.assert_array_equal(first.transitions, again.transitions)
    np.testing.assert_array_equal(first.initial, again.initial)
    assert not np.array_equal(first.transitions, other.transitions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"transitions": np.ones((2, 3, 4)) / 4},
            r"transitions must have shape \(S, A, S\), got \(2, 3, 4\)",
        ),
        ({"transitions": np.ones((2, 3, 2))}, "transitions must sum to 1"),
        ({"transitions": np.tile([1.5, -0.5], (2, 3, 1))}, "transitions must hold probabilities, got -0.5"),
        ({"initial": np.array([1.0])}, r"initial must have shape \(2,\), got \(1,\)"),
        ({"initial": np.array([0.5, 0.6])}, "initial must sum to 1"),
        ({"discount": 1.0}, "discount must satisfy 0 <= discount < 1, got 1.0"),
        ({"discount": float("nan")}, "discount must satisfy"),
    ],
)
def test_bad_mdps_are_refused(change, message):
    good: dict[str, Any] = {
        "transitions": np.full((2, 3, 2), 0.5),
        "initial": np.array([0.5, 0.5]),
        "discount": 0.9,
    }
    TabularMDP(**good)
    with pytest.raises(ValueError, match=message):
        TabularMDP(**{**good, **change})


def test_bad_arguments_are_refused():
    mdp = random_mdp(3, 2, 0.9, 0)
    policy = _random_policy(3, 2, 0)
    rewards = np.zeros((3, 2))
    with pytest.raises(NonFiniteError, match="rewards must be finite, got nan"):
        soft_value_iteration(mdp, np.full((3, 2), np.nan), TEMPERATURE)
    with pytest.raises(ValueError, match=r"rewards must have shape \(3, 2\), got \(2, 3\)"):
        policy_value(mdp, policy, rewards.T)
    with pytest.raises(ValueError, match="temperature must be positive"):
        soft_value_iteration(mdp, rewards, 0.0)
    with pytest.raises(ValueError, match="policy must sum to 1"):
        occupancy(mdp, 2 * policy)
    with pytest.raises(ValueError, match="horizon must be at least 1, got 0"):
        enumerate_trajectories(mdp, policy, 0)
    with pytest.raises(ValueError, match=r"reward_jacobian must have shape \(S, A, P\), got \(3, 2\)"):
        exact_hypergradient(mdp, rewards, rewards, rewards, temperature=1.0)
    with pytest.raises(ValueError, match=r"upper_reward_jacobian must have shape \(3, 2, 4\) as reward_jacobian has"):
        exact_hypergradient(
            mdp,
            rewards,
            np.zeros((3, 2, 4)),
            rewards,
            temperature=1.0,
            upper_reward_jacobian=np.zeros((3, 2, 5)),
        )


def test_a_missing_numba_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(MissingExtraError, match=r"parl-core\[numba\]"):
        soft_value_iteration(random_mdp(3, 2, 0.9, 0), np.zeros((3, 2)), TEMPERATURE)


def test_solution_is_plain_data():
    mdp, reward, _, params = make_problem()
    solution = soft_value_iteration(mdp, reward(params)[0], TEMPERATURE)
    assert isinstance(solution, SoftSolution) and solution.temperature == TEMPERATURE
    assert solution.q.dtype == solution.value.dtype == solution.policy.dtype == np.float64


def _ending_mdp():
    """Two states; state 0 goes to 1 or, with probability .25, ends; every step from 1 ends."""
    transitions = np.zeros((2, 2, 2))
    transitions[0, :, 1] = 0.75
    return TabularMDP(transitions, np.array([1.0, 0.0]), 0.8)


def test_episodes_may_end():
    mdp, policy = _ending_mdp(), np.full((2, 2), 0.5)
    np.testing.assert_array_equal(mdp.ends, [[0.25, 0.25], [1.0, 1.0]])
    assert (random_mdp(7, 3, 0.9, 0).ends == 0.0).all()  # sums that are off by rounding do not end anything
    np.testing.assert_allclose(occupancy(mdp, policy).sum(1), [1.0, 0.8 * 0.75])
    rewards = np.array([[1.0, 3.0], [10.0, 20.0]])
    value = policy_value(mdp, policy, rewards, temperature=0.1).value
    np.testing.assert_allclose(value, [2.0 + 0.1 * np.log(2) + 0.6 * value[1], 15.0 + 0.1 * np.log(2)])
    assert expected_return(mdp, policy, rewards) == pytest.approx(2.0 + 0.6 * 15.0)


def test_no_entropy_is_counted_after_the_end():
    mdp, rewards = _ending_mdp(), np.array([[1.0, 3.0], [10.0, 20.0]])
    for solve in (soft_value_iteration, soft_policy_iteration):
        solution = solve(mdp, rewards, 5.0)
        last = 5.0 * np.log(np.exp(10.0 / 5) + np.exp(20.0 / 5))
        np.testing.assert_allclose(solution.value[1], last, rtol=1e-12)
        q = rewards[0] + 0.8 * 0.75 * last
        np.testing.assert_allclose(solution.value[0], 5.0 * np.log(np.exp(q / 5).sum()), rtol=1e-12)


def test_rows_above_one_and_endings_in_an_enumeration_are_refused():
    with pytest.raises(ValueError, match="must sum to 1, or less where episodes end, along its last axis"):
        TabularMDP(np.full((2, 1, 2), 0.6), np.array([1.0, 0.0]), 0.9)
    with pytest.raises(ValueError, match="initial must sum to 1 along"):
        TabularMDP(np.full((2, 1, 2), 0.4), np.array([0.5, 0.0]), 0.9)
    with pytest.raises(ValueError, match="must not end episodes by itself"):
        enumerate_trajectories(_ending_mdp(), np.full((2, 2), 0.5), 2)


@pytest.mark.parametrize("dynamics", ["dense", "sparse", "deterministic"])
def test_policy_iteration_is_value_iteration_by_newtons_method(dynamics):
    mdp, reward, _, params = make_problem(num_states=9, discount=0.95, dynamics=dynamics)
    rewards, _ = reward(params)
    for temperature in (1e-3, 0.3, 10.0):
        slow = soft_value_iteration(mdp, rewards, temperature)
        fast = soft_policy_iteration(mdp, rewards, temperature)
        assert fast.converged and fast.iterations < 20 < slow.iterations
        np.testing.assert_allclose(fast.value, slow.value, rtol=1e-9)
        np.testing.assert_allclose(fast.policy, slow.policy, atol=1e-6)
    with pytest.raises(ValueError, match="temperature must be positive"):
        soft_policy_iteration(mdp, rewards, 0.0)
