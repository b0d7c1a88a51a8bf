"""The loops of `tabular`, compiled by numba."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def iterate_soft_values(transitions, rewards, discount, temperature, tolerance, max_iterations):
    """V ← τ log Σ_a exp((r + γ P V)/τ) from V = 0, until max|ΔV| ≤ tolerance·max(1, max|V|).

    Args: transitions (S,A,S), rewards (S,A), all float64. Returns: value (S,), iterations made, last max|ΔV|.
    """
    num_states, num_actions, _ = transitions.shape
    # Compressed rows: most problems reach a handful of states from each state, whatever S is.
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
