"""What goes into a solver and what comes out of it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

LinearOperator = Callable[[Tensor], Tensor]
"""v ↦ A v on vectors (P,). What it may say about itself, as attributes:

    damping           the multiple of the identity that A holds already
    cost              of one product, in gradients of the policy's log-probabilities
    block             (K, P) -> (K, P), a product for every row at once; used for two rows or more
    outer_products    () -> OuterProducts, the terms of A beside the damping
    preconditioner    (extra) -> Preconditioner | None, an approximate inverse of A + extra·I, extra a number
    native            (extra) -> NativeOperator | None, A + extra·I for solves in compiled code
"""


@dataclass(frozen=True)
class Preconditioner:
    """An approximate inverse of an operator, as the operator itself knows one."""

    apply: Callable[[Tensor], Tensor]
    """(…, P) -> (…, P), symmetric and positive definite."""
    cost: float
    """What it took to make, in gradients of the policy's log-probabilities."""


@dataclass(frozen=True)
class NativeOperator:
    """An operator whose products compiled code can take by itself."""

    curvature: Any
    """Of `parl_core._native`."""
    damping: float
    """The multiple of the identity that is added to its products."""
    size: int
    """P."""
    dtype: torch.dtype
    """That it computes in."""


@dataclass(frozen=True)
class OuterProducts:
    """The terms of an operator A = Rᵀ diag(c) R + damping·I."""

    rows: Tensor
    """(k, P) R."""
    weights: Tensor
    """(k,) c, of either sign."""
    cost: float
    """What the rows took to make, in gradients of the policy's log-probabilities."""


class Status(enum.Enum):
    """How a solve ended. `message` says what happened and what to do about it.

    In the order of severity: of several right-hand sides the worst is told.
    """

    CONVERGED = "the true residual is within rtol, or within ten times rtol where rounding of A x allows no less"
    MAX_ITERATIONS = (
        "max_iterations was reached before rtol: raise max_iterations, loosen rtol, or add damping if the residuals "
        "have stopped falling"
    )
    STAGNATED = (
        "the residual stopped falling above rtol: the precision of this dtype is used up or the system is singular; "
        "use float64, loosen rtol or add damping"
    )
    BREAKDOWN = (
        "a search direction with no curvature was met: the system is singular along it, or indefinite; add damping, use "
        "MINRES, or use an entropy temperature that makes the lower problem strongly concave"
    )
    INCONSISTENT = (
        "the system is singular to this precision and has no solution, so the value only makes the residual as small as it "
        "can be: add damping, or use an entropy temperature that makes the lower problem strongly concave"
    )
    NOT_SYMMETRIC = (
        "the operator is not symmetric, or gives another product each time, so that the value solves nothing: look for "
        "dropout or randomness in the policy, or a custom operator that is not symmetric; where its products are "
        "in bfloat16 or float16, loosen rtol to 1e-2"
    )
    DIVERGED = (
        "the series diverges: step_size is not below 2 / (largest eigenvalue), or the operator has a negative eigenvalue; "
        "leave step_size at None, add damping, or use MINRES"
    )
    OVERFLOW = (
        "the solution leaves the range of this dtype, though the solve itself went well: scale the upper loss down, use "
        "float64 or add damping"
    )
    NON_FINITE_RHS = "the right-hand side holds a NaN or an infinity: look at the upper loss and at the policy's scores"
    NON_FINITE_START = (
        "x0 holds a NaN or an infinity: it may come from a solve that failed; start from zero by leaving x0 out"
    )
    NON_FINITE_OPERATOR = (
        "a product with the operator gave a NaN or an infinity: look at the policy's second derivatives, the rewards and "
        "the damping"
    )

    @property
    def message(self) -> str:
        """One sentence: what happened and what to do."""
        return self.value

    @property
    def ok(self) -> bool:
        """Whether the value solves the system, to the tolerance asked for or as far as the dtype allows."""
        return self is Status.CONVERGED


@dataclass
class Solution:
    """What a solver returns."""

    value: Tensor
    """(P,) or (K, P), as the right-hand side: the solution, or the last iterate where it did not converge; a row is NaN
    where a NaN came in or the solution overflows."""
    status: Status
    """How the solve ended; of K right-hand sides, the worst of them."""
    iterations: int
    """Iterations taken, by the slowest of the right-hand sides."""
    residuals: Tensor
    """(iterations + 1,) or (iterations + 1, K) relative residuals ‖b − A x‖ / ‖b‖ by iteration; the last one is the true
    residual, which a right-hand side that is done sooner keeps."""
    damping: float
    """The multiple of the identity that the operator holds, if it says so; 0 otherwise."""
    negative_curvature: bool
    """Whether a direction with pᵀA p < 0 was met, in any of the systems: A is not positive definite there. Where the
    damping was chosen automatically, whether A without it has such a direction: the damping lifts what it finds."""
    products: int = 0
    """Products of the operator with a vector, those for true residuals, step sizes and sketches included."""
    cost: float | None = None
    """Gradients of the policy's log-probabilities that would have cost as much: products × `operator.cost`, and for
    `Woodbury` what the rows took; None if the operator does not say what a product costs."""


class Solver(Protocol):
    """Any callable of this form can be passed as `solver`."""

    def __call__(self, operator: LinearOperator, rhs: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve operator(x) = rhs for rhs (P,), or for each row of rhs (K, P); x0 is like rhs."""
        ...


def damping_of(operator: LinearOperator) -> float:
    """The multiple of the identity that the operator says it already holds; never to be added again."""
    return float(getattr(operator, "damping", 0.0))
