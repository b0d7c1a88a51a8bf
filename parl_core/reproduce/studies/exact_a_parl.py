"""A-PARL in the form of its convergence theorem, on an enumerated problem: K lower ascent steps, then one upper step.

Source: Chakraborty et al., "PARL", ICLR 2024, algorithm 1 and theorem 1. All expectations are exact, so that what is seen is
what the lower level's K steps leave, and no sampling error. The algorithm's hypergradient is the library's own; what it is
measured against comes from `EnumeratedProblem`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...envs.tabular import Array
from ...hypergrad import CG, Hypergradient, HypergradientWarning, ScoreHessian, TrajectoryLoss, hypergradient
from ...models.policies import CategoricalPolicy
from ...trajectories import Trajectories
from .enumerated import COST, DAMPING, DISCOUNT, NUM_ACTIONS, NUM_STATES, TEMPERATURE, EnumeratedProblem

UPPER_STEP_SIZE = 0.3
"""Small enough for the descent lemma, Σ_{t<T} ‖∇L(ν_t)‖² ≤ 2 (L(ν_0) − L(ν_T))/step size, which holds up to 1/(Lipschitz
constant of ∇L); at 0.5 one of ten problems is 10% above it."""
FLOOR_UPPER_STEP_SIZE = 1.0
"""Of the runs that look for the floor, which is that of the fixed point and does not depend on it."""
LOWER_STEP_SIZE = 1.0

_CURVATURE = ScoreHessian(temperature=TEMPERATURE, damping=DAMPING)
_SOLVER = CG(rtol=1e-12, max_iterations=100)


class TableReward(nn.Module):
    """r_ν(s, a) = ν[s, a] on one-hot observations."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(NUM_STATES, NUM_ACTIONS, dtype=torch.float64))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """(T, S), (T, 1) -> (T,)."""
        return (observations @ self.table).gather(-1, actions).squeeze(-1)


class Engine:
    """The library's hypergradient of an enumerated problem, from all trajectories with their probabilities."""

    def __init__(self, problem: EnumeratedProblem) -> None:
        self._problem = problem
        self._policy = CategoricalPolicy(NUM_STATES, NUM_ACTIONS).double()
        self._reward = TableReward()
        true_returns = torch.from_numpy(problem.counts @ problem.true_reward)

        def utility(reward: nn.Module, trajectories: Trajectories) -> Tensor:
            returns = trajectories.sum_steps(reward(trajectories.observations, trajectories.actions))
            return -true_returns + COST * returns**2

        self._loss = TrajectoryLoss(utility)

    def hypergradient(self, theta: Array, reward: Array) -> Hypergradient:
        """At policy parameters θ (P,), optimal or not, and reward ν (R,)."""
        nn.utils.vector_to_parameters(torch.from_numpy(theta), self._policy.parameters())
        nn.utils.vector_to_parameters(torch.from_numpy(reward), self._reward.parameters())
        data = self._problem.trajectories(theta)
        return hypergradient(
            self._policy,
            self._reward,
            data,
            data,
            loss=self._loss,
            discount=DISCOUNT,
            curvature=_CURVATURE,
            solver=_SOLVER,
        )


def ascend(problem: EnumeratedProblem, theta: Array, reward: Array, steps: int) -> Array:
    """θ (P,) after `steps` steps of gradient ascent on V."""
    for _ in range(steps):
        theta = theta + LOWER_STEP_SIZE * problem.value_gradient(theta, reward)
    return theta


def reported_steps(steps: int) -> list[int]:
    """Ten numbers of steps a decade from 1 to `steps`, both among them."""
    decades = max(1, round(10 * np.log10(steps)))
    return np.unique(np.geomspace(1, steps, decades + 1).round().astype(int)).tolist()


