"""The implicit function theorem: −H w = b, then (dθ*/dν)ᵀ b = Cᵀ w."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..curvature import Curvature, CurvatureOperator
from ..solvers import Damped, LinearOperator, Solver, solve_with_automatic_damping
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
        rhs, operator = problem.rhs(), self.plain_operator(problem)
        if self.automatic:
            solution = solve_with_automatic_damping(self.solver, operator, rhs, x0)[1]
        else:
            solution = self.solver(operator, rhs, x0)
        return Outcome(problem.cross_term(solution.value), solution)

    @property
    def automatic(self) -> bool:
        """Whether the damping is chosen for each right-hand side."""
        return getattr(self.curvature, "damping", 0.0) == "auto"

    def operator(self, problem: Problem, damping: float) -> LinearOperator:
        """−H with its damping, which is `damping` if it is chosen automatically."""
        plain = self.plain_operator(problem)
        return Damped(plain, damping) if self.automatic else plain

    def plain_operator(self, problem: Problem, weights: Tensor | None = None) -> CurvatureOperator:
        """−H as the curvature gives it, with other weights (N,) of the trajectories if they are given."""
        rewards = problem.rewards(problem.lower)
        more: dict[str, Any] = {} if weights is None else {"weights": weights}
        return self.curvature.operator(problem.linearize(problem.lower), rewards, problem.discount, **more)
