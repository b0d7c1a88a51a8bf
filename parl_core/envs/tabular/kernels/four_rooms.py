"""The leader's ascent on Four-Rooms, compiled: `four_rooms_ascent` is its door and says what the estimators are.

All rewards of Four-Rooms are of the state alone. What an estimator gives is therefore the implicit term's gradient in the
follower's reward by state (S,), and the discounted arrivals at the goal, which the direct term is made of.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from ..mdp import Array
from .newton import soft_optimum, solve, solve_transposed
from .sampled import (
    bc_hg_by_reward,
    certainty_equivalent_by_reward,
    discounted_visits,
    fisher_by_reward,
    halfway,
    hpgd_by_reward,
    sample_episodes,
    sobirl_by_reward,
)

EXACT, AMD, LOG_PROB_HESSIAN, IDENTITY, UNROLLED, SOBIRL, NUDGED_CONTRAST, VALUE_PENALTY, ZERO_ORDER, DIRECT_ONLY = (
    range(10)
)
HPGD, BC_HG, FISHER, CERTAINTY_EQUIVALENT = range(10, 14)

UNROLLED_STEPS = 50
EXACT_NUDGE, SAMPLED_NUDGE = 0.1, 1.0  # of the contrasts: r_U/β in units of the temperature, so β = 1/(nudge·λ)
EXACT_RADIUS, SAMPLED_RADIUS = 0.01, 0.5  # of zero-order differences, in units of the weights
_TOLERANCE = 1e-11


class Scene(NamedTuple):
    """The way to one goal: an MDP in compressed rows, and the numbers of both rewards."""

    starts: Array
    successors: Array
    probabilities: Array
    discount: float
    first_state: int
    goal: int
    target: int
    budget: float
    cost: float
    horizon: int


class Work(NamedTuple):
    """Arrays that every step overwrites."""

    rewards: Array
    """(S, A), the follower's."""
    upper: Array
    """(S, A), the leader's."""
    policy: Array
    """(S, A)."""
    factors: Array
    """(S, 2 band + 1), of I − γ P_π."""
    visits: Array
    """(S, A), discounted."""
    by_state: Array
    """(S,), the implicit term."""
    states: Array
    actions: Array
    last: Array
    """(T,), episodes; empty if all is exact."""
    residual: Array
    """(1,), the largest residual that an optimum was left with, as a share of max(1, max|V|)."""


@njit(cache=True)
def softmax(weights):
    """Shares of the budget (S+1,)."""
    shares = np.exp(weights - weights.max())
    return shares / shares.sum()


@njit(cache=True)
def set_rewards(scene, work, shares):
    """Both rewards when the weights' softmax is `shares` (S+1,)."""
    num_states = len(work.rewards)
    for state in range(num_states):
        work.rewards[state, :] = -scene.budget * shares[state]
        work.upper[state, :] = 0.0
    work.rewards[scene.goal, :] = 1.0
    work.upper[scene.target, :] = 1.0
    work.upper[scene.goal, :] -= scene.cost * scene.budget * (1.0 - shares[num_states])


@njit(cache=True)
def respond(scene, work, rewards, temperature, value):
    """The follower's optimum for these rewards, from the values (S,) of an earlier one."""
    _, residual = soft_optimum(
        rewards,
        temperature,
        scene.discount,
        scene.starts,
        scene.successors,
        scene.probabilities,
        _TOLERANCE,
        value,
        work.policy,
        work.factors,
    )
    work.residual[0] = max(work.residual[0], residual / max(1.0, np.abs(value).max()))


@njit(cache=True)
def sample(scene, work, number):
    """Episodes of the policy, in the first `number` places."""
    sample_episodes(
        work.policy,
        scene.first_state,
        scene.starts,
        scene.successors,
        scene.probabilities,
        scene.horizon,
        work.states[:number],
        work.actions[:number],
        work.last[:number],
    )


@njit(cache=True)
def upper_value(work):
    """V_U (S,)."""
    value = work.upper[:, 0].copy()  # the reward is of the state alone
    solve(work.factors, value)
    return value


