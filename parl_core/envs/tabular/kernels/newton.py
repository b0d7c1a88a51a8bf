"""Compiled linear algebra of sparse MDPs: banded factors of I − γ P_π, and Newton's method for the max-entropy optimum.

A map whose states are numbered row by row leads from a state only to states nearby, so I − γ P_π is a band. It is strictly
diagonally dominant by rows, so elimination needs no pivots; with all states within reach of each other the band is the
whole matrix and nothing is lost but speed.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_MOST_NEWTON_STEPS = 1000


@njit(cache=True)
def bandwidth(starts, successors, num_actions):
    """Largest |s' − s| over all transitions of an MDP in compressed rows."""
    widest = 0
    for row in range(len(starts) - 1):
        for k in range(starts[row], starts[row + 1]):
            widest = max(widest, abs(successors[k] - row // num_actions))
    return widest


@njit(cache=True)
def factorise(policy, starts, successors, probabilities, discount, factors):
    """L and U of I − γ P_π into `factors` (S, 2 band + 1)."""
    num_states, num_actions = policy.shape
    band = factors.shape[1] // 2
    factors[:] = 0.0
    for state in range(num_states):
        factors[state, band] = 1.0
        for action in range(num_actions):
            row = state * num_actions + action
            for k in range(starts[row], starts[row + 1]):
                factors[state, successors[k] - state + band] -= discount * policy[state, action] * probabilities[k]
    factorise_matrix(factors)


@njit(cache=True)
def factorise_matrix(factors):
    """L and U of a banded matrix in its place: entry (s, s') stands in column s' − s + band of `factors` (S, 2 band + 1)."""
    num_states, band = len(factors), factors.shape[1] // 2
    for pivot in range(num_states):
        inverse = 1.0 / factors[pivot, band]
        for row in range(pivot + 1, min(num_states, pivot + band + 1)):
            factor = factors[row, pivot - row + band] * inverse
            if factor != 0.0:
                factors[row, pivot - row + band] = factor
                for step in range(1, min(num_states - pivot, band + 1)):
                    factors[row, pivot - row + band + step] -= factor * factors[pivot, band + step]


@njit(cache=True)
def solve(factors, vector):
    """vector ← (I − γ P_π)⁻¹ vector: values from rewards."""
    num_states, band = len(vector), factors.shape[1] // 2
    for row in range(num_states):
        for column in range(max(0, row - band), row):
            vector[row] -= factors[row, column - row + band] * vector[column]
    for row in range(num_states - 1, -1, -1):
        for column in range(row + 1, min(num_states, row + band + 1)):
            vector[row] -= factors[row, column - row + band] * vector[column]
        vector[row] /= factors[row, band]


@njit(cache=True)
def solve_transposed(factors, vector):
    """vector ← (I − γ P_π)⁻ᵀ vector: visits from first states."""
    num_states, band = len(vector), factors.shape[1] // 2
    for row in range(num_states):
        vector[row] /= factors[row, band]
        for column in range(row + 1, min(num_states, row + band + 1)):
            vector[column] -= factors[row, column - row + band] * vector[row]
    for row in range(num_states - 1, -1, -1):
        for column in range(max(0, row - band), row):
            vector[column] -= factors[row, column - row + band] * vector[row]


@njit(cache=True)
def soft_optimum(rewards, temperature, discount, starts, successors, probabilities, tolerance, value, policy, factors):
    """The max-entropy optimum by soft policy iteration, Newton's method on V = τ log Σ_a exp((r + γ P V)/τ).

    Args: rewards (S,A); value (S,) is the start and becomes V, policy (S,A) and factors (S, 2 band + 1) are overwritten
    with π* and the factors of I − γ P_π*. Stops once max|ΔV| ≤ tolerance·max(1, max|V|). Returns: linear solves made, last
    max|ΔV|.
    """
    num_states, num_actions = policy.shape
    updated = np.empty(num_states)
    residual = np.inf
    for step in range(_MOST_NEWTON_STEPS):
        for state in range(num_states):
            highest = -np.inf
            for action in range(num_actions):
                row = state * num_actions + action
                expected = 0.0
                for k in range(starts[row], starts[row + 1]):
                    expected += probabilities[k] * value[successors[k]]
                policy[state, action] = rewards[state, action] + discount * expected
                highest = max(highest, policy[state, action])
            total, mean = 0.0, 0.0
            for action in range(num_actions):
                excess = (policy[state, action] - highest) / temperature
                policy[state, action] = np.exp(excess)
                total += policy[state, action]
                mean += policy[state, action] * excess
            updated[state] = temperature * (np.log(total) - mean / total)  # the entropy's part
            for action in range(num_actions):
                policy[state, action] /= total
                updated[state] += policy[state, action] * rewards[state, action]
        factorise(policy, starts, successors, probabilities, discount, factors)
        solve(factors, updated)
        residual, scale = 0.0, 1.0
        for state in range(num_states):
            residual = max(residual, abs(updated[state] - value[state]))
            scale = max(scale, abs(updated[state]))
            value[state] = updated[state]
        if residual <= tolerance * scale:
            return step + 1, residual
    return _MOST_NEWTON_STEPS, residual
