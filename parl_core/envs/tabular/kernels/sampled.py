"""Compiled estimators of a tabular hypergradient from trajectories; `sampled` is their door and says what they compute.

Episodes are flat arrays: states and actions (T,), and `last` (T,), which is GOES_ON within an episode, ENDED at a step with
which the MDP ended it, and CUT at one after which it was not followed any further. Estimators write `by_reward` (S,A), their
estimate of ∂f/∂r(s,a) through the policy: the implicit term is its product with ∇_ν r.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .newton import factorise_matrix, solve, solve_transposed

GOES_ON, ENDED, CUT = 0, 1, 2
_CELLS = 128
_SEARCH = -(2**31)
_ROUNDING = 1e-9  # what successors' probabilities may lack of 1 without meaning an end


@njit(cache=True)
def seed_numba(seed):
    """Seed the random numbers of compiled code, which are not NumPy's."""
    np.random.seed(seed)


@njit(cache=True)
def sample_episodes(policy, first_state, starts, successors, probabilities, horizon, states, actions, last):
    """Fill the three arrays with episodes from `first_state`, one after the other, each cut after `horizon` steps.

    One uniform number decides action and successor together. Their outcomes lie one after the other on the unit interval,
    which is cut into _CELLS cells: most cells lie within one outcome, which a table gives; the others are searched.
    """
    num_states = len(policy)
    table = _outcomes_of_cells(policy, starts, successors, probabilities)
    state, length = first_state, 0
    for t in range(len(states)):
        draw = np.random.random()
        outcome = table[state, int(draw * _CELLS)]
        if outcome == _SEARCH:
            outcome = _outcome_at(draw, state, policy, starts, successors, probabilities)
        length += 1
        states[t], last[t] = state, GOES_ON
        if outcome < 0:
            actions[t], last[t] = -1 - outcome, ENDED
        else:
            actions[t] = outcome // num_states
            state = outcome - actions[t] * num_states
            if length == horizon or t == len(states) - 1:
                last[t] = CUT
        if last[t] != GOES_ON:
            state, length = first_state, 0


@njit(cache=True)
def _outcomes_of_cells(policy, starts, successors, probabilities):
    """(S, _CELLS): the outcome that fills the cell, action·S + successor, or −1 − action if the episode ends; or _SEARCH."""
    num_states, num_actions = policy.shape
    table = np.full((num_states, _CELLS), _SEARCH, np.int32)
    for state in range(num_states):
        begin = 0.0
        for action in range(num_actions):
            row = state * num_actions + action
            left = policy[state, action]
            for k in range(starts[row], starts[row + 1]):
                share = policy[state, action] * probabilities[k]
                left -= share
                for cell in range(int(np.ceil(begin * _CELLS)), int((begin + share) * _CELLS)):
                    table[state, cell] = action * num_states + successors[k]
                begin += share
            if left > _ROUNDING * policy[state, action]:
                for cell in range(int(np.ceil(begin * _CELLS)), min(_CELLS, int((begin + left) * _CELLS))):
                    table[state, cell] = -1 - action
                begin += left
    return table


@njit(cache=True)
def _outcome_at(draw, state, policy, starts, successors, probabilities):
    """The outcome, as in the table, at this place of the unit interval."""
    num_states, num_actions = policy.shape
    outcome = 0
    for action in range(num_actions):
        row = state * num_actions + action
        left = policy[state, action]
        for k in range(starts[row], starts[row + 1]):
            share = policy[state, action] * probabilities[k]
            left -= share
            if share > 0.0:
                outcome = action * num_states + successors[k]
            if draw < share:
                return outcome
            draw -= share
        if left > _ROUNDING * policy[state, action]:
            outcome = -1 - action
            if draw < left:
                return outcome
            draw -= left
    return outcome  # beyond the last by rounding


@njit(cache=True)
def discounted_visits(states, actions, last, discount, visits):
    """Mean over episodes of Σ_t γ^t 1{s_t = s, a_t = a}, (S,A); returns the number of episodes."""
    visits[:] = 0.0
    num_episodes, power = 0, 1.0
    for t in range(len(states)):
        visits[states[t], actions[t]] += power
        power *= discount
        if last[t] != GOES_ON:
            num_episodes += 1
            power = 1.0
    visits /= num_episodes
    return num_episodes


@njit(cache=True)
def halfway(last):
    """The step at which the episode in the middle begins."""
    half, split, seen = np.count_nonzero(last) // 2, 0, 0
    while seen < half:
        seen += last[split] != GOES_ON
        split += 1
    return split


