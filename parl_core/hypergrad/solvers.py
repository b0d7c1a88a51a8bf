"""Solvers for A x = b with A symmetric and given only by its products.

How the conjugate gradients here differ from the textbook's, and why:
1. Convergence is decided on the true residual b − A x. The recurrence's residual only says when to look; if the true one
   disagrees, the iteration starts again from it. (Rounding makes the two drift apart in float32.)
2. Every scalar stays on the device. On the CPU reading one is free, so the loop leaves early; elsewhere it runs its full
   count with frozen iterates after convergence, and the host waits once, at the end.
3. A NaN stays a NaN, and the status says whether the right-hand side or a product brought it.
4. Negative curvature pᵀA p < 0 is recorded and the iteration goes on: the true residual still decides, and the caller
   learns that A is not positive definite.
5. A start at zero costs no product.
6. The system is solved for b / max|b|, so that squared norms neither vanish nor overflow in float32.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

LinearOperator = Callable[[Tensor], Tensor]


class Status(enum.Enum):
    """How a solve ended. `message` says what happened and what to do about it."""

    CONVERGED = "the true residual is within rtol"
    MAX_ITERATIONS = (
        "max_iterations was reached before rtol: raise max_iterations, loosen rtol, or add damping if the residuals "
        "have stopped falling"
    )
    STAGNATED = (
        "the residual stopped falling above rtol: the precision of this dtype is used up or the system is singular; "
        "use float64, loosen rtol or add damping"
    )
    BREAKDOWN = (
        "a search direction with no curvature was met: the system is singular along it; add damping, or use an entropy "
        "temperature that makes the lower problem strongly concave"
    )
    NON_FINITE_RHS = "the right-hand side holds a NaN or an infinity: look at the upper loss and at the policy's scores"
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
        """Whether the value solves the system to the tolerance asked for."""
        return self is Status.CONVERGED


@dataclass
class Solution:
    """What a solver returns."""

    value: Tensor
    """(P,) the solution, or the last iterate when `status` is not CONVERGED; NaN where a NaN came in."""
    status: Status
    """How the solve ended."""
    iterations: int
    """Iterations taken."""
    residuals: Tensor
    """(iterations + 1,) relative residuals ‖b − A x‖ / ‖b‖ by iteration; the last one is the true residual."""
    damping: float
    """The multiple of the identity that the operator holds, if it says so; 0 otherwise."""
    negative_curvature: bool
    """Whether a direction with pᵀA p < 0 was met: A is not positive definite there."""
    products: int = 0
    """Products with the operator, those for true residuals included."""


class Solver(Protocol):
    """Any callable of this form can be passed as `solver`."""

    def __call__(self, operator: LinearOperator, rhs: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve operator(x) = rhs."""
        ...


