"""Conjugate gradients behind the approximate inverse that an operator knows of itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cg import ConjugateGradients, plain
from .drive import launch
from .solution import LinearOperator, Preconditioner, Solution, Status, damping_of
from .system import Launch, Outcome, System, check_limits

_STALE = 1.5  # times the iterations behind a fresh one
_OTHER_DAMPING = 2.0  # times the damping that it was made for, up or down; the automatic damping wanders by less


class _Kept(NamedTuple):
    """A preconditioner, what it fits, and what it took the solve that it was made for."""

    preconditioner: Preconditioner
    size: int
    dtype: torch.dtype
    device: torch.device
    damping: float
    iterations: int

    def fits(self, operator: LinearOperator, rhs: Tensor) -> bool:
        low, high = sorted((self.damping, damping_of(operator)))
        return (self.size, self.dtype, self.device) == _kind(rhs) and high <= _OTHER_DAMPING * low

    def __reduce__(self) -> tuple[Any, ...]:
        return NoneType, ()  # it holds functions, and whoever reads it makes its own


@dataclass(unsafe_hash=True)
class PCG:
    """Preconditioned conjugate gradients for an operator that has a method `preconditioner`; for any other it is `CG`.

    `Fisher` and `LogProbHessian` have one for a `GaussianPolicy` or a `CategoricalPolicy` where making it costs at most
    four of their products: see `parl_core.hypergrad.last_layers`. Its cost grows with the cube of the number of outputs and
    falls with the widths and the number of steps. With two hidden layers of 64 and 3200 steps it is within the four for one
    action, and beyond them for six, where PCG is CG; with layers of 256 and six actions it is two to three products with
    the default log_std="state" and one with "global".

    On a sample's Hessian whose damping just makes it definite, PCG takes a third to a
    half of the products of `CG`, and making the preconditioner costs one or two. It helps less the smaller the damping
    is, since damping is all it knows of most directions: with less than a hundredth of the largest eigenvalue of a
    Fisher matrix CG may take fewer iterations.

    The preconditioner of a solve is kept and used again, also when the operator has changed a little, as over the outer
    steps of training. It is symmetric and positive definite whatever A is and the residual is the present operator's,
    so a stale one decides about the number of iterations alone; a solve that takes half as many again as the one that
    it was made for, or does not converge, has the next one make its own. So does a change of P, dtype or device, of the
    operator's damping by more than a factor of two, and `reset()`. The solution's cost includes what making it took.
    Copies by pickle or `copy.deepcopy` make their own.

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
        return self.prepare(system)(system)()

    def prepare(self, system: System) -> Launch:
        """See `Recordable`."""
        offered = getattr(system.operator, "preconditioner", None)
        if not callable(offered):
            return self._launch(None, lambda system, outcome: system.solution(outcome))
        kept = self._kept
        if kept is not None and kept.fits(system.operator, system.rhs):
            return self._launch(kept.preconditioner, functools.partial(self._used_again, kept))
        self.reset()
        made: Preconditioner | None = offered(0.0)
        return self._launch(made, self._finish_with_new(made))

    def _launch(self, preconditioner: Preconditioner | None, finish: Callable[[System, Outcome], Solution]) -> Launch:
        def launched(system: System) -> Callable[[], Solution]:
            if preconditioner is None:
                read = plain(system, rtol=self.rtol, max_iterations=self.max_iterations)
            else:
                method = ConjugateGradients(preconditioner.apply)
                read = launch(method, system, rtol=self.rtol, max_iterations=self.max_iterations)
            return lambda: finish(system, read())

        return launched

    def _finish_with_new(self, made: Preconditioner | None) -> Callable[[System, Outcome], Solution]:
        """The first solve pays for what was made, and decides whether it is kept; replays of a capture do neither."""
        is_first = True

        def finish(system: System, outcome: Outcome) -> Solution:
            nonlocal is_first
            if made is None or not is_first:
                return system.solution(outcome)
            is_first = False
            solution = system.solution(outcome, made.cost)
            if solution.iterations and solution.status is Status.CONVERGED:
                self._kept = _Kept(made, *_kind(system.rhs), damping_of(system.operator), solution.iterations)
            return solution

        return finish

    def _used_again(self, kept: _Kept, system: System, outcome: Outcome) -> Solution:
        solution = system.solution(outcome)
        is_stale = solution.iterations > _STALE * kept.iterations or solution.status is not Status.CONVERGED
        if is_stale and self._kept is kept:  # a replay may come when another is kept
            self.reset()
        return solution


def _kind(rhs: Tensor) -> tuple[int, torch.dtype, torch.device]:
    return rhs.shape[-1], rhs.dtype, rhs.device