@njit(cache=True)
def _upper_weights(states, actions, last, upper_rewards, discount, temperature):
    """γ^t A_U(s_t, a_t)/(τ n) for every step (T,), A_U from averages of the discounted rewards that follow visits; and how
    often each (s, a) is visited (S,A)."""
    num_states, num_actions = upper_rewards.shape
    counts, q = np.zeros((num_states, num_actions)), np.zeros((num_states, num_actions))
    total, num_episodes = 0.0, 0
    for t in range(len(states) - 1, -1, -1):
        if last[t] != GOES_ON:
            total = 0.0
            num_episodes += 1
        total = upper_rewards[states[t], actions[t]] + discount * total
        counts[states[t], actions[t]] += 1.0
        q[states[t], actions[t]] += total
    for state in range(num_states):
        value, visits = 0.0, 0.0
        for action in range(num_actions):
            value += q[state, action]
            visits += counts[state, action]
        for action in range(num_actions):
            if counts[state, action] > 0.0:
                q[state, action] = q[state, action] / counts[state, action] - value / visits
    weights = np.empty(len(states))
    power = 1.0
    for t in range(len(states)):
        weights[t] = power * q[states[t], actions[t]] / (temperature * num_episodes)
        power = discount * power if last[t] == GOES_ON else 1.0
    return weights, counts


@njit(cache=True)
def _add_suffixes(states, actions, last, weights, discount, by_reward):
    """by_reward += Σ_t weight_t Σ_{k ≥ t} γ^{k−t} 1{s_k, a_k}, the sums along each episode."""
    running = 0.0
    for t in range(len(states)):
        running = discount * running + weights[t]
        by_reward[states[t], actions[t]] += running
        if last[t] != GOES_ON:
            running = 0.0


@njit(cache=True)
def hpgd_by_reward(states, actions, last, upper_rewards, discount, temperature, by_reward):
    """HPGD: Σ_t γ^t A_U (∇Q − ∇V)/τ, all four averaged over the visits to (s, a) and to s."""
    weights, counts = _upper_weights(states, actions, last, upper_rewards, discount, temperature)
    by_pair = np.zeros(upper_rewards.shape)
    for t in range(len(states)):
        by_pair[states[t], actions[t]] += weights[t]
    for t in range(len(states)):
        state, action = states[t], actions[t]
        weights[t] = by_pair[state, action] / counts[state, action] - by_pair[state].sum() / counts[state].sum()
    by_reward[:] = 0.0
    _add_suffixes(states, actions, last, weights, discount, by_reward)


@njit(cache=True)
def bc_hg_by_reward(states, actions, last, upper_rewards, discount, temperature, by_reward):
    """BC-HG: Σ_t γ^t A_U/τ times the discounted ∇r that follow along the same episode, A_U averaged over visits."""
    weights, _ = _upper_weights(states, actions, last, upper_rewards, discount, temperature)
    by_reward[:] = 0.0
    _add_suffixes(states, actions, last, weights, discount, by_reward)


@njit(cache=True)
def sobirl_by_reward(states, actions, last, upper_rewards, discount, temperature, by_reward):
    """SoBiRL's shortcut: Σ_t γ^t A_U/τ times ∇r of the same step alone."""
    weights, _ = _upper_weights(states, actions, last, upper_rewards, discount, temperature)
    by_reward[:] = 0.0
    for t in range(len(states)):
        by_reward[states[t], actions[t]] += weights[t]


