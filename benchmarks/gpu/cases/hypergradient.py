"""The solve A w = b of a hypergradient, and the whole hypergradient, to a true residual of 1e-4, float32.

The problem is that of `benchmarks/test_hypergradient.py`: policy 24→h→h→6, N trajectories of 50 steps, reward
30→256→256→256→1, 32 pairs of segments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import parl_core as parl
from benchmarks.gpu.case import Bar, Case, Lab, Make, Run, Setup, by_backend, require
from benchmarks.harness import Absent, WrongAnswer
from benchmarks.peers import hypergradient as peers
from benchmarks.peers import hypergradient_jax as jax_peers
from benchmarks.peers.hypergradient import DISCOUNT, RTOL, TEMPERATURE, Problem, System, make_problem
from parl_core.hypergrad.linearize import linearize
from parl_core.ops import backend as backend_context

SIZES, TINY = ((256, 32, 152.0), (64, 32, 38.4), (256, 256, 40.1)), ((6, 2, 500.0),)
"""Width, trajectories, damping: the eigenvalues of A then run from 6 to 555, from 6 to 181, and from .3 to 308."""
ITERATIONS = 100
"""All of a captured solve are run, with the iterate frozen once it has converged; the problems need 30 to 80."""
EAGER = "CG over kept graphs, eager"


VECTORS, TINY_VECTORS = 80_000, 40
"""Parameters of a policy 24→256→256→6, about."""


def cases(tiny: bool) -> list[Case]:
    """Solves have the bar; what lies between their products is a contest of its own."""
    number = TINY_VECTORS if tiny else VECTORS
    vectors = Case(
        topic="hypergradient",
        name=f"vectors {number}",
        setup=partial(_vectors, number),
        tests=("_cg",),
        op="cg_vectors",
        size=number,
    )
    return [
        Case(
            topic="hypergradient",
            name=f"{what} h{width}-N{number}",
            setup=partial(setup, width, number, damping),
            tests=("linearize", "capture", "_cg"),
            bars=(Bar(10.0, peers=(EAGER,)),) if what == "solve" else (),
            first=what == "solve" and width == SIZES[0][0] and number == SIZES[0][1],
        )
        for what, setup in (("solve", _solve), ("hypergradient", _whole))
        for width, number, damping in (TINY if tiny else SIZES)
    ] + [vectors]


def _vectors(number: int, lab: Lab) -> Setup:
    """A solve with a product that costs next to nothing: that with a diagonal matrix."""
    diagonal = torch.linspace(1.0, 10.0, number, device=lab.device)
    rhs = torch.randn(number, generator=torch.Generator(lab.device).manual_seed(0), device=lab.device)
    solver = parl.CG(rtol=RTOL, max_iterations=ITERATIONS)

    def ours(backend: str) -> Run:
        require("cg_vectors", backend, lab.device)

        def run() -> Tensor:
            with backend_context(backend):
                return solver(lambda vector: diagonal * vector, rhs).value

        return run

    def check(answer: Any) -> float:
        residual = float((rhs.double() - diagonal.double() * answer.double()).norm() / rhs.double().norm())
        if not residual <= 1.05 * RTOL:
            raise WrongAnswer(f"its true residual is {residual:.1e}, {RTOL:.0e} is allowed")
        return residual

    return Setup(check=check, ours=by_backend(ours), alone=False)


def _solve(width: int, number: int, damping: float, lab: Lab) -> Setup:
    problem = make_problem(width, number, damping, lab.device)
    exact = System(problem, dtype=torch.float64)

    def check(answer: Any) -> float:
        solution = answer.to(exact.rhs)
        residual = float((exact.rhs - exact.product(solution)).norm() / exact.rhs.norm())
        if not residual <= 1.05 * RTOL:
            raise WrongAnswer(f"its true residual is {residual:.1e}, {RTOL:.0e} is allowed")
        return residual

    def eager() -> Run:
        system = System(problem)
        return lambda: peers.plain_cg(system)

    rhs = exact.rhs.float()
    ours: dict[str, Make] = {
        **{f"{name}, one graph": make for name, make in by_backend(lambda b: _captured(problem, rhs, b)).items()},
        **by_backend(lambda b: _launched(problem, rhs, b)),
    }
    return Setup(check=check, ours=ours, peers={EAGER: eager}, alone=False)


def _operator(problem: Problem) -> Callable[[Tensor], Tensor]:
    """A at the policy's parameters as they are."""
    linear = linearize(problem.policy, problem.lower)
    with torch.no_grad():
        rewards = problem.reward(problem.lower.observations, problem.lower.actions)
    curvature = parl.LogProbHessian(baseline="mean", temperature=TEMPERATURE, damping=problem.damping)
    return curvature.operator(linear, rewards, DISCOUNT)


def _launched(problem: Problem, rhs: Tensor, backend: str) -> Run:
    """An operator that was made before, and a solver that launches kernel after kernel."""
    require("linearize", backend, rhs.device)
    with backend_context(backend):
        operator = _operator(problem)
    solver = parl.CG(rtol=RTOL, max_iterations=ITERATIONS)

    def run() -> Tensor:
        with backend_context(backend):
            return solver(operator, rhs).value

    return run


def _captured(problem: Problem, rhs: Tensor, backend: str) -> Run:
    """One launch; the graph makes the operator, too."""
    capture: Callable[..., Any] | None = getattr(parl, "capture_solve", None)
    if capture is None:
        raise Absent("there is no capture_solve")
    require("linearize", backend, rhs.device)

    def build() -> Callable[[Tensor], Tensor]:
        with backend_context(backend):
            return _operator(problem)

    with backend_context(backend):
        solve = capture(parl.CG(rtol=RTOL, max_iterations=ITERATIONS), build, rhs)
    return lambda: solve(rhs).value


def _whole(width: int, number: int, damping: float, lab: Lab) -> Setup:
    problem = make_problem(width, number, damping, lab.device)
    curvature = parl.LogProbHessian(baseline="mean", temperature=TEMPERATURE, damping=damping)

    def ours(backend: str) -> Run:
        require("linearize", backend, lab.device)

        def run() -> Any:
            with backend_context(backend):
                result = parl.hypergradient(
                    problem.policy,
                    problem.reward,
                    problem.lower,
                    problem.upper,
                    loss=parl.PreferenceLoss(),
                    discount=DISCOUNT,
                    curvature=curvature,
                    solver=parl.CG(rtol=RTOL, max_iterations=ITERATIONS),
                )
            assert result.solution is not None
            return result.solution.value, result.total

        return run

    return Setup(
        check=peers.right(problem),
        ours=by_backend(ours),
        peers={EAGER: lambda: peers.conjugate_gradients(problem), "JAX, one jit": lambda: jax_peers.one_jit(problem)},
        gradient=lambda: peers.gradient(problem),
        alone=False,
    )
