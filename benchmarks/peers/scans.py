"""Peers of the scans along trajectories: what one would write or call without this package.

All take and return dense arrays (N, H), a trajectory in each row, cut after its last step with `bootstrap` (N,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

DISCOUNT, LAMBDA = 0.99, 0.95
Run = Callable[[], Any]


@dataclass(frozen=True)
class Problem:
    """Everything float32."""

    log_ratios: Tensor  # (N, H)
    rewards: Tensor  # (N, H)
    values: Tensor  # (N, H)
    bootstrap: Tensor  # (N,)
    offsets: Tensor  # (N+1,), as if the rows were ragged

    def arrays(self) -> tuple[Any, ...]:
        """log_ratios, rewards, values, bootstrap in NumPy."""
        return tuple(x.numpy() for x in (self.log_ratios, self.rewards, self.values, self.bootstrap))


def make_problem(num_trajectories: int, horizon: int) -> Problem:
    """The same numbers for the same sizes."""
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(num_trajectories, horizon, generator=generator) for _ in range(3)]
    bootstrap = torch.randn(num_trajectories, generator=generator)
    log_ratios, rewards, values = steps
    return Problem(0.3 * log_ratios, rewards, values, bootstrap, torch.arange(num_trajectories + 1) * horizon)


def reference(problem: Problem) -> dict[str, Any]:
    """In float64, one step of all trajectories after another."""
    log_ratios, rewards, values, bootstrap = (x.astype(np.float64) for x in problem.arrays())
    horizon = rewards.shape[1]
    ratios = np.minimum(np.exp(log_ratios), 1.0)
    after = np.concatenate([values[:, 1:], bootstrap[:, None]], axis=1)
    errors = rewards + DISCOUNT * after - values
    returns, advantages, corrections = (np.zeros_like(rewards) for _ in range(3))
    sums = np.cumsum(rewards, axis=1)
    g = a = c = np.zeros(len(rewards))
    for h in reversed(range(horizon)):
        returns[:, h] = g = rewards[:, h] + DISCOUNT * g
        advantages[:, h] = a = errors[:, h] + DISCOUNT * LAMBDA * a
        corrections[:, h] = c = ratios[:, h] * (errors[:, h] + DISCOUNT * c)
    targets = values + corrections
    after = np.concatenate([targets[:, 1:], bootstrap[:, None]], axis=1)
    policy_advantages = ratios * (rewards + DISCOUNT * after - values)
    return {
        "returns": returns,
        "prefix_sum": sums,
        "gae": advantages,
        "vtrace": (targets, policy_advantages),
        "td_lambda": advantages + values,
    }


def numba_returns(problem: Problem, parallel: bool) -> Run:
    """One loop over rows, one over time."""
    import numba

    @numba.njit(parallel=parallel, nogil=True)
    def returns(rewards, discount):
        out = np.empty_like(rewards)
        for n in numba.prange(rewards.shape[0]):
            carry = np.float32(0.0)
            for h in range(rewards.shape[1] - 1, -1, -1):
                carry = rewards[n, h] + discount * carry
                out[n, h] = carry
        return out

    _, rewards, _, _ = problem.arrays()
    return lambda: returns(rewards, np.float32(DISCOUNT))


def numba_prefix_sum(problem: Problem, parallel: bool) -> Run:
    """One loop over rows, one over time."""
    import numba

    @numba.njit(parallel=parallel, nogil=True)
    def prefix_sum(values):
        out = np.empty_like(values)
        for n in numba.prange(values.shape[0]):
            carry = np.float32(0.0)
            for h in range(values.shape[1]):
                carry += values[n, h]
                out[n, h] = carry
        return out

    _, rewards, _, _ = problem.arrays()
    return lambda: prefix_sum(rewards)


def numba_gae(problem: Problem, parallel: bool) -> Run:
    """One loop over rows, one over time."""
    import numba

    @numba.njit(parallel=parallel, nogil=True)
    def gae(rewards, values, bootstrap, discount, gae_lambda):
        out = np.empty_like(rewards)
        for n in numba.prange(rewards.shape[0]):
            carry, after = np.float32(0.0), bootstrap[n]
            for h in range(rewards.shape[1] - 1, -1, -1):
                error = rewards[n, h] + discount * after - values[n, h]
                carry = error + discount * gae_lambda * carry
                after = values[n, h]
                out[n, h] = carry
        return out

    _, rewards, values, bootstrap = problem.arrays()
    return lambda: gae(rewards, values, bootstrap, np.float32(DISCOUNT), np.float32(LAMBDA))


def numba_vtrace(problem: Problem, parallel: bool) -> Run:
    """One loop over rows, one over time; both clips at 1."""
    import numba

    @numba.njit(parallel=parallel, nogil=True)
    def vtrace(log_ratios, rewards, values, bootstrap, discount):
        targets, advantages = np.empty_like(rewards), np.empty_like(rewards)
        for n in numba.prange(rewards.shape[0]):
            carry, after, next_target = np.float32(0.0), bootstrap[n], bootstrap[n]
            for h in range(rewards.shape[1] - 1, -1, -1):
                rho = min(np.float32(1.0), np.exp(log_ratios[n, h]))
                carry = rho * (rewards[n, h] + discount * after - values[n, h]) + discount * rho * carry
                advantages[n, h] = rho * (rewards[n, h] + discount * next_target - values[n, h])
                after = values[n, h]
                next_target = targets[n, h] = after + carry
        return targets, advantages

    log_ratios, rewards, values, bootstrap = problem.arrays()
    return lambda: vtrace(log_ratios, rewards, values, bootstrap, np.float32(DISCOUNT))


def scipy_returns(problem: Problem) -> Run:
    """A recursive filter over reversed time."""
    from scipy.signal import lfilter

    _, rewards, _, _ = problem.arrays()
    one, decay = np.array([1.0], np.float32), np.array([1.0, -DISCOUNT], np.float32)
    return lambda: lfilter(one, decay, rewards[:, ::-1], axis=1)[:, ::-1]


def _torchrl_inputs(problem: Problem) -> dict[str, Tensor]:
    """As it wants them: (N, H, 1), a mask of the last steps, and the values after every step."""
    done = torch.zeros(*problem.rewards.shape, 1, dtype=torch.bool)
    done[:, -1] = True
    after = torch.cat([problem.values[:, 1:], problem.bootstrap[:, None]], dim=1)
    return {
        "state_value": problem.values[..., None],
        "next_state_value": after[..., None],
        "reward": problem.rewards[..., None],
        "done": done,
        "terminated": torch.zeros_like(done),
    }


def torchrl_returns(problem: Problem) -> Run:
    """`reward2go`."""
    from torchrl.objectives.value.functional import reward2go

    inputs = _torchrl_inputs(problem)
    return lambda: reward2go(inputs["reward"], inputs["done"], DISCOUNT)[..., 0]


def torchrl_gae(problem: Problem) -> Run:
    """`vec_generalized_advantage_estimate`."""
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    inputs = _torchrl_inputs(problem)
    return lambda: vec_generalized_advantage_estimate(DISCOUNT, LAMBDA, **inputs)[0][..., 0]


def torchrl_td_lambda(problem: Problem) -> Run:
    """`vec_td_lambda_return_estimate`."""
    from torchrl.objectives.value.functional import vec_td_lambda_return_estimate

    inputs = _torchrl_inputs(problem)
    del inputs["state_value"]
    return lambda: vec_td_lambda_return_estimate(DISCOUNT, LAMBDA, **inputs)[..., 0]


def torchrl_vtrace(problem: Problem) -> Run:
    """`vtrace_advantage_estimate`, which returns advantages first."""
    from torchrl.objectives.value.functional import vtrace_advantage_estimate

    inputs = _torchrl_inputs(problem)
    log_pi = problem.log_ratios[..., None]
    log_mu = torch.zeros_like(log_pi)

    def run() -> tuple[Tensor, Tensor]:
        advantages, targets = vtrace_advantage_estimate(DISCOUNT, log_pi, log_mu, **inputs)
        return targets[..., 0], advantages[..., 0]

    return run
