"""Conjugate gradients behind a randomised Nyström preconditioner.

How this differs from Frangella, Tropp & Udell's Algorithms 2.1 and 5.1, and why:
1. The sketch is taken of the operator without its damping (the damping is the operator's own and is read from it, never
   added), so that one sketch serves every damping.
2. Its core is inverted through its eigenvalues instead of a shifted Cholesky factorisation: an operator that is slightly
   indefinite, by noise in its samples, loses those directions instead of failing the solve.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cg import ConjugateGradients
from .drive import launch
from .solution import LinearOperator, Solution, damping_of
from .system import Launch, System, check_limits


@dataclass
class NystromPCG:
    """Preconditioned CG (Frangella, Tropp & Udell, "Randomized Nyström preconditioning", 2023).

    For A = K + damping·I with K positive semi-definite. The preconditioner knows K ≈ U Λ Uᵀ from `rank` products with
    random vectors and evens out those eigenvalues; iterations then grow with √((λ_rank + damping) / damping) instead of
    √(λ_1 / damping). Worth its products where K has few large eigenvalues or is solved with again and again.

    The sketch of the first solve is kept and used again, also when the operator has changed. A stale sketch is always
    correct: the preconditioner stays positive definite and the residual is the present operator's, so only the number of
    iterations suffers. Call `reset()` when `solution.iterations` has grown by more than `rank`. A change of P, dtype or
    device makes a new sketch by itself.

    Without damping the smallest sketched eigenvalue alone sets the level, as in the paper with μ = 0; directions whose
    curvature is lost in rounding are left out of the sketch.
    """

    rank: int = 20
    """Products spent on a sketch; at most P are. A little above the number of large eigenvalues."""
    rtol: float = 1e-5
    """Ends when ‖b − A x‖ ≤ rtol·‖b‖, or where it has stopped falling within 10·rtol and within rounding of A x."""
    max_iterations: int = 200
    """At most this many iterations."""
    seed: int = 0
    """Of the random vectors."""
    _sketch: _Sketch | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_limits(self.rtol, self.max_iterations)
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def reset(self) -> None:
        """Forget the sketch: the next solve makes one of its own operator."""
        self._sketch = None

    def __call__(self, operator: LinearOperator, rhs: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve operator(x) = rhs for rhs (P,) or (K, P), from x0 like it or from zero.

        One product an iteration, and `rank` for a sketch, which serves all K.
        """
        system = System(operator, rhs, x0)
        return self.prepare(system)(system)()

    def prepare(self, system: System) -> Launch:
        """See `Recordable`."""
        damping, sketch = damping_of(system.operator), self._sketch
        is_new = sketch is None or not sketch.fits(system.rhs)
        if sketch is None or is_new:
            sketch = self._sketch = _make_sketch(system, damping, self.rank, self.seed)
        method = ConjugateGradients(
            precondition=sketch.preconditioner(damping),
            # The preconditioner keeps the search away from the largest eigenvalues; of another operator they tell nothing.
            operator_norm=sketch.largest_curvature + damping if is_new else 0.0,
        )

        def launched(system: System) -> Callable[[], Solution]:
            read = launch(method, system, rtol=self.rtol, max_iterations=self.max_iterations)
            return lambda: finished(system.solution(read()))

        def finished(solution: Solution) -> Solution:
            if (
                not sketch.finite and self._sketch is sketch
            ):  # the solve has named the NaN; the next must not inherit it
                self.reset()
            seen = is_new and sketch.smallest_curvature < -damping  # of this operator, not of an earlier one
            return dataclasses.replace(solution, negative_curvature=solution.negative_curvature or seen)

        return launched


@dataclass(frozen=True)
class _Sketch:
    basis: Tensor  # (P, rank) U, orthonormal
    eigenvalues: Tensor  # (rank,) Λ, positive, descending
    smallest_curvature: float  # of K over the span of the random vectors; 0 if none is negative beyond rounding
    finite: bool

    @property
    def largest_curvature(self) -> float:
        return float(self.eigenvalues[0]) if self.eigenvalues.numel() else 0.0

    def fits(self, rhs: Tensor) -> bool:
        basis = self.basis
        return (basis.shape[0], basis.dtype, basis.device) == (rhs.shape[-1], rhs.dtype, rhs.device)

    def preconditioner(self, damping: float) -> Callable[[Tensor], Tensor]:
        """M⁻¹ on (…, P), M⁻¹ = U diag((λ_rank + μ) / (Λ + μ)) Uᵀ + (I − U Uᵀ): equation (1.3) of the paper."""
        if not self.eigenvalues.numel():
            return lambda residual: residual
        excess = (self.eigenvalues[-1] + damping) / (self.eigenvalues + damping) - 1.0
        return lambda residual: residual + (excess * (residual @ self.basis)) @ self.basis.T


def _make_sketch(system: System, damping: float, rank: int, seed: int) -> _Sketch:
    like = system.rhs
    size, eps = like.shape[-1], torch.finfo(like.dtype).eps
    nothing = _Sketch(like.new_zeros(size, 0), like.new_zeros(0), 0.0, finite=True)
    if size == 0:
        return nothing
    generator = torch.Generator(device=like.device).manual_seed(seed)
    vectors = torch.randn(size, min(rank, size), generator=generator, dtype=like.dtype, device=like.device)
    vectors = torch.linalg.qr(vectors)[0]  # (P, rank)
    images = system.product(vectors.T.contiguous()).T - damping * vectors  # (P, rank)
    if not bool(torch.isfinite(images).all()):
        return dataclasses.replace(nothing, finite=False)
    core = vectors.T @ images
    values, rotation = torch.linalg.eigh(0.5 * (core + core.T))
    rounding = size**0.5 * eps * (values.abs().max() + damping)
    kept = values > rounding
    if not bool(kept.any()):
        return dataclasses.replace(nothing, smallest_curvature=_beyond(values[0], rounding))
    root = images @ (rotation[:, kept] / values[kept].sqrt())  # root rootᵀ = K Ω (Ωᵀ K Ω)⁺ (K Ω)ᵀ
    basis, singular, _ = torch.linalg.svd(root, full_matrices=False)
    return _Sketch(basis, singular**2, _beyond(values[0], rounding), finite=True)


def _beyond(value: Tensor, rounding: Tensor) -> float:
    return float(torch.where(value < -rounding, value, 0.0))
