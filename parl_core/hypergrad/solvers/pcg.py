"""Conjugate gradients behind the approximate inverse that an operator knows of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .cg import ConjugateGradients, plain
from .drive import drive
from .solution import LinearOperator, Preconditioner, Solution
from .system import Outcome, System, check_limits

_STALE = 1.5  # times the iterations behind a fresh one


class _Kept(NamedTuple):
    """A preconditioner, what it fits, and what it took the solve that it was made for."""

    preconditioner: Preconditioner
    size: int
    dtype: torch.dtype
    device: torch.device
    iterations: int


@dataclass
class PCG:
    """Preconditioned conjugate gradients for an operator that has a method `preconditioner`; for any other it is `CG`.

    `Fisher` and `LogProbHessian` have one for `GaussianPolicy` and `CategoricalPolicy`: see
    `parl_core.hypergrad.last_layers`. On a sample's Hessian whose damping just makes it definite, PCG takes a third to a
    half of the products of `CG`, and making the preconditioner costs one or two. It helps less the smaller the damping
    is, since damping is all it knows of most directions: with less than a hundredth of the largest eigenvalue of a
    Fisher matrix CG may take fewer iterations.

    The preconditioner of a solve is kept and used again, also when the operator has changed a little, as over the outer
    steps of training. It is symmetric and positive definite whatever A is and the residual is the present operator's,
    so a stale one decides about the number of iterations alone; a solve that takes half as many again as the one that
    it was made for has the next one make its own. So does a change of P, dtype or device, and `reset()`. The solution's
    cost includes what making it took.

    >>> import torch
    >>> class Operator:
    ...     diagonal = torch.tensor([1.0, 100.0, 1e4])
    ...     def __call__(self, v):
    ...         return self.diagonal * v
    ...     def preconditioner(self, extra=0.0):
    ...         return Preconditioner(lambda r: r / (self.diagonal + extra), cost=0.0)
    >>> PCG()(Operator(), torch.ones(3)).iterations
    1
    """

    rtol: float = 1e-5
    """Ends when ‖b − A x‖ ≤ rtol·‖b‖, or where it has stopped falling within 10·rtol and within rounding of A x."""
    max_iterations: int = 200
    """At most this many iterations."""
    _kept: _Kept | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_limits(self.rtol, self.max_iterations)

    def reset(self) -> None:
        """Forget the preconditioner: the next solve makes one of its own operator."""
        self._kept = None

    def __call__(self, operator: LinearOperator, rhs: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve operator(x) = rhs for rhs (P,) or (K, P), from x0 like it or from zero; one product an iteration."""
        system = System(operator, rhs, x0)
        offered = getattr(operator, "preconditioner", None)
        if not callable(offered):
            return system.solution(self._drive(operator, system, None))
        fits = rhs.shape[-1], rhs.dtype, rhs.device
        if self._kept is not None and self._kept[1:4] == fits:
            solution = system.solution(self._drive(operator, system, self._kept.preconditioner))
            if solution.iterations > _STALE * self._kept.iterations or not _is_finite(solution):
                self.reset()
            return solution
        made: Preconditioner | None = offered(0.0)
        solution = system.solution(self._drive(operator, system, made), 0.0 if made is None else made.cost)
        if made is not None and solution.iterations and _is_finite(solution):
            self._kept = _Kept(made, *fits, solution.iterations)
        return solution

    def _drive(self, operator: LinearOperator, system: System, preconditioner: Preconditioner | None) -> Outcome:
        if preconditioner is None:
            return plain(operator, system, rtol=self.rtol, max_iterations=self.max_iterations)
        method = ConjugateGradients(preconditioner.apply)
        return drive(method, system, rtol=self.rtol, max_iterations=self.max_iterations)


def _is_finite(solution: Solution) -> bool:
    return bool(torch.isfinite(solution.residuals[-1]).all())
