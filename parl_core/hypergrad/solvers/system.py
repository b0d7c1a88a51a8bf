"""The linear system inside a solver: one right-hand side or K side by side, scaled, with the products counted.

Throughout, a vector is (P,) with scalars () for one right-hand side, and (K, P) with scalars (K, 1) for K of them, so that
the methods are written once; `(…, P)` stands for either. Nothing is spent on an axis of one: P is often small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .solution import LinearOperator, Solution, Status, damping_of


@dataclass(frozen=True)
class Outcome:
    """How the systems ended, in the units of the scaled systems."""

    x: Tensor  # (…, P)
    statuses: list[Status]  # K of them, K = 1 for a single right-hand side
    iterations: int
    residuals: Tensor  # (iterations + 1, K)
    negative: bool
    operator_norm: Tensor | None = None  # () or (K, 1), the largest ‖A p‖ / ‖p‖ seen, from an iterative solver


class System:
    """A x = b, or one such system for each row of a block, scaled to ‖b‖ = 1, and the count of the products spent."""

    def __init__(self, operator: LinearOperator, rhs: Tensor, x0: Tensor | None = None) -> None:
        check_vectors("rhs", rhs)
        if x0 is not None:
            check_vectors("x0", x0, like=rhs)
            x0 = x0.detach()
        rhs = rhs.detach()  # a solution is a number; what it depends on is the caller's affair
        self.operator = operator
        block = getattr(operator, "block", None)
        self._block = block if callable(block) else None
        self.products = 0
        size = _largest(rhs)
        self._size = torch.where(size > 0, size, 1.0)
        norm = norms(rhs / self._size)
        self._norm = torch.where(norm > 0, norm, 1.0)
        self.rhs = self.scaled(rhs)
        self.x0 = x0

    def scaled(self, vectors: Tensor) -> Tensor:
        """In the units of the scaled system; in two factors, since their product may leave float32's range."""
        return vectors / self._size / self._norm

    def unscaled(self, vectors: Tensor) -> Tensor:
        """Back in the caller's units."""
        return vectors * self._norm * self._size

    def product(self, vectors: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """A v for each of the vectors (…, P); with `rows`, for those of a block alone, and zeros for the others."""
        if vectors.dim() == 1:
            self.products += 1
            return self._image(vectors)
        if rows is None:
            return self._images(vectors)
        images = torch.zeros_like(vectors)
        images[rows] = self._images(vectors[rows])
        return images

    def residual(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """b − A x for each row; meaningful only in `rows`, if they are given."""
        return self.rhs - self.product(x, rows)

    def solution(self, outcome: Outcome, rows_cost: float = 0.0) -> Solution:
        """What the caller gets; `rows_cost` is what was spent beside the products, in gradient equivalents."""
        value, statuses = self.unscaled(outcome.x), list(outcome.statuses)
        finite = all_finite(value).flatten().tolist()
        for row, status in enumerate(statuses):
            if not finite[row] and status not in NON_FINITE:
                statuses[row] = Status.OVERFLOW
        useless = [row for row, status in enumerate(statuses) if status in NON_FINITE or status is Status.OVERFLOW]
        if useless:
            as_rows(value)[useless] = float("nan")
        cost = getattr(self.operator, "cost", None)
        return Solution(
            value=value,
            status=worst(statuses),
            iterations=outcome.iterations,
            residuals=outcome.residuals if value.dim() == 2 else outcome.residuals[:, 0],
            damping=damping_of(self.operator),
            negative_curvature=outcome.negative,
            products=self.products,
            cost=None if cost is None else self.products * float(cost) + rows_cost,
        )

    def _images(self, vectors: Tensor) -> Tensor:
        number = vectors.shape[0]
        self.products += number
        if number == 1:
            return self._image(vectors[0])[None]
        if self._block is None:
            return torch.stack([self._image(vector) for vector in vectors]) if number else torch.zeros_like(vectors)
        images = self._block(vectors)
        if images.shape != vectors.shape:
            raise ValueError(
                f"operator.block must map (K, P) to (K, P), got {tuple(images.shape)} from {tuple(vectors.shape)}"
            )
        return images

    def _image(self, vector: Tensor) -> Tensor:
        image = self.operator(vector)
        if image.shape != vector.shape:
            raise ValueError(f"operator must map (P,) to (P,), got {tuple(image.shape)} from {tuple(vector.shape)}")
        return image


NON_FINITE = (Status.NON_FINITE_RHS, Status.NON_FINITE_START, Status.NON_FINITE_OPERATOR)


def worst(statuses: Sequence[Status]) -> Status:
    """The one that comes last in `Status`, which is in the order of severity; CONVERGED of none."""
    order = list(Status)
    return max(statuses, key=order.index, default=Status.CONVERGED)


def rounding_allowance(x: Tensor, operator_norm: Tensor, rtol: float) -> Tensor:
    """What of a residual is rounding of A x rather than an error of x, () or (K, 1), for ‖b‖ = 1.

    4·eps·‖A‖·‖x‖: who stops there has solved a system that differs from A by rounding (Rigal & Gaches, 1967; Paige &
    Saunders end LSQR by the same rule). Conjugate gradients and MINRES in float32, on full matrices of 50 to 2000 rows,
    stop falling at .2 to 1.9 of eps·‖A‖·‖x‖, with ‖A‖ as they have seen it. A large x excuses nothing beyond a
    condition of 1000, that of the automatic damping, and nothing makes up for a residual above 10·rtol.
    """
    condition = (operator_norm * norms(x)).clamp_max(1000.0)
    return (4.0 * torch.finfo(x.dtype).eps * condition).clamp_max(10.0 * rtol)


def dots(left: Tensor, right: Tensor) -> Tensor:
    """(…, P), (…, P) -> () or (K, 1), row by row."""
    if left.dim() == 1:
        return left.dot(right)
    return torch.linalg.vecdot(left, right).unsqueeze(-1)


def norms(vectors: Tensor) -> Tensor:
    """(…, P) -> () or (K, 1), row by row."""
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=vectors.dim() == 2)


def all_finite(vectors: Tensor) -> Tensor:
    """(…, P) -> () or (K, 1) bool, row by row."""
    return torch.isfinite(_largest(vectors))  # a tenth of the time of isfinite on every element


def _largest(vectors: Tensor) -> Tensor:
    return vectors.abs().amax(-1, keepdim=vectors.dim() == 2) if vectors.numel() else norms(vectors)


def as_rows(vectors: Tensor) -> Tensor:
    """(…, P) -> (K, P), a view, with K = 1 for a single vector."""
    return vectors[None] if vectors.dim() == 1 else vectors


def true_rows(condition: Tensor) -> list[int]:
    """The rows where a condition, () or (K, 1), holds; the host waits for it."""
    if condition.dim() == 0:
        return [0] if condition else []
    return [row for row, holds in enumerate(condition.flatten().tolist()) if holds]


def check_vectors(name: str, vectors: Tensor, like: Tensor | None = None) -> None:
    """Refuse what is neither a real vector nor a block of them, or not of the dtype, shape and device of `like`."""
    if vectors.dim() not in (1, 2) or not vectors.is_floating_point():
        raise ValueError(
            f"{name} must be a real floating-point vector (P,) or a block (K, P) of them, "
            f"got {vectors.dtype} of shape {tuple(vectors.shape)}"
        )
    if like is not None and _kind(vectors) != _kind(like):
        expected, got = ("{} of shape {} on {}".format(*_kind(each)) for each in (like, vectors))
        raise ValueError(f"{name} must be like rhs, {expected}, got {got}")


def _kind(vectors: Tensor) -> tuple[torch.dtype, tuple[int, ...], torch.device]:
    return vectors.dtype, tuple(vectors.shape), vectors.device


Launch = Callable[[System], Callable[[], Solution]]
"""A solve in two parts: all of its computations, and a function, which it returns, that reads how they ended.

On an accelerator the first part reads nothing but whether a loop of `repeat` goes on, and not even that where a CUDA graph
is captured, so that graphs can hold it.
"""


class Recordable(Protocol):
    """A solver whose computations can be told apart from what reads them: CG, PCG, NystromPCG, MINRES, Neumann."""

    def prepare(self, system: System) -> Launch:
        """Make for `system` what takes reading the device, such as a preconditioner; it serves later solves too."""
        ...


def check_rtol(rtol: float) -> None:
    """Refuse a tolerance under which nothing could converge."""
    if not isinstance(rtol, float | int) or not rtol > 0:
        raise ValueError(f"rtol must be a positive number, got {rtol!r}")


def check_limits(rtol: float, max_iterations: int) -> None:
    """Refuse limits under which nothing could converge."""
    check_rtol(rtol)
    if not isinstance(max_iterations, int) or max_iterations < 1:
        raise ValueError(f"max_iterations must be an integer of at least 1, got {max_iterations!r}")