@njit(cache=True)
def occupancy(scene, work, number):
    """Discounted visits of states (S,): exact, or the mean over fresh episodes of `number` steps if that is positive."""
    num_states = len(work.policy)
    if number:
        sample(scene, work, number)
        discounted_visits(work.states[:number], work.actions[:number], work.last[:number], scene.discount, work.visits)
        return work.visits.sum(axis=1)
    visits = np.zeros(num_states)
    visits[scene.first_state] = 1.0
    solve_transposed(work.factors, visits)
    return visits


@njit(cache=True)
def exact_term(kind, scene, work, temperature, value):
    """by_state of an estimator that differentiates the optimum; returns the discounted visits (S,)."""
    num_states, num_actions = work.policy.shape
    policy, by_state = work.policy, work.by_state
    upper_values, visits = upper_value(work), occupancy(scene, work, 0)
    by_state[:] = 0.0
    if kind == DIRECT_ONLY:
        return visits
    response = np.zeros((num_states, num_actions))  # of f to (∇Q − ∇V)
    step = 2.0 / (temperature * visits.max())  # 1 over a bound of the largest eigenvalue of τ F_d
    for state in range(num_states):
        mean = 0.0
        for action in range(num_actions):
            row = state * num_actions + action
            for k in range(scene.starts[row], scene.starts[row + 1]):
                response[state, action] += scene.discount * scene.probabilities[k] * upper_values[scene.successors[k]]
            mean += policy[state, action] * response[state, action]
        for action in range(num_actions):
            response[state, action] -= mean  # A_U, as r_U does not depend on the action
        if kind == IDENTITY:
            for action in range(num_actions):
                response[state, action] *= (visits[state] * policy[state, action]) ** 2
        elif kind == UNROLLED:
            _unroll(response[state], policy[state], visits[state], temperature, step)
        else:
            curvature = temperature + value[state] if kind == LOG_PROB_HESSIAN else temperature
            for action in range(num_actions):
                response[state, action] *= visits[state] * policy[state, action] / curvature
    if kind != SOBIRL:
        for state in range(num_states):
            for action in range(num_actions):
                by_state[state] -= response[state, action]  # through ∇V
                row = state * num_actions + action
                for k in range(scene.starts[row], scene.starts[row + 1]):  # through ∇Q
                    by_state[scene.successors[k]] += scene.discount * scene.probabilities[k] * response[state, action]
        solve_transposed(work.factors, by_state)
    for state in range(num_states):
        by_state[state] += response[state].sum()
    return visits


@njit(cache=True)
def _unroll(response, policy, visits, temperature, step):
    """One state's A_U → d π x, x after UNROLLED_STEPS steps x ← x + step (b − τ d F x) with b = d π A_U, from zero."""
    num_actions = len(policy)
    x = np.zeros(num_actions)
    for _ in range(UNROLLED_STEPS):
        mean = 0.0
        for action in range(num_actions):
            mean += policy[action] * x[action]
        for action in range(num_actions):
            pull = response[action] - temperature * (x[action] - mean)
            x[action] += step * visits * policy[action] * pull
    for action in range(num_actions):
        response[action] = visits * policy[action] * x[action]