@njit(cache=True)
def fisher_by_reward(states, actions, last, policy, upper_rewards, discount, temperature, split, by_reward):
    """The implicit function theorem with H = −τ F_d: b from the steps before `split`, where an episode begins, H and the
    cross term from those after it.

    b(s, a) is a mean over episodes of Σ_t γ^t (G_t − V(s_t)) times the score, G_t the discounted upper rewards from t on and
    V their mean over visits. The Fisher blocks d(s) (diag π − π πᵀ) are inverted in closed form: a score times F⁻¹ b is
    b(s, a)/(d(s) π(a|s)), since b sums to zero over actions.
    """
    num_states, num_actions = policy.shape
    value, visits = np.zeros(num_states), np.zeros(num_states)
    total, num_upper = 0.0, 0
    returns = np.empty(split)
    for t in range(split - 1, -1, -1):
        if last[t] != GOES_ON:
            total = 0.0
            num_upper += 1
        total = upper_rewards[states[t], actions[t]] + discount * total
        returns[t] = total
        value[states[t]] += total
        visits[states[t]] += 1.0
    response = np.zeros((num_states, num_actions))  # b, then F⁻¹ b
    power = 1.0
    for t in range(split):
        state = states[t]
        weight = power * (returns[t] - value[state] / visits[state]) / num_upper
        response[state, actions[t]] += weight
        for action in range(num_actions):
            response[state, action] -= weight * policy[state, action]
        power = discount * power if last[t] == GOES_ON else 1.0
    occupied = np.zeros(num_states)
    power, num_lower, longest, time = 1.0, 0, 0, 0
    for t in range(split, len(states)):
        occupied[states[t]] += power
        power *= discount
        time += 1
        longest = max(longest, time)
        if last[t] != GOES_ON:
            num_lower += 1
            power, time = 1.0, 0
    for state in range(num_states):
        for action in range(num_actions):
            if occupied[state] > 0.0 and response[state, action] != 0.0:
                scale = temperature * occupied[state] / num_lower * policy[state, action]
                response[state, action] /= scale
            else:
                response[state, action] = 0.0
    # the score sums S_{0:h}·w of each episode, less their mean over episodes at each time; an ended episode keeps its last
    mean = np.zeros(longest)
    time = 0
    for t in range(split, len(states)):
        mean[time] += response[states[t], actions[t]] / num_lower
        time = time + 1 if last[t] == GOES_ON else 0
    mean = np.cumsum(mean)
    by_reward[:] = 0.0
    running, power, time = 0.0, 1.0 / (num_lower - 1), 0
    for t in range(split, len(states)):
        running += response[states[t], actions[t]]
        by_reward[states[t], actions[t]] += power * (running - mean[time])
        power *= discount
        time += 1
        if last[t] != GOES_ON:
            running, power, time = 0.0, 1.0 / (num_lower - 1), 0


@njit(cache=True)
def certainty_equivalent_by_reward(
    states, actions, last, first_state, upper_rewards, discount, temperature, factors, by_reward, visits
):
    """The exact implicit term of the MDP and policy whose probabilities are the frequencies in the episodes.

    Where an episode was cut, the last step says nothing of where it leads and is left out. `factors` (S, 2 band + 1) is
    overwritten with those of I − γ P̂, `visits` (S,A) with the occupancy.
    """
    num_states, num_actions = upper_rewards.shape
    band = factors.shape[1] // 2
    counts = np.zeros((num_states, num_actions))
    for t in range(len(states)):
        if last[t] != CUT:
            counts[states[t], actions[t]] += 1.0
    state_counts = np.zeros(num_states)
    value, occupied = np.zeros(num_states), np.zeros(num_states)
    factors[:] = 0.0
    for state in range(num_states):
        factors[state, band] = 1.0
        for action in range(num_actions):
            state_counts[state] += counts[state, action]
            value[state] += counts[state, action] * upper_rewards[state, action]
        if state_counts[state] > 0.0:
            value[state] /= state_counts[state]
    for t in range(len(states)):
        if last[t] == GOES_ON:
            factors[states[t], states[t + 1] - states[t] + band] -= discount / state_counts[states[t]]
    factorise_matrix(factors)
    solve(factors, value)
    occupied[first_state] = 1.0
    solve_transposed(factors, occupied)

    # by_reward ← d π̂ (Q_U − V_U)/τ, the response of the policy to its action values
    by_reward[:] = 0.0
    for t in range(len(states)):
        if last[t] == GOES_ON:
            by_reward[states[t], actions[t]] += discount * value[states[t + 1]]
    adjoint = np.zeros(num_states)
    for state in range(num_states):
        for action in range(num_actions):
            visits[state, action] = 0.0
            if counts[state, action] > 0.0:
                visits[state, action] = occupied[state] * counts[state, action] / state_counts[state]
                q = upper_rewards[state, action] + by_reward[state, action] / counts[state, action]
                by_reward[state, action] = visits[state, action] * (q - value[state]) / temperature
    # and what successors' values, which count the same, carry on
    for t in range(len(states)):
        if last[t] == GOES_ON:
            state, action = states[t], actions[t]
            adjoint[states[t + 1]] += discount * by_reward[state, action] / counts[state, action]
    solve_transposed(factors, adjoint)
    for state in range(num_states):
        for action in range(num_actions):
            if counts[state, action] > 0.0:
                by_reward[state, action] += adjoint[state] * counts[state, action] / state_counts[state]
