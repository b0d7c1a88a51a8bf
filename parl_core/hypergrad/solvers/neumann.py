"""The truncated Neumann series, in the form that keeps the true residual at hand.

x_{k+1} = x_k + η (b − A x_k) from x_0 = 0 is x_k = η Σ_{j<k} (I − ηA)^j b, at the same one product a term; here the
residual is never a recurrence's. Since ‖(I − ηA)^k r‖² is log-convex in k for symmetric A, a residual that has once risen
rises for ever: that is how divergence is told from slowness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .drive import Iterate, launch
from .solution import LinearOperator, Solution, Status
from .system import Launch, System, check_limits, dots, norms

_POWER_ITERATIONS = 10


@dataclass(frozen=True)
class Neumann:
    """x = η Σ_k (I − ηA)^k b for a symmetric positive (semi-)definite operator: gradient descent on ½xᵀAx − bᵀx.

    After k terms from zero the error is (I − ηA)^k times the solution, so it falls at best by (κ−1)/(κ+1) a product where
    CG's falls by (√κ−1)/(√κ+1): it is here for its predictable bias and for comparison with the papers that use it.

    >>> import torch
    >>> diagonal = torch.tensor([0.5, 1.0])
    >>> Neumann(step_size=1.0, max_iterations=3)(lambda v: diagonal * v, torch.ones(2)).value
    tensor([1.7500, 1.0000])
    """

    step_size: float | None = None
    """η; the series converges for 0 < η < 2 / λ_max. None: η = 1 / λ, λ the largest ‖A v‖ over 10 power iterations from
    a Gaussian vector of a fixed seed. They cost 10 products, and suffice whenever λ > λ_max / 2."""
    rtol: float = 1e-5
    """Ends when ‖b − A x‖ ≤ rtol·‖b‖."""
    max_iterations: int = 200
    """At most this many terms."""

    def __post_init__(self) -> None:
        check_limits(self.rtol, self.max_iterations)
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size must be positive and finite, or None, got {self.step_size}")

    def __call__(self, operator: LinearOperator, rhs: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve operator(x) = rhs for rhs (P,) or (K, P), from x0 like it or from zero; one product a term."""
        system = System(operator, rhs, x0)
        return self.prepare(system)(system)()

    def prepare(self, system: System) -> Launch:
        """See `Recordable`."""
        vector = _random_vector(system.rhs) if self.step_size is None else None

        def launched(system: System) -> Callable[[], Solution]:
            known = system.rhs.new_full((), self.step_size or 0.0)
            step_size = known if vector is None else _safe_step_size(system, vector)
            read = launch(_Richardson(step_size), system, rtol=self.rtol, max_iterations=self.max_iterations)
            return lambda: system.solution(read())

        return launched


def _random_vector(like: Tensor) -> Tensor:
    """(P,)"""
    generator = torch.Generator(device=like.device).manual_seed(0)
    return torch.randn(like.shape[-1], generator=generator, dtype=like.dtype, device=like.device)


def _safe_step_size(system: System, vector: Tensor) -> Tensor:
    """() 1 / (an estimate of the largest |eigenvalue|, from below); 0 where the operator is zero.

    By power iterations from `vector` (P,).
    """
    vector = vector / norms(vector)
    largest = vector.new_zeros(())
    for _ in range(_POWER_ITERATIONS):
        vector = system.product(vector)
        norm = norms(vector)
        largest = torch.maximum(largest, norm)
        vector = vector / torch.where(norm > 0, norm, 1.0)
    return torch.where(largest == 0, 0.0, 1.0 / largest)


@dataclass(frozen=True)
class _State(Iterate):
    residual: Tensor  # (…, P)
    smallest: Tensor  # the smallest residual norm so far


@dataclass(frozen=True)
class _Richardson:
    step_size: Tensor  # ()
    halt_status = Status.DIVERGED
    residual_is_true = True

    def start(self, x: Tensor, residual: Tensor) -> _State:
        norm = norms(residual)
        no = torch.zeros_like(norm, dtype=torch.bool)
        return _State(x, norm, no, no, torch.zeros_like(norm), residual, norm)

    def step(self, system: System, state: _State, rows: Sequence[int] | None) -> _State:
        x = torch.addcmul(state.x, self.step_size, state.residual)
        residual = system.residual(x, rows)
        norm = norms(residual)
        curvature = dots(state.residual, state.residual - residual)  # η rᵀA r
        rounding = torch.finfo(norm.dtype).eps * torch.clamp_min(torch.maximum(norm, norms(x) / self.step_size), 1.0)
        halted = torch.isfinite(norm) & (norm > 10.0 * state.smallest)
        return _State(
            x=torch.where(halted, state.x, x),
            norm=torch.where(halted, state.norm, norm),
            negative=state.negative | (curvature < -100.0 * rounding * state.norm),
            halted=halted,
            operator_norm=state.operator_norm,
            residual=torch.where(halted, state.residual, residual),
            smallest=torch.minimum(state.smallest, norm),
        )
