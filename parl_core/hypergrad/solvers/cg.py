"""Conjugate gradients, plain and preconditioned: the direction is always built from the new residual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.accelerators import cuda_devices
from ...ops.registry import Op
from .cuda_cg import launch_on_cuda
from .drive import Iterate, launch
from .native_cg import launch_natively, native_operator
from .solution import LinearOperator, Solution, Status
from .system import Launch, Outcome, System, check_limits, dots, norms


@dataclass(frozen=True)
class CG:
    """Conjugate gradients (Hestenes & Stiefel, 1952) for a symmetric positive (semi-)definite operator.

    >>> import torch
    >>> diagonal = torch.tensor([1.0, 2.0, 4.0])
    >>> CG()(lambda v: diagonal * v, torch.ones(3)).value
    tensor([1.0000, 0.5000, 0.2500])
    """

    rtol: float = 1e-5
    """Ends when ‖b − A x‖ ≤ rtol·‖b‖, or where it has stopped falling within 10·rtol and within rounding of A x."""
    max_iterations: int = 200
    """At most this many iterations."""

    def __post_init__(self) -> None:
        check_limits(self.rtol, self.max_iterations)

    def __call__(self, operator: LinearOperator, rhs: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve operator(x) = rhs for rhs (P,) or (K, P), from x0 like it or from zero; one product an iteration."""
        system = System(operator, rhs, x0)
        return self.prepare(system)(system)()

    def prepare(self, system: System) -> Launch:
        """See `Recordable`."""

        def launched(system: System) -> Callable[[], Solution]:
            read = plain(system, rtol=self.rtol, max_iterations=self.max_iterations)
            return lambda: system.solution(read())

        return launched


def plain(system: System, *, rtol: float, max_iterations: int) -> Callable[[], Outcome]:
    """Conjugate gradients without a preconditioner, in compiled code where it can take the products by itself."""
    native = native_operator(system.operator, system.rhs)
    if native is not None:
        return launch_natively(native, system, rtol=rtol, max_iterations=max_iterations)
    kernel = _loop if system.rhs.dim() == 2 else _OP.kernel(_OP.select(system.rhs, None))
    return kernel(system, rtol=rtol, max_iterations=max_iterations)


def _loop(system: System, *, rtol: float, max_iterations: int) -> Callable[[], Outcome]:
    method = ConjugateGradients(precondition=lambda residual: residual)
    return launch(method, system, rtol=rtol, max_iterations=max_iterations)


_OP = Op("cg_vectors", _loop)  # what lies between the products of one right-hand side
_OP.register(
    "cuda",
    lambda: launch_on_cuda,
    device_types=cuda_devices(),
    dtypes=frozenset({torch.float32, torch.float64}),
)


@dataclass(frozen=True)
class _State(Iterate):
    residual: Tensor  # (…, P) r, as the recurrence has it
    direction: Tensor  # (…, P) p
    square: Tensor  # r·M⁻¹r


@dataclass(frozen=True)
class ConjugateGradients:
    """The method behind `CG` and `NystromPCG`; `precondition` applies M⁻¹, symmetric positive definite, to (…, P)."""

    precondition: Callable[[Tensor], Tensor]
    operator_norm: float = 0.0  # what is known of ‖A‖, from below
    halt_status = Status.BREAKDOWN
    residual_is_true = False

    def start(self, x: Tensor, residual: Tensor) -> _State:
        direction = self.precondition(residual)
        norm = norms(residual)
        no = torch.zeros_like(norm, dtype=torch.bool)
        known = torch.full_like(norm, self.operator_norm)
        return _State(x, norm, no, no, known, residual, direction, dots(residual, direction))

    def step(self, system: System, state: _State, rows: Sequence[int] | None) -> _State:
        image = system.product(state.direction, rows)
        curvature = dots(state.direction, image)
        length = norms(state.direction)
        operator_norm = torch.maximum(state.operator_norm, norms(image) / length)
        negligible = torch.finfo(image.dtype).eps * operator_norm * length**2
        halted = curvature.abs() <= negligible
        step = torch.where(halted, 0.0, state.square / curvature)
        residual = torch.addcmul(state.residual, step, image, value=-1.0)
        preconditioned = self.precondition(residual)
        square = dots(residual, preconditioned)
        return _State(
            x=torch.addcmul(state.x, step, state.direction),
            norm=norms(residual),
            negative=state.negative | (curvature < -negligible),
            halted=halted,
            residual=residual,
            direction=torch.addcmul(preconditioned, square / state.square, state.direction),
            square=square,
            operator_norm=operator_norm,
        )
