"""The oracle: the matrix itself, from P products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .solution import LinearOperator, Solution, Status, damping_of
from .system import Outcome, System, all_finite, as_rows, check_rtol, norms, rounding_allowance


@dataclass(frozen=True)
class Dense:
    """Forms the matrix from P products and solves through its eigenvalues: the oracle for small P.

    Directions whose eigenvalue is lost in the rounding of the products, below √P·eps·|largest|, are treated as the null
    space and left at zero (minimum norm), unless the operator's own damping makes them count. One product more gives the
    true residual. Having the matrix, it tells an operator that is not symmetric, or not the same at every product, from
    all others: NOT_SYMMETRIC, where the two sides of the matrix, or it and the last product, differ by more than √eps
    and rtol.
    """

    rtol: float = 1e-5
    """Does not call itself converged where ‖b − A x‖ > rtol·‖b‖, but for rounding of A x within 10·rtol."""

    def __post_init__(self) -> None:
        check_rtol(self.rtol)

    def __call__(self, operator: LinearOperator, rhs: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve operator(x) = rhs for rhs (P,) or (K, P); x0 is not needed and only checked."""
        system = System(operator, rhs, x0)
        size, eps = rhs.shape[-1], torch.finfo(rhs.dtype).eps
        identity = torch.eye(size, dtype=rhs.dtype, device=rhs.device)
        # One by one: all P at once could take more memory than the matrix by far.
        matrix = torch.stack([system.product(column) for column in identity]) if size else identity  # its transpose
        rows = as_rows(system.rhs)
        nothing = torch.full_like(rows, float("nan"))
        if not bool(torch.isfinite(matrix).all()):
            statuses = [Status.NON_FINITE_OPERATOR if ok else Status.NON_FINITE_RHS for ok in _finite(rows)]
            outcome = Outcome(nothing.reshape(rhs.shape), statuses, 0, norms(nothing).T, negative=False)
            return system.solution(outcome)

        eigenvalues, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.T).double())
        largest = float(eigenvalues.abs().max()) if size else 0.0
        rounding = max(10.0, size**0.5) * eps * largest
        damping = damping_of(operator)
        kept = eigenvalues.abs() > (min(rounding, 0.5 * damping) if damping else rounding)
        inverse = torch.where(kept, 1.0 / torch.where(kept, eigenvalues, 1.0), 0.0)
        parts = rows.double() @ vectors
        x = ((inverse * parts) @ vectors.T).to(rhs.dtype)
        good = torch.isfinite(norms(x))
        images = system.product(torch.where(good, x, 0.0))
        residuals = torch.where(good, norms(rows - images), float("nan"))
        allowed = rounding_allowance(x, residuals.new_tensor(largest), self.rtol).clamp_min(self.rtol)
        tolerance = max(eps**0.5, self.rtol)
        asymmetric = norms((matrix - matrix.T).flatten()) > tolerance * norms(matrix.flatten())
        unlike = norms(images - x @ matrix) > tolerance * largest * norms(x)

        columns = (
            residuals <= allowed,
            torch.isfinite(residuals),
            asymmetric | unlike,
            norms(parts[:, ~kept]) > self.rtol,
        )
        told = zip(_finite(rows), *(column.flatten().tolist() for column in columns), strict=True)
        return system.solution(
            Outcome(
                x=x.reshape(rhs.shape),
                statuses=[_status(*row) for row in told],
                iterations=0,
                residuals=residuals.T,
                negative=bool((eigenvalues < -rounding).any()),
            )
        )


def _finite(rows: Tensor) -> list[bool]:
    return [bool(ok) for ok in all_finite(rows).flatten().tolist()]


def _status(rhs: bool, solved: bool, finite: bool, no_matrix: bool, lost: bool) -> Status:
    if not rhs:
        return Status.NON_FINITE_RHS
    if no_matrix:
        return Status.NOT_SYMMETRIC
    if solved:
        return Status.CONVERGED
    if not finite:
        return Status.NON_FINITE_OPERATOR
    return Status.INCONSISTENT if lost else Status.STAGNATED
