"""The implicit function theorem: −H w = b, then (dθ*/dν)ᵀ b = Cᵀ w."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..curvature import Curvature, CurvatureOperator
from ..modules import reward_values
from ..solvers import Damped, LinearOperator, Solver, automatic_damping
from .base import Outcome
from .problem import Problem


@dataclass(frozen=True)
class ImplicitFunction:
    """What `hypergradient(curvature=…, solver=…)` uses: no second policy, no re-solved lower level."""

    curvature: Curvature
    """−H of the lower level."""
    solver: Solver
    """For the system with it."""

    def implicit(self, problem: Problem, x0: Tensor | None) -> Outcome:
        """Cᵀ w; the solution is that of −H w = b."""
        rhs = problem.rhs()
        solution = self.solver(self.operator(problem, rhs=rhs), rhs, x0)
        return Outcome(problem.cross_term(problem.responses(solution.value)), solution)

    @property
    def automatic(self) -> bool:
        """Whether the damping is chosen for each right-hand side."""
        return getattr(self.curvature, "damping", 0.0) == "auto"

    def operator(self, problem: Problem, *, rhs: Tensor | None = None, damping: float | None = None) -> LinearOperator:
        """−H with its damping; an automatic one is chosen for `rhs`, or is the `damping` chosen before."""
        plain = self.plain_operator(problem)
        if not self.automatic:
            return plain
        if damping is None:
            assert rhs is not None
            damping = automatic_damping(plain, rhs)
        return Damped(plain, damping)

    def plain_operator(self, problem: Problem, weights: Tensor | None = None) -> CurvatureOperator:
        """−H as the curvature gives it, with other weights (N,) of the trajectories if they are given."""
        rewards = reward_values(problem.reward, problem.lower, chunk_steps=problem.chunk_steps)
        more: dict[str, Any] = {} if weights is None else {"weights": weights}
        return self.curvature.operator(problem.linearize(problem.lower), rewards, problem.discount, **more)
