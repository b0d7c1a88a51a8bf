"""All trajectories of a finite MDP with their probabilities."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ...trajectories import Trajectories
from .mdp import Array, TabularMDP, checked_policy

_MAX_ENUMERATED_NUMBERS = 2**28  # entries of the observations of an enumeration: 2 GiB


def enumerate_trajectories(mdp: TabularMDP, policy: npt.ArrayLike, horizon: int) -> Trajectories:
    """All trajectories of `horizon` steps that have positive probability under `policy` (S, A).

    Returns:
        `Trajectories` with one-hot observations (T, S) float64, actions (T, 1) int64 and the exact
        probabilities as weights, which sum to 1. In lexicographic order of (s_0, a_0, s_1, a_1, …).

    Raises:
        ValueError: an MDP whose episodes end by themselves, horizon below 1, a policy that is none, or more trajectories
        than fit in memory.
    """
    policy = checked_policy(policy, mdp)
    if mdp.ends.any():
        raise ValueError(
            "mdp must not end episodes by itself to be enumerated, got rows of transitions that sum below 1"
        )
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    num = _count_trajectories(mdp, policy, horizon)
    most = _MAX_ENUMERATED_NUMBERS // (horizon * mdp.num_states)
    if num > most:
        raise ValueError(f"horizon must leave at most {most} trajectories to enumerate, got {horizon}: {num:.3g}")

    states: npt.NDArray[np.int64] = np.flatnonzero(mdp.initial)[:, None]  # (N, h+1), grows by a column each step
    actions: npt.NDArray[np.int64] = np.empty((len(states), 0), dtype=np.int64)  # (N, h)
    weights = mdp.initial[states[:, 0]]  # (N,)
    for step in range(horizon):
        if step:
            last = mdp.transitions[states[:, -1], actions[:, -1]]  # (N, S)
            branch, successor = np.nonzero(last)
            weights = weights[branch] * last[branch, successor]
            states, actions = np.column_stack([states[branch], successor]), actions[branch]
        choices = policy[states[:, -1]]  # (N, A)
        branch, action = np.nonzero(choices)
        weights = weights[branch] * choices[branch, action]
        states, actions = states[branch], np.column_stack([actions[branch], action])
    return Trajectories(
        torch.from_numpy(np.eye(mdp.num_states)[states.reshape(-1)]),
        torch.from_numpy(actions.reshape(-1, 1)),
        torch.arange(0, len(weights) * horizon + 1, horizon),
        weights=torch.from_numpy(weights),
    )


def _count_trajectories(mdp: TabularMDP, policy: Array, horizon: int) -> float:
    successors = np.einsum("sa,sat->st", policy > 0.0, (mdp.transitions > 0.0).astype(np.float64))
    num_from = np.count_nonzero(policy, axis=1).astype(np.float64)
    for _ in range(horizon - 1):
        num_from = successors @ num_from
    return float(num_from[mdp.initial > 0.0].sum())
