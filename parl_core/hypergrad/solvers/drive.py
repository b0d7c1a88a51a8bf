"""The loop around every iterative solver. A method supplies `start` and `step`; this file decides when it is over.

How this differs from a textbook's loop, and why:
1. Convergence is decided on the true residual b − A x. A recurrence's residual only says when to look. The true one is
   also recomputed every 50 iterations; only if it is more than twice what the recurrence claims (or above rtol where the
   recurrence claims convergence) does the method start again from it, so that conjugacy is kept where nothing drifted.
   Three restarts in a row that do not halve the residual end the solve.
2. Every scalar stays on the device. On the CPU reading one is free, so the loop leaves early; elsewhere it runs its full
   count with the state frozen once it is over, and the host waits once, at the end.
3. A NaN stays a NaN, and the status says whether the right-hand side, the start or a product brought it.
4. Negative curvature is recorded and the iteration goes on: the true residual still decides, and the caller learns that
   A is not positive definite.
5. A start at zero costs no product.
6. The system is solved for b / ‖b‖, so that squared norms neither vanish nor overflow in float32.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from .solution import LinearOperator, Solution, Status, damping_of

CHECK_EVERY = 50
PATIENCE = 3


@dataclass(frozen=True)
class Iterate:
    """What every method keeps from one step to the next; a method adds its own fields."""

    x: Tensor  # (P,)
    norm: Tensor  # () ‖b − A x‖, true or as the recurrence has it, for ‖b‖ = 1
    negative: Tensor  # () bool: a direction of negative curvature was met
    halted: Tensor  # () bool: the method cannot go on; x is the last good iterate


State = TypeVar("State", bound=Iterate)


class Method(Protocol[State]):
    """An algorithm, reduced to what is its own."""

    halt_status: Status
    """What it means when this method halts."""
    residual_is_true: bool
    """Whether `norm` is computed from b − A x at every step, so that there is nothing to check."""

    def start(self, x: Tensor, residual: Tensor) -> State:
        """The state before the first step from x (P,), whose true residual is given."""
        ...

    def step(self, system: System, state: State) -> State:
        """One iteration, without reading any tensor on the host; it leaves x as it is when it halts."""
        ...


class System:
    """A x = b, scaled to ‖b‖ = 1, and the count of the products spent on it."""

    def __init__(self, operator: LinearOperator, rhs: Tensor) -> None:
        check_vector("rhs", rhs)
        self._operator = operator
        self.products = 0
        size = rhs.abs().max() if rhs.numel() else rhs.new_ones(())
        self._size = torch.where(size > 0, size, 1.0)
        norm = (rhs / self._size).norm()
        self._norm = torch.where(norm > 0, norm, 1.0)
        self.rhs = self.scaled(rhs)

    def scaled(self, vector: Tensor) -> Tensor:
        """In the units of the scaled system; in two factors, since their product may leave float32's range."""
        return vector / self._size / self._norm

    def unscaled(self, vector: Tensor) -> Tensor:
        """Back in the caller's units."""
        return vector * self._norm * self._size

    def product(self, vector: Tensor) -> Tensor:
        """A v."""
        self.products += 1
        image = self._operator(vector)
        if image.shape != vector.shape:
            raise ValueError(f"operator must map (P,) to (P,), got {tuple(image.shape)} from {tuple(vector.shape)}")
        return image

    def residual(self, x: Tensor) -> Tensor:
        """b − A x."""
        return self.rhs - self.product(x)


def drive(method: Method[State], system: System, x0: Tensor | None, *, rtol: float, max_iterations: int) -> Solution:
    """Iterate until the true residual is within rtol, the method halts or the count is used up."""
    x, residual = _start(system, x0)
    state = method.start(x, residual)
    history = [state.norm]
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    best = torch.full_like(state.norm, float("inf"))  # the smallest residual that a restart began from
    failures = torch.zeros_like(count)  # restarts in a row that began from no less than half of it
    look = _host_reads_are_free(x.device)
    taken, checked = 0, True

    while True:
        active = torch.isfinite(state.norm) & (state.norm > rtol) & ~state.halted & (failures < PATIENCE)
        over = taken >= max_iterations or (look and not bool(active))
        if not checked and (over or taken % CHECK_EVERY == 0):
            state, restarted = _check(method, system, state, rtol)
            stuck = restarted & (state.norm > 0.5 * best)
            failures = torch.where(stuck, failures + 1, torch.where(restarted, 0, failures))
            best = torch.where(restarted, torch.minimum(best, state.norm), best)
            history[-1] = state.norm
            checked = True
            continue
        if over:
            break
        stepped = method.step(system, state)
        state = stepped if look else _select(active, stepped, state)
        taken += 1
        count += active & ~stepped.halted
        history.append(state.norm)
        checked = method.residual_is_true

    status = _status(method, system, x0, state, bool(failures >= PATIENCE), rtol)
    iterations = int(count)
    residuals = torch.stack(history[: iterations + 1])
    residuals[-1] = state.norm
    value = system.unscaled(state.x)
    return Solution(
        value=torch.full_like(value, float("nan")) if status in _NON_FINITE else value,
        status=status,
        iterations=iterations,
        residuals=residuals,
        damping=damping_of(system._operator),
        negative_curvature=bool(state.negative),
        products=system.products,
    )


