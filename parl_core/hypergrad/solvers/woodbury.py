"""The exact solve of a system that is a few outer products and a multiple of the identity, in the space of its rows.

How this differs from the textbook's formula (diag(c)⁻¹ + R Rᵀ / damping)⁻¹, and why:
1. It goes through the eigenvalues λ of Rᵀ diag(c) R, from those of the k × k matrix of the rows' inner products. So a row
   that is zero or there twice does no harm, damping may be 0, and the sign of every eigenvalue of A is known.
2. With the eigenvectors W = Rᵀ T applied and never formed, x = W₁ (λ₁ + damping)⁻¹ p₁ + (b − W₁ p₁) / damping
   − W₂ (λ₂ / (damping (λ₂ + damping))) p₂ for the parts p of b along them: W₁ where |λ| ≥ damping, so that no small
   damping multiplies the rounding of a large λ, W₂ where it is smaller, so that a direction which rounding has all but
   lost has its errors multiplied by λ. W is not orthonormal to rounding, so p₁ is taken off b until nothing is left.
3. All of that is float64, where inner products resolve all that products with A in float32 could. The residual that
   decides is b − A x by the operator itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .solution import LinearOperator, OuterProducts, Solution, Status, damping_of
from .system import Outcome, System, as_rows, check_rtol, norms, rounding_allowance, true_rows

_REFINEMENTS = 2
_PASSES = 3


@dataclass(frozen=True)
class Woodbury:
    """Solves A = Rᵀ diag(c) R + damping·I exactly, for an operator that tells its k rows by `outer_products()`.

    Costs the rows, O(k²P + k³) in float64 with a float64 copy of the rows, and one product for the true residual, for any
    number of right-hand sides; where that residual is above rtol, up to two steps of iterative refinement with the same
    factors, at one product each. With k ≥ P the P × P matrix is formed instead.

    The weights c may have either sign. Without damping a consistent system gets its minimum-norm solution, and one that
    is not ends as INCONSISTENT with the minimum-norm least-squares solution. Eigenvalues of A that are lost in rounding,
    below max(10, √k)·eps·|largest|, count as zero unless the damping makes them count. What b has outside the rows' space
    is left out where it is no more than b's own rounding, since the damping may be smaller still.

    >>> import torch
    >>> class Operator:
    ...     rows, damping = torch.tensor([[3.0, 4.0]]), 0.5
    ...     def outer_products(self):
    ...         return OuterProducts(self.rows, torch.tensor([0.1]), cost=1.0)
    ...     def __call__(self, v):
    ...         return 0.1 * self.rows.T @ (self.rows @ v) + self.damping * v
    >>> Woodbury()(Operator(), torch.tensor([3.0, 4.0])).value
    tensor([1.0000, 1.3333])
    """

    rtol: float = 1e-5
    """Refines where ‖b − A x‖ > rtol·‖b‖, and does not call itself converged there, but for rounding of A x within
    10·rtol."""

    def __post_init__(self) -> None:
        check_rtol(self.rtol)

    def __call__(self, operator: LinearOperator, rhs: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve operator(x) = rhs for rhs (P,) or (K, P); x0 is not needed and only checked.

        Raises:
            TypeError: the operator has no `outer_products`.
            ValueError: the outer products are not of the form that `OuterProducts` describes, or not like rhs.
        """
        system, damping = System(operator, rhs, x0), damping_of(operator)
        terms = _terms(operator, rhs)
        right = as_rows(system.rhs)
        finite = torch.isfinite(right).all(-1).tolist()
        if not all(bool(torch.isfinite(t).all()) for t in (terms.rows, terms.weights)):
            statuses = [Status.NON_FINITE_OPERATOR if ok else Status.NON_FINITE_RHS for ok in finite]
            nothing = torch.full_like(rhs, float("nan"))
            residuals = right.new_full((1, right.shape[0]), float("nan"))
            return system.solution(Outcome(nothing, statuses, 0, residuals, negative=False), terms.cost)

        factor = _factorise(terms, damping, torch.finfo(rhs.dtype).eps)
        x, lost = factor.solve(right)
        history, x = _refine(system, factor, x, lost <= self.rtol, self.rtol)

        norm = history[-1].new_tensor(factor.operator_norm)
        allowed = rounding_allowance(x, norm, self.rtol).flatten().tolist()

        def status(row: int) -> Status:
            residual = float(history[-1][row])
            if residual <= max(self.rtol, allowed[row]):
                return Status.CONVERGED
            if not residual < float("inf"):
                return Status.NON_FINITE_OPERATOR if finite[row] else Status.NON_FINITE_RHS
            return Status.INCONSISTENT if float(lost[row]) > self.rtol else Status.STAGNATED

        outcome = Outcome(
            x=x.reshape(rhs.shape),
            statuses=[status(row) for row in range(right.shape[0])],
            iterations=len(history) - 1,
            residuals=torch.stack(history).squeeze(-1),
            negative=factor.negative,
        )
        return system.solution(outcome, terms.cost)


def _refine(system: System, factor: _Factor, x: Tensor, solvable: Tensor, rtol: float) -> tuple[list[Tensor], Tensor]:
    """The true residual norms (K, 1) before and after each refinement, and the x (K, P) of the smallest."""
    right = as_rows(system.rhs)
    every = list(range(right.shape[0]))
    finite = true_rows(torch.isfinite(norms(x)))
    residual = right - system.product(x, None if finite == every else finite)
    norm = norms(residual)
    history, worthwhile = [norm], solvable & torch.isfinite(norm)
    while len(history) <= _REFINEMENTS:
        rows = true_rows(worthwhile & (norm > rtol))
        if not rows:
            break
        refined = x + factor.solve(residual)[0]
        left = right - system.product(refined, rows)
        chosen = torch.zeros_like(worthwhile)
        chosen[rows] = norms(left)[rows] < norm[rows]
        x, residual = torch.where(chosen, refined, x), torch.where(chosen, left, residual)
        norm = norms(residual)
        history.append(norm)
        worthwhile = chosen
    return history, x