@njit(cache=True)
def amd_term(scene, work, temperature, scalars, slopes):
    """by_state after one sweep of Adaptive Model Design over V and V_U in scalars (2,S) and, in slopes (2,S,S), their
    derivatives in the follower's reward of each state."""
    num_states, num_actions = work.policy.shape
    before, slopes_before = scalars.copy(), slopes.copy()
    q, upper_q, policy = np.empty(num_actions), np.empty(num_actions), np.empty(num_actions)
    slopes[:] = 0.0
    for state in range(num_states):
        for action in range(num_actions):
            q[action], upper_q[action] = work.rewards[state, action], work.upper[state, action]
            row = state * num_actions + action
            for k in range(scene.starts[row], scene.starts[row + 1]):
                q[action] += scene.discount * scene.probabilities[k] * before[0, scene.successors[k]]
                upper_q[action] += scene.discount * scene.probabilities[k] * before[1, scene.successors[k]]
        highest = q.max()
        total = 0.0
        for action in range(num_actions):
            policy[action] = np.exp((q[action] - highest) / temperature)
            total += policy[action]
        policy /= total
        scalars[0, state] = highest + temperature * np.log(total)
        scalars[1, state] = (policy * upper_q).sum()
        slopes[0, state, state] = 1.0
        for action in range(num_actions):
            response = policy[action] * (upper_q[action] - scalars[1, state]) / temperature
            row = state * num_actions + action
            for k in range(scene.starts[row], scene.starts[row + 1]):
                weight, successor = scene.discount * scene.probabilities[k], scene.successors[k]
                for j in range(num_states):
                    slopes[0, state, j] += policy[action] * weight * slopes_before[0, successor, j]
                    slopes[1, state, j] += weight * (
                        policy[action] * slopes_before[1, successor, j] + response * slopes_before[0, successor, j]
                    )
            slopes[1, state, state] += response
    work.by_state[:] = slopes[1, scene.first_state]


@njit(cache=True)
def sampled_term(kind, scene, work, temperature):
    """by_state of an estimator that gets episodes, and the mean discounted visits (S,) as it has them."""
    by_reward = np.zeros(work.policy.shape)
    states, actions, last = work.states, work.actions, work.last
    if kind == CERTAINTY_EQUIVALENT:
        certainty_equivalent_by_reward(
            states,
            actions,
            last,
            scene.first_state,
            work.upper,
            scene.discount,
            temperature,
            work.factors,
            by_reward,
            work.visits,
        )
    else:
        discounted_visits(states, actions, last, scene.discount, work.visits)
        if kind == HPGD:
            hpgd_by_reward(states, actions, last, work.upper, scene.discount, temperature, by_reward)
        elif kind == BC_HG:
            bc_hg_by_reward(states, actions, last, work.upper, scene.discount, temperature, by_reward)
        elif kind == SOBIRL:
            sobirl_by_reward(states, actions, last, work.upper, scene.discount, temperature, by_reward)
        elif kind == FISHER:
            split = halfway(last)
            fisher_by_reward(
                states, actions, last, work.policy, work.upper, scene.discount, temperature, split, by_reward
            )
    for state in range(len(by_reward)):
        work.by_state[state] = by_reward[state].sum()
    return work.visits.sum(axis=1)


@njit(cache=True)
def contrast_term(two_sided, nudge, scene, work, temperature, values, number):
    """by_state from the visits of optima for r + nudge·r_U and, two-sided, r − nudge·r_U, otherwise r; returns their mean
    (S,), or the first alone. values (2,S) are warm starts."""
    below_nudge = nudge if two_sided else 0.0
    respond(scene, work, work.rewards - below_nudge * work.upper, temperature, values[0])
    below = occupancy(scene, work, number)
    respond(scene, work, work.rewards + nudge * work.upper, temperature, values[1])
    above = occupancy(scene, work, number)
    work.by_state[:] = (above - below) / (nudge + below_nudge)
    return 0.5 * (above + below) if two_sided else above


@njit(cache=True)
def objective_at(scene, work, shares, temperature, value, number):
    """f at these shares: exact, or the mean return of fresh episodes of `number` steps if that is positive."""
    set_rewards(scene, work, shares)
    respond(scene, work, work.rewards, temperature, value)
    return (occupancy(scene, work, number) * work.upper[:, 0]).sum()


@njit(cache=True)
def add_gradient(scene, work, shares, arrivals, gradient):
    """gradient (S+1,) += both terms' derivatives in the weights; `arrivals` are discounted ones at the goal."""
    num_states = len(work.by_state)
    slopes = np.zeros(num_states + 1)  # in the incentives; what is not spent has none
    for state in range(num_states):
        slopes[state] = scene.cost * arrivals
        if state != scene.goal:
            slopes[state] += work.by_state[state]
    mean = (shares * slopes).sum()
    for k in range(num_states + 1):
        gradient[k] -= scene.budget * shares[k] * (slopes[k] - mean)


