"""The oracle: the matrix itself, from P products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .solution import LinearOperator, Solution, Status, damping_of
from .system import Outcome, System, all_finite, as_rows, norms


@dataclass(frozen=True)
class Dense:
    """Forms the matrix from P products and solves through its eigenvalues: the oracle for small P.

    Directions whose eigenvalue is lost in the rounding of the products, below √P·eps·|largest|, are treated as the null
    space and left at zero (minimum norm), unless the operator's own damping makes them count.
    """

    def __call__(self, operator: LinearOperator, rhs: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve operator(x) = rhs for rhs (P,) or (K, P); x0 is not needed and only checked."""
        system = System(operator, rhs, x0)
        size, eps = rhs.shape[-1], torch.finfo(rhs.dtype).eps
        identity = torch.eye(size, dtype=rhs.dtype, device=rhs.device)
        # One by one: all P at once could take more memory than the matrix by far.
        matrix = torch.stack([system.product(column) for column in identity]) if size else identity
        rows = as_rows(system.rhs)
        finite = all_finite(rows).flatten().tolist()
        statuses = [Status.CONVERGED if ok else Status.NON_FINITE_RHS for ok in finite]
        x, negative = torch.full_like(rows, float("nan")), False
        if not bool(torch.isfinite(matrix).all()):
            statuses = [Status.NON_FINITE_OPERATOR if ok else Status.NON_FINITE_RHS for ok in finite]
        else:
            eigenvalues, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.T).double())
            rounding = max(10.0, size**0.5) * eps * (float(eigenvalues.abs().max()) if size else 0.0)
            damping = damping_of(operator)
            kept = eigenvalues.abs() > (min(rounding, 0.5 * damping) if damping else rounding)
            inverse = torch.where(kept, 1.0 / torch.where(kept, eigenvalues, 1.0), 0.0)
            parts = rows.double() @ vectors
            x = ((inverse * parts) @ vectors.T).to(rhs.dtype)
            negative = bool((eigenvalues < -rounding).any())
            for row, lost in enumerate(norms(parts[:, ~kept]).flatten().tolist()):
                if lost > eps**0.75:
                    statuses[row] = Status.INCONSISTENT
        residuals = norms(rows - x @ matrix.T).T
        return system.solution(
            Outcome(x.reshape(rhs.shape), statuses, iterations=0, residuals=residuals, negative=negative)
        )
