"""The loops of the tabular MDPs, compiled by numba."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def compressed_rows(transitions):
    """The positive entries of P(·|s,a), row after row: most problems reach a handful of states from each.

    Args: transitions (S,A,S). Returns: starts (S·A+1,) of each row, successors (n,), probabilities (n,).
    """
    num_states, num_actions, _ = transitions.shape
    starts = np.empty(num_states * num_actions + 1, np.int64)
    successors = np.empty(transitions.size, np.int64)
    probabilities = np.empty(transitions.size, np.float64)
    count = 0
    for state in range(num_states):
        for action in range(num_actions):
            starts[state * num_actions + action] = count
            for successor in range(num_states):
                if transitions[state, action, successor] > 0.0:
                    successors[count] = successor
                    probabilities[count] = transitions[state, action, successor]
                    count += 1
    starts[num_states * num_actions] = count
    return starts, successors[:count].copy(), probabilities[:count].copy()


@njit(cache=True)
def iterate_soft_values(transitions, rewards, discount, temperature, tolerance, max_iterations):
    """V ← τ log Σ_a exp((r + γ P V)/τ) from V = 0, until max|ΔV| ≤ tolerance·max(1, max|V|).

    Args: transitions (S,A,S), rewards (S,A), all float64. Returns: value (S,), iterations made, last max|ΔV|.
    """
    num_states, num_actions, _ = transitions.shape
    starts, successors, probabilities = compressed_rows(transitions)
    value = np.zeros(num_states)
    updated = np.empty(num_states)
    q = np.empty(num_actions)
    residual = np.inf
    for iteration in range(max_iterations):
        residual = 0.0
        scale = 1.0
        for state in range(num_states):
            highest = -np.inf
            for action in range(num_actions):
                row = state * num_actions + action
                expected = 0.0
                for k in range(starts[row], starts[row + 1]):
                    expected += probabilities[k] * value[successors[k]]
                q[action] = rewards[state, action] + discount * expected
                highest = max(highest, q[action])
            total = 0.0
            for action in range(num_actions):
                total += np.exp((q[action] - highest) / temperature)
            updated[state] = highest + temperature * np.log(total)
            residual = max(residual, abs(updated[state] - value[state]))
            scale = max(scale, abs(updated[state]))
        value, updated = updated, value
        if residual <= tolerance * scale:
            return value, iteration + 1, residual
    return value, max_iterations, residual


@njit(cache=True)
def iterate_amd(
    transitions,
    rewards,
    jacobian,
    upper_rewards,
    upper_jacobian,
    discount,
    temperature,
    tolerance,
    max_iterations,
    scalars,
    slopes,
):
    """The sweeps of `iteration`, until the largest relative change is at most `tolerance`.

    Args: transitions (S,A,S), rewards and upper_rewards (S,A), jacobian (S,A,P), upper_jacobian (S,A,P) or (S,A,0) if
    the upper reward is fixed, scalars (2,S) = V and V_U, slopes (3,S,P) = ∇V, ∇V_U through r_U and ∇V_U through π; all
    float64, and the last two are overwritten. Returns: scalars, slopes, iterations made, last residual.
    """
    num_states, num_actions, _ = transitions.shape
    num_params = jacobian.shape[2]
    has_direct = upper_jacobian.shape[2] > 0
    starts, successors, probabilities = compressed_rows(transitions)
    next_scalars, next_slopes = np.zeros_like(scalars), np.zeros_like(slopes)
    q, upper_q, policy = np.empty(num_actions), np.empty(num_actions), np.empty(num_actions)
    q_slope = np.empty(num_params)
    residual = np.inf
    for iteration in range(max_iterations):
        next_slopes[:] = 0.0
        for state in range(num_states):
            highest = -np.inf
            for action in range(num_actions):
                row = state * num_actions + action
                expected, upper_expected = 0.0, 0.0
                for k in range(starts[row], starts[row + 1]):
                    expected += probabilities[k] * scalars[0, successors[k]]
                    upper_expected += probabilities[k] * scalars[1, successors[k]]
                q[action] = rewards[state, action] + discount * expected
                upper_q[action] = upper_rewards[state, action] + discount * upper_expected
                highest = max(highest, q[action])
            total = 0.0
            for action in range(num_actions):
                policy[action] = np.exp((q[action] - highest) / temperature)
                total += policy[action]
            policy /= total
            upper_value = 0.0
            for action in range(num_actions):
                upper_value += policy[action] * upper_q[action]
            next_scalars[0, state] = highest + temperature * np.log(total)
            next_scalars[1, state] = upper_value
            for action in range(num_actions):
                row = state * num_actions + action
                q_slope[:] = jacobian[state, action]
                for k in range(starts[row], starts[row + 1]):
                    weight, successor = discount * probabilities[k], successors[k]
                    for p in range(num_params):
                        q_slope[p] += weight * slopes[0, successor, p]
                        next_slopes[2, state, p] += policy[action] * weight * slopes[2, successor, p]
                    if has_direct:
                        for p in range(num_params):
                            next_slopes[1, state, p] += policy[action] * weight * slopes[1, successor, p]
                response = policy[action] * (upper_q[action] - upper_value) / temperature
                for p in range(num_params):
                    next_slopes[0, state, p] += policy[action] * q_slope[p]
                    next_slopes[2, state, p] += response * q_slope[p]
                if has_direct:
                    for p in range(num_params):
                        next_slopes[1, state, p] += policy[action] * upper_jacobian[state, action, p]
        residual = max(_relative_change(next_scalars, scalars), _relative_change(next_slopes, slopes))
        scalars, next_scalars = next_scalars, scalars
        slopes, next_slopes = next_slopes, slopes
        if residual <= tolerance:
            return scalars, slopes, iteration + 1, residual
    return scalars, slopes, max_iterations, residual


@njit(cache=True)
def _relative_change(updated, before):
    """The largest over the first axis of max|updated − before| / max(1, max|updated|)."""
    worst = 0.0
    for kind in range(len(updated)):
        change, scale = 0.0, 1.0
        new, old = updated[kind].ravel(), before[kind].ravel()
        for k in range(new.size):
            change = max(change, abs(new[k] - old[k]))
            scale = max(scale, abs(new[k]))
        worst = max(worst, change / scale)
    return worst