def convergence_rows(seed: int, steps: int, lower_steps: int) -> list[dict[str, Any]]:
    """A run from ν = 0 and θ = 0 with warm starts: Σ_{t<T} ‖∇L(ν_t)‖² and what bounds it, at the reported T.

    At ν = 0 the leader hands out nothing and the policy is uniform. From ν ~ N(0, 1) the sum is bounded too, but a run may
    first spend a hundred steps on a plateau: over T = 10…10⁴ the slopes of log mean‖∇L‖² were then −.84 to −1.00 on ten
    problems (upper step size 1, lower level solved).
    """
    problem = EnumeratedProblem(seed)
    engine = Engine(problem)
    reward, theta = np.zeros(problem.num_rewards), np.zeros(problem.num_params)
    optimum = problem.solve(reward, theta)
    first_objective = problem.objective(optimum, reward)
    reported, rows, total = set(reported_steps(steps)), [], 0.0
    for step in range(1, steps + 1):
        theta = ascend(problem, theta, reward, lower_steps)
        gradient = problem.hypergradient(optimum, reward)
        found = engine.hypergradient(theta, reward)
        estimate = found.total.numpy()
        total += float(gradient @ gradient)
        moved = reward - UPPER_STEP_SIZE * estimate
        if step in reported:
            size = float(found.direct.norm() + found.implicit.norm())
            written_out = problem.hypergradient(theta, reward)
            rows.append(
                {
                    "seed": seed,
                    "steps": step,
                    "mean_squared_norm": total / step,
                    "sum_squared_norms": total,
                    "gradient_norm": float(np.linalg.norm(gradient)),
                    "bias_norm": float(np.linalg.norm(estimate - gradient)),
                    "lower_distance": float(np.linalg.norm(theta - optimum)),
                    "engine_difference": float(np.linalg.norm(estimate - written_out)) / size,
                }
            )
        reward, optimum = moved, problem.solve(moved, optimum)
        if step in reported:
            decrease = first_objective - problem.objective(optimum, reward)
            rows[-1]["descent_bound"] = 2.0 * decrease / UPPER_STEP_SIZE
    return rows


def bias_rows(seed: int, lower_steps: Sequence[int]) -> list[dict[str, Any]]:
    """Relative error of the hypergradient at θ^K for each K of the increasing `lower_steps`, from θ = 0 at a random ν."""
    problem = EnumeratedProblem(seed)
    engine = Engine(problem)
    reward, theta = problem.random_reward, np.zeros(problem.num_params)
    optimum = problem.solve(reward, theta)
    exact = problem.hypergradient(optimum, reward)
    contraction = problem.contraction(optimum, reward, LOWER_STEP_SIZE)
    rows, taken = [], 0
    for steps in lower_steps:
        theta, taken = ascend(problem, theta, reward, steps - taken), steps
        with warnings.catch_warnings():
            # Far from the optimum V need not be concave; the row says so.
            warnings.simplefilter("ignore", HypergradientWarning)
            found = engine.hypergradient(theta, reward)
        assert found.solution is not None
        rows.append(
            {
                "seed": seed,
                "lower_steps": steps,
                "relative_bias": float(np.linalg.norm(found.total.numpy() - exact) / np.linalg.norm(exact)),
                "lower_distance": float(np.linalg.norm(theta - optimum)),
                "negative_curvature": bool(found.solution.negative_curvature),
                "contraction": contraction,
            }
        )
    return rows


def floor_row(seed: int, start: str, lower_steps: int, steps: int) -> dict[str, Any]:
    """‖∇L‖ where `steps` upper steps end, for a lower level that begins each one anew from θ = 0 ("cold") or goes on from
    its last θ ("warm").

    The hypergradient is the problem's own here, which `convergence_rows` holds against the library's.
    """
    problem = EnumeratedProblem(seed)
    reward, theta = np.zeros(problem.num_rewards), np.zeros(problem.num_params)
    for _ in range(steps):
        origin = np.zeros(problem.num_params) if start == "cold" else theta
        theta = ascend(problem, origin, reward, lower_steps)
        reward = reward - FLOOR_UPPER_STEP_SIZE * problem.hypergradient(theta, reward)
    optimum = problem.solve(reward, theta)
    return {
        "seed": seed,
        "start": start,
        "lower_steps": lower_steps,
        "steps": steps,
        "gradient_norm": float(np.linalg.norm(problem.hypergradient(optimum, reward))),
        "contraction": problem.contraction(optimum, reward, LOWER_STEP_SIZE),
    }