_NON_FINITE = (Status.NON_FINITE_RHS, Status.NON_FINITE_START, Status.NON_FINITE_OPERATOR)


def _start(system: System, x0: Tensor | None) -> tuple[Tensor, Tensor]:
    if x0 is None:
        return torch.zeros_like(system.rhs), system.rhs
    check_vector("x0", x0, like=system.rhs)
    # No residual is small relative to a right-hand side of zero: the answer there is zero, whatever x0.
    x = torch.where(system.rhs.any(), system.scaled(x0), 0.0 * x0)
    residual = system.residual(x)
    # A start so far off that rounding of its residual would swamp b, or that overflows in b's units, is not used.
    limit = torch.finfo(x.dtype).eps ** -0.5 * system.rhs.norm()
    hopeless = torch.isfinite(x0).all() & ~(residual.norm() <= limit)
    return torch.where(hopeless, 0.0, x), torch.where(hopeless, system.rhs, residual)


def _check(method: Method[State], system: System, state: State, rtol: float) -> tuple[State, Tensor]:
    """Put the true residual in place of the recurrence's; start again from it if the two disagree materially."""
    residual = system.residual(state.x)
    norm = residual.norm()
    again = (norm > rtol) & ((state.norm <= rtol) | (norm > 2.0 * state.norm))
    corrected = dataclasses.replace(state, norm=norm)
    if _host_reads_are_free(norm.device) and not bool(again):
        return corrected, again
    fresh = dataclasses.replace(method.start(state.x, residual), negative=state.negative, halted=state.halted)
    return _select(again, fresh, corrected), again


def _select(condition: Tensor, yes: State, no: State) -> State:
    names = [field.name for field in dataclasses.fields(yes)]
    return type(yes)(**{name: torch.where(condition, getattr(yes, name), getattr(no, name)) for name in names})


def _status(
    method: Method[State], system: System, x0: Tensor | None, state: State, stagnated: bool, rtol: float
) -> Status:
    residual = float(state.norm)
    if residual <= rtol:
        return Status.CONVERGED
    if not residual < float("inf"):
        if not bool(torch.isfinite(system.rhs).all()):
            return Status.NON_FINITE_RHS
        if x0 is not None and not bool(torch.isfinite(x0).all()):
            return Status.NON_FINITE_START
        return Status.NON_FINITE_OPERATOR
    if bool(state.halted):
        return method.halt_status
    return Status.STAGNATED if stagnated else Status.MAX_ITERATIONS


def _host_reads_are_free(device: torch.device) -> bool:
    return device.type == "cpu"


def check_vector(name: str, vector: Tensor, like: Tensor | None = None) -> None:
    """Refuse what is not a real vector, or not of the shape and dtype of `like`."""
    if vector.dim() != 1 or not vector.is_floating_point():
        raise ValueError(
            f"{name} must be a real floating-point vector (P,), got {vector.dtype} of shape {tuple(vector.shape)}"
        )
    if like is not None and (vector.shape != like.shape or vector.dtype != like.dtype):
        raise ValueError(
            f"{name} must be like rhs, {like.dtype} of shape {tuple(like.shape)}, "
            f"got {vector.dtype} of shape {tuple(vector.shape)}"
        )


def check_limits(rtol: float, max_iterations: int) -> None:
    """Refuse limits under which nothing could converge."""
    if not isinstance(rtol, float | int) or not rtol > 0:
        raise ValueError(f"rtol must be a positive number, got {rtol!r}")
    if not isinstance(max_iterations, int) or max_iterations < 1:
        raise ValueError(f"max_iterations must be an integer of at least 1, got {max_iterations!r}")