@dataclass(frozen=True)
class _Factor:
    """A = W diag(λ) Wᵀ + damping·I, with W = rowsᵀ T of orthonormal columns."""

    rows: Tensor  # (k, P) float64
    transform: Tensor  # (k, r) T
    values: Tensor  # (r,) λ
    kept: Tensor  # (r,) bool: where λ + damping is not lost in rounding
    damping: float
    operator_norm: float  # the largest |eigenvalue| of A
    complete: bool  # whether W spans everything
    rounding: float  # of a right-hand side in its own dtype, relative to its norm
    negative: bool

    def solve(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """x (K, P) for b (K, P), and the norm (K, 1) of what of b no x can reach, relative to ‖b‖."""
        b = right.double()
        large = self.values.abs() >= abs(self.damping)
        rest, parts = b, torch.zeros_like(self._parts(b))
        for _ in range(_PASSES):
            step = self._parts(rest) * large
            parts, rest = parts + step, rest - self._back(step)
        small = self._parts(rest) * ~large
        parts = parts + small  # (K, r)
        outside, size = norms(rest - self._back(small)), norms(b)

        inverse = torch.where(self.kept, 1.0 / torch.where(self.kept, self.values + self.damping, 1.0), 0.0)
        x, lost = self._back(parts * inverse), norms(parts[:, ~self.kept])
        if self.damping and not self.complete:
            rest = rest / self.damping
            general = self._back(torch.where(large, parts * inverse, small * (inverse - 1.0 / self.damping))) + rest
            x = torch.where(outside <= self.rounding * size, x, general)
        else:
            lost = torch.hypot(lost, outside)
        return x.to(right.dtype), lost / torch.where(size > 0, size, 1.0)

    def _parts(self, vectors: Tensor) -> Tensor:
        return (vectors @ self.rows.T) @ self.transform

    def _back(self, parts: Tensor) -> Tensor:
        return (parts @ self.transform.T) @ self.rows


def _factorise(terms: OuterProducts, damping: float, eps: float) -> _Factor:
    rows, weights = terms.rows.double(), terms.weights.double()
    number, size = rows.shape
    if number >= size:
        values, vectors = torch.linalg.eigh(rows.T @ (weights[:, None] * rows))
        rows, transform = vectors.T, torch.eye(size, dtype=rows.dtype, device=rows.device)
    else:
        values, transform = _in_the_space_of_rows(rows, weights)
    eigenvalues = values + damping
    largest = float(eigenvalues.abs().max()) if eigenvalues.numel() else 0.0
    rounding = max(10.0, number**0.5) * eps * max(largest, abs(damping))
    kept = eigenvalues.abs() > (min(rounding, 0.5 * abs(damping)) if damping else rounding)
    complete = eigenvalues.shape[0] == size
    return _Factor(
        rows=rows,
        transform=transform,
        values=values,
        kept=kept,
        damping=damping,
        operator_norm=max(largest, 0.0 if complete else abs(damping)),
        complete=complete,
        rounding=max(10.0, size**0.5) * eps,
        negative=bool((eigenvalues < -rounding).any()) or (damping < 0 and not complete),
    )


def _in_the_space_of_rows(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """λ (r,) of Rᵀ diag(c) R where it is not zero by construction, and T (k, r) with Rᵀ T the orthonormal eigenvectors.

    With D = √|c| and D R Rᵀ D = U S² Uᵀ, Q = Rᵀ D U S⁻¹ is orthonormal and Qᵀ Rᵀ diag(c) R Q = S Uᵀ diag(sign c) U S.
    """
    root, signs = weights.abs().sqrt(), weights.sign()
    squares, vectors = torch.linalg.eigh(root[:, None] * (rows @ rows.T) * root)
    floor = max(10, rows.shape[0]) * torch.finfo(rows.dtype).eps * (squares.max() if squares.numel() else 0.0)
    real = squares > floor
    singular, vectors = squares[real].sqrt(), vectors[:, real]
    transform = root[:, None] * vectors / singular
    if bool((weights >= 0).all()):
        return squares[real], transform
    core = singular[:, None] * (vectors.T @ (signs[:, None] * vectors)) * singular
    values, rotation = torch.linalg.eigh(0.5 * (core + core.T))
    return values, transform @ rotation


def _terms(operator: LinearOperator, rhs: Tensor) -> OuterProducts:
    outer_products: Callable[[], OuterProducts] | None = getattr(operator, "outer_products", None)
    if not callable(outer_products):
        raise TypeError(
            "Woodbury needs an operator that tells its outer products, by a method outer_products(): the curvature "
            "Fisher(scores='trajectories') has it; CG and NystromPCG serve the rest. "
            f"Got {getattr(operator, '__name__', type(operator).__name__)}"
        )
    terms = outer_products()
    rows, weights, size = terms.rows, terms.weights, rhs.shape[-1]
    if rows.dim() != 2 or rows.shape[1] != size or not rows.is_floating_point():
        raise ValueError(
            f"outer_products().rows must be floating-point of shape (k, {size}), "
            f"got {rows.dtype} of shape {tuple(rows.shape)}"
        )
    if weights.shape != rows.shape[:1] or not weights.is_floating_point():
        raise ValueError(
            f"outer_products().weights must be floating-point of shape ({rows.shape[0]},), one for each row, "
            f"got {weights.dtype} of shape {tuple(weights.shape)}"
        )
    return terms