@dataclass(frozen=True)
class CG:
    """Conjugate gradients (Hestenes & Stiefel, 1952) for a symmetric positive (semi-)definite operator."""

    rtol: float = 1e-5
    """Ends when ‖b − A x‖ ≤ rtol·‖b‖."""
    max_iterations: int = 200
    """At most this many iterations."""

    def __post_init__(self) -> None:
        if not self.rtol > 0:
            raise ValueError(f"rtol must be positive, got {self.rtol}")
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {self.max_iterations}")

    def __call__(self, operator: LinearOperator, rhs: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve operator(x) = rhs for rhs (P,), from x0 (P,) or from zero."""
        _check_vector("rhs", rhs)
        size = rhs.abs().max() if rhs.numel() else rhs.new_ones(())
        size = torch.where(size > 0, size, 1.0)
        state = _CGState(operator, rhs / size, None if x0 is None else x0 / size)
        can_look = rhs.device.type == "cpu"
        status = Status.MAX_ITERATIONS
        best = float("inf")
        while True:
            state.run(self.rtol, self.max_iterations, can_look)
            residual = state.true_residual()
            if residual <= self.rtol:
                status = Status.CONVERGED
            elif not residual < float("inf"):
                status = Status.NON_FINITE_OPERATOR if bool(torch.isfinite(rhs).all()) else Status.NON_FINITE_RHS
            elif state.broke_down:
                status = Status.BREAKDOWN
            elif state.iterations < self.max_iterations and can_look:
                if residual < 0.5 * best:
                    best = residual
                    continue
                status = Status.STAGNATED
            break
        return Solution(
            value=state.x * size if status is not Status.NON_FINITE_RHS else torch.full_like(rhs, float("nan")),
            status=status,
            iterations=state.iterations,
            residuals=torch.stack(state.residuals).to(rhs.dtype),
            damping=float(getattr(operator, "damping", 0.0)),
            negative_curvature=bool(state.negative),
            products=state.products,
        )


@dataclass
class _CGState:
    operator: LinearOperator
    rhs: Tensor
    x0: Tensor | None
    iterations: int = 0
    products: int = 0
    broke_down: bool = False
    residuals: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        norm = self.rhs.norm()
        self.scale = torch.where(norm > 0, norm, torch.ones_like(norm))
        self.negative = torch.zeros((), dtype=torch.bool, device=self.rhs.device)
        if self.x0 is None:
            self.x = torch.zeros_like(self.rhs)
            self.residual = self.rhs.clone()
        else:
            _check_vector("x0", self.x0, like=self.rhs)
            self.x = self.x0.clone()
            self.residual = self.rhs - self._product(self.x)
        self.residuals.append(self.residual.norm() / self.scale)

    def run(self, rtol: float, max_iterations: int, can_look: bool) -> None:
        """Iterate from the present residual until the recurrence's residual is within rtol or the count is used up."""
        direction = self.residual.clone()
        square = self.residual.dot(self.residual)
        target = (rtol * self.scale) ** 2
        tiny = torch.finfo(self.rhs.dtype).eps
        while self.iterations < max_iterations:
            active = ~(square <= target)
            if can_look and (not bool(active) or not bool(torch.isfinite(square))):
                return
            image = self._product(direction)
            curvature = direction.dot(image)
            negligible = tiny * direction.norm() * image.norm()
            self.negative |= active & (curvature < -negligible)
            flat = curvature.abs() <= negligible
            if can_look and bool(flat):
                self.broke_down = True
                return
            step = torch.where(active & ~flat, square / curvature, torch.zeros_like(square))
            self.x = torch.addcmul(self.x, step, direction)
            self.residual = torch.addcmul(self.residual, step, image, value=-1.0)
            fresh = self.residual.dot(self.residual)
            ratio = torch.where(active, fresh / square, torch.zeros_like(square))
            direction = torch.addcmul(self.residual, ratio, direction)
            square = fresh
            self.iterations += 1
            self.residuals.append(square.sqrt() / self.scale)

    def true_residual(self) -> float:
        """Recompute b − A x, put it in place of the recurrence's, and return its relative norm."""
        if self.iterations or self.x0 is not None:
            self.residual = self.rhs - self._product(self.x)
        relative = self.residual.norm() / self.scale
        self.residuals[-1] = relative
        return float(relative)

    def _product(self, vector: Tensor) -> Tensor:
        self.products += 1
        image = self.operator(vector)
        if image.shape != vector.shape:
            raise ValueError(f"operator must map (P,) to (P,), got {tuple(image.shape)} from {tuple(vector.shape)}")
        return image


@dataclass(frozen=True)
class Dense:
    """Forms the matrix from P products and solves through its eigenvalues: the oracle for small P.

    Directions whose eigenvalue is below P·eps·|largest| are treated as the null space and left at zero (minimum norm).
    """

    def __call__(self, operator: LinearOperator, rhs: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve operator(x) = rhs for rhs (P,); x0 is not needed and only checked."""
        _check_vector("rhs", rhs)
        if x0 is not None:
            _check_vector("x0", x0, like=rhs)
        size = rhs.shape[0]
        identity = torch.eye(size, dtype=rhs.dtype, device=rhs.device)
        matrix = torch.stack([operator(column) for column in identity]) if size else identity
        scale = rhs.norm().clamp_min(torch.finfo(rhs.dtype).tiny)
        status, negative = Status.CONVERGED, False
        if not bool(torch.isfinite(rhs).all()):
            status, value = Status.NON_FINITE_RHS, torch.full_like(rhs, float("nan"))
        elif not bool(torch.isfinite(matrix).all()):
            status, value = Status.NON_FINITE_OPERATOR, torch.full_like(rhs, float("nan"))
        else:
            symmetric = 0.5 * (matrix + matrix.T)
            eigenvalues, vectors = torch.linalg.eigh(symmetric)
            cutoff = size * torch.finfo(rhs.dtype).eps * (eigenvalues.abs().max() if size else 0.0)
            kept = eigenvalues.abs() > cutoff
            inverse = torch.where(kept, 1.0 / torch.where(kept, eigenvalues, 1.0), 0.0)
            value = vectors @ (inverse * (vectors.T @ rhs))
            negative = bool((eigenvalues < -cutoff).any())
        residual = (rhs - matrix @ value).norm() / scale
        if status is Status.CONVERGED and float(residual) > torch.finfo(rhs.dtype).eps ** 0.5:
            status = Status.BREAKDOWN
        return Solution(
            value=value,
            status=status,
            iterations=0,
            residuals=residual.reshape(1),
            damping=float(getattr(operator, "damping", 0.0)),
            negative_curvature=negative,
            products=size,
        )


def _check_vector(name: str, vector: Tensor, like: Tensor | None = None) -> None:
    if vector.dim() != 1 or not vector.is_floating_point():
        raise ValueError(
            f"{name} must be a real floating-point vector (P,), got {vector.dtype} of shape {tuple(vector.shape)}"
        )
    if like is not None and (vector.shape != like.shape or vector.dtype != like.dtype):
        raise ValueError(
            f"{name} must be like rhs, {like.dtype} of shape {tuple(like.shape)}, "
            f"got {vector.dtype} of shape {tuple(vector.shape)}"
        )