@njit(cache=True)
def ascend(kind, number, seed, scenes, band, weights, temperatures, learning_rate, num_averaged, values, norms):
    """Ascend for len(temperatures) steps, in place on weights (S+1,), with one scene drawn for each and the gradient's norm
    clipped to 1.

    Args: kind, an estimator; number, environment steps it gets for an outer one, 0 if it is exact; values and norms (k,),
    filled with the exact objective before, and the gradient's norm at, every len(temperatures)/k-th step. Returns: means
    over the last `num_averaged` steps, of the exact objective over scenes and of what the estimator itself sees of it; the
    largest residual of the follower's optima.
    """
    np.random.seed(seed)
    num_states = len(weights) - 1
    shape = (num_states, (len(scenes[0].starts) - 1) // num_states)
    work = Work(
        np.empty(shape),
        np.empty(shape),
        np.empty(shape),
        np.empty((num_states, 2 * band + 1)),
        np.empty(shape),
        np.empty(num_states),
        np.empty(number, np.int64),
        np.empty(number, np.int64),
        np.empty(number, np.int64),
        np.zeros(1),
    )
    warm = np.zeros((len(scenes), 3, num_states))  # values of the optimum, and of those to either side of it
    scalars = np.zeros((len(scenes), 2, num_states))
    slopes = np.zeros((len(scenes), 2, num_states, num_states))
    direction, gradient = np.empty(num_states + 1), np.empty(num_states + 1)
    interval = max(1, len(temperatures) // max(1, len(values)))
    total, total_seen = 0.0, 0.0
    for step in range(len(temperatures)):
        temperature, shares = temperatures[step], softmax(weights)
        recorded = step % interval == 0 and step // interval < len(values)
        averaged = step >= len(temperatures) - num_averaged
        if recorded or averaged:
            objective = 0.0
            for k in range(len(scenes)):
                objective += objective_at(scenes[k], work, shares, temperature, warm[k, 0], 0) / len(scenes)
            if recorded:
                values[step // interval] = objective
            if averaged:
                total += objective / num_averaged

        k = np.random.randint(len(scenes))
        scene = scenes[k]
        gradient[:] = 0.0
        if kind == ZERO_ORDER:
            radius = SAMPLED_RADIUS if number else EXACT_RADIUS
            for j in range(num_states + 1):
                direction[j] = np.random.normal()
            seen = objective_at(scene, work, shares, temperature, warm[k, 1], number // 2)
            moved = softmax(weights + radius * direction)
            change = objective_at(scene, work, moved, temperature, warm[k, 2], number // 2) - seen
            gradient += change / radius * direction
        else:
            set_rewards(scene, work, shares)
            if kind in (NUDGED_CONTRAST, VALUE_PENALTY):
                nudge = temperature * (SAMPLED_NUDGE if number else EXACT_NUDGE)
                two_sided = kind == NUDGED_CONTRAST
                visits = contrast_term(two_sided, nudge, scene, work, temperature, warm[k, 1:], number // 2)
            else:
                respond(scene, work, work.rewards, temperature, warm[k, 0])
                if number:
                    sample(scene, work, number)
                    visits = sampled_term(kind, scene, work, temperature)
                else:
                    visits = exact_term(DIRECT_ONLY if kind == AMD else kind, scene, work, temperature, warm[k, 0])
                    if kind == AMD:
                        amd_term(scene, work, temperature, scalars[k], slopes[k])
            seen = (visits * work.upper[:, 0]).sum()
            add_gradient(scene, work, shares, visits[scene.goal], gradient)
        if averaged:
            total_seen += seen / num_averaged

        norm = np.sqrt((gradient**2).sum())
        if recorded:
            norms[step // interval] = norm
        weights += learning_rate / max(1.0, norm) * gradient
    return total, total_seen, work.residual[0]
