"""A whole hypergradient to a true residual of 1e-4, float32: policy 24→h→h→6, reward 30→256→256→256→1, 32 pairs of segments.

The reward's passes are part of it, and of its own width whatever h is: at h = 64 they are more than half of the time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import parl_core as parl
from benchmarks.peers import hypergradient as peers
from benchmarks.peers import hypergradient_jax as jax_peers
from benchmarks.peers.hypergradient import DISCOUNT, RTOL, TEMPERATURE, Problem, load, make_problem

# Width, trajectories, damping: the eigenvalues of A then run from 6 to 555, from .3 to 308 and from 6 to 181.
CASES = [(256, 32, 152.0), (256, 256, 40.1), (64, 32, 38.4)]
CASE = pytest.mark.parametrize("width, number, damping", CASES, ids=[f"h{w}-N{n}" for w, n, _ in CASES])


def ours(problem: Problem, solver: Callable[[], Any], steps: int = 1) -> Callable[[], Any]:
    """`hypergradient` with this solver, warm started over several outer steps."""
    curvature = parl.LogProbHessian(baseline="mean", temperature=TEMPERATURE, damping=problem.damping)
    points = [problem.moved(step) for step in range(steps)]

    def make() -> Callable[[], Any]:
        policy, reward = copy.deepcopy((problem.policy, problem.reward))  # the others start from the problem's own

        def run() -> tuple[torch.Tensor | None, torch.Tensor | None]:
            x0, total, chosen = None, None, solver()
            for theta, nu in points:
                load(policy, theta)
                load(reward, nu)
                result = parl.hypergradient(
                    policy,
                    reward,
                    problem.lower,
                    problem.upper,
                    loss=parl.PreferenceLoss(),
                    discount=DISCOUNT,
                    curvature=curvature,
                    solver=chosen,
                    x0=x0,
                )
                assert result.solution is not None
                x0, total = result.solution.value, result.total
            return x0, total

        return run

    return make


SOLVERS = {
    "parl-core": lambda: parl.PCG(rtol=RTOL),
    "parl-core, plain CG": lambda: parl.CG(rtol=RTOL),
}


def race(contest: Any, problem: Problem, steps: int) -> None:
    contest(
        peers.right(problem, steps - 1),
        ours={name: ours(problem, solver, steps) for name, solver in SOLVERS.items()},
        peers={
            "JAX, one jit": lambda: jax_peers.one_jit(problem, steps),
            "TorchOpt's CG, double backward": lambda: peers.torchopt_cg(problem, steps),
            "CG, double backward over kept graphs": lambda: peers.conjugate_gradients(problem, steps),
        },
        gradient=lambda: peers.gradient(problem),
    )


@CASE
def test_hypergradient(contest, width, number, damping):
    race(contest, make_problem(width, number, damping), steps=1)


def test_ten_outer_steps(contest):
    """θ and ν move by a thousandth at each, and everyone starts from the solution before."""
    race(contest, make_problem(256, 32, 152.0), steps=10)
