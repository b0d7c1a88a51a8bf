"""The oracle: the matrix itself, from P products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .drive import System, check_vector
from .solution import LinearOperator, Solution, Status, damping_of


@dataclass(frozen=True)
class Dense:
    """Forms the matrix from P products and solves through its eigenvalues: the oracle for small P.

    Directions whose eigenvalue is lost in the rounding of the products, below √P·eps·|largest|, are treated as the null
    space and left at zero (minimum norm), unless the operator's own damping makes them count.
    """

    def __call__(self, operator: LinearOperator, rhs: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve operator(x) = rhs for rhs (P,); x0 is not needed and only checked."""
        system = System(operator, rhs)
        if x0 is not None:
            check_vector("x0", x0, like=rhs)
        size, eps = rhs.shape[0], torch.finfo(rhs.dtype).eps
        identity = torch.eye(size, dtype=rhs.dtype, device=rhs.device)
        matrix = torch.stack([system.product(column) for column in identity]) if size else identity
        status, negative = Status.CONVERGED, False
        if not bool(torch.isfinite(rhs).all()):
            status, value = Status.NON_FINITE_RHS, torch.full_like(rhs, float("nan"))
        elif not bool(torch.isfinite(matrix).all()):
            status, value = Status.NON_FINITE_OPERATOR, torch.full_like(rhs, float("nan"))
        else:
            eigenvalues, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.T).double())
            rounding = max(10.0, size**0.5) * eps * (float(eigenvalues.abs().max()) if size else 0.0)
            damping = damping_of(operator)
            kept = eigenvalues.abs() > (min(rounding, 0.5 * damping) if damping else rounding)
            inverse = torch.where(kept, 1.0 / torch.where(kept, eigenvalues, 1.0), 0.0)
            parts = vectors.T @ system.rhs.double()
            value = (vectors @ (inverse * parts)).to(rhs.dtype)
            negative = bool((eigenvalues < -rounding).any())
            if float(parts[~kept].norm()) > eps**0.75:
                status = Status.INCONSISTENT
        residual = (system.rhs - matrix @ value).norm()
        return Solution(
            value=system.unscaled(value),
            status=status,
            iterations=0,
            residuals=residual.reshape(1),
            damping=damping_of(operator),
            negative_curvature=negative,
            products=system.products,
        )
