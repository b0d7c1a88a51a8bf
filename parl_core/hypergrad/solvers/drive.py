"""The loop around every iterative solver. A method supplies `start` and `step`; this file decides when it is over.

How this differs from a textbook's loop, and why:
1. Convergence is decided on the true residual b − A x. A recurrence's residual only says when to look. The true one is
   also recomputed every 50 iterations; only if it is more than twice what the recurrence claims (or above rtol where the
   recurrence claims convergence) does the method start again from it, so that conjugacy is kept where nothing drifted.
   Three restarts in a row that do not halve the residual end the solve, and one does where what is left is rounding of
   A x. There the solve has converged, as far as this dtype can tell: see `rounding_allowance` in system.py.
2. Every scalar stays on the device. On the CPU reading one is free, so the loop leaves early; elsewhere it runs its full
   count with the state frozen once it is over, looks at the true residual every 50 iterations only, and reads how it
   ended in one transfer, after the last kernel. `launch` is the part before that, which a CUDA graph can hold.
3. A NaN stays a NaN, and the status says whether the right-hand side, the start or a product brought it.
4. Negative curvature is recorded and the iteration goes on: the true residual still decides, and the caller learns that
   A is not positive definite.
5. A start at zero costs no product.
6. The system is solved for b / ‖b‖, so that squared norms neither vanish nor overflow in float32.
7. Several right-hand sides run side by side as the rows of a block, each as if it were alone: a row that is over is
   frozen, and where the host looks no product is spent on it any more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ...offsets import reads_are_free
from .solution import Status
from .system import Outcome, System, all_finite, norms, rounding_allowance, true_rows

CHECK_EVERY = 50
PATIENCE = 3


@dataclass(frozen=True)
class Iterate:
    """What every method keeps from one step to the next; a method adds its own fields."""

    x: Tensor  # (…, P); scalars are () or (K, 1), as in system.py
    norm: Tensor  # ‖b − A x‖, true or as the recurrence has it, for ‖b‖ = 1
    negative: Tensor  # bool: a direction of negative curvature was met
    halted: Tensor  # bool: the method cannot go on; x is the last good iterate
    operator_norm: Tensor  # the largest ‖A p‖ / ‖p‖ so far; 0 where the method's norm is true and nothing can drift


State = TypeVar("State", bound=Iterate)


class Method(Protocol[State]):
    """An algorithm, reduced to what is its own."""

    halt_status: Status
    """What it means when this method halts."""
    residual_is_true: bool
    """Whether `norm` is computed from b − A x at every step, so that there is nothing to check."""

    def start(self, x: Tensor, residual: Tensor) -> State:
        """The state before the first step from x (…, P), whose true residual (…, P) is given."""
        ...

    def step(self, system: System, state: State, rows: Sequence[int] | None) -> State:
        """One iteration, without reading any tensor on the host; it leaves x as it is when it halts.

        Products are for `rows` only (None: for all); what becomes of the other rows does not matter.
        """
        ...


def drive(method: Method[State], system: System, *, rtol: float, max_iterations: int) -> Outcome:
    """Iterate until every row's true residual is within rtol, its method halts or the count is used up."""
    return launch(method, system, rtol=rtol, max_iterations=max_iterations)()


def launch(method: Method[State], system: System, *, rtol: float, max_iterations: int) -> Callable[[], Outcome]:
    """`drive` in two parts: all of its computations now, and a function that reads how they ended.

    On an accelerator this one reads nothing before that function is called.
    """
    x, residual = first_residual(system)
    state = method.start(x, residual)
    history = [state.norm]
    count = torch.zeros_like(state.norm, dtype=torch.int64)
    best = torch.full_like(state.norm, float("inf"))  # the smallest residual that a restart began from
    failures = torch.zeros_like(count)  # restarts in a row that began from no less than half of it
    look = reads_are_free(x.device)
    every = list(range(state.norm.numel()))
    taken, unchecked = 0, list[int]()  # the rows whose norm is the recurrence's

    while True:
        active = torch.isfinite(state.norm) & (state.norm > rtol) & ~state.halted & (failures < PATIENCE)
        going = true_rows(active) if look else every
        if taken >= max_iterations or taken % CHECK_EVERY == 0:
            due = unchecked
        else:
            due = [row for row in unchecked if row not in going]
        if due:
            state, restarted = _check(method, system, state, rtol, None if due == every else due)
            stuck = restarted & (state.norm > 0.5 * best)
            failures = torch.where(stuck, failures + 1, torch.where(restarted, 0, failures))
            failures = torch.where(stuck & is_rounding(state, rtol), PATIENCE, failures)
            best = torch.where(restarted, torch.minimum(best, state.norm), best)
            history[-1] = state.norm
            unchecked = [row for row in unchecked if row not in due]
            continue
        if taken >= max_iterations or not going:
            break
        stepped = method.step(system, state, None if going == every else going)
        state = stepped if look and going == every else _select(active, stepped, state)
        taken += 1
        count = torch.where(active & ~stepped.halted, taken, count)
        history.append(state.norm)
        unchecked = [] if method.residual_is_true else going

    return conclude(
        method.halt_status,
        system,
        state,
        history=torch.stack([norm.flatten() for norm in history]),
        count=count,
        best=best,
        failures=failures,
        rtol=rtol,
    )


def conclude(
    halt_status: Status,
    system: System,
    state: Iterate,
    *,
    history: Tensor,
    count: Tensor,
    best: Tensor,
    failures: Tensor,
    rtol: float,
) -> Callable[[], Outcome]:
    """What is left to compute after the last iteration; the function that it returns reads the outcome.

    Args:
        halt_status: what it means when the method halts.
        history: (iterations or more + 1, K) norms of the residuals.
        count, best, failures: of each row, its last iteration, and what is known of its restarts.
    """
    over = torch.arange(len(history), device=history.device)[:, None] >= count.flatten()
    residuals = torch.where(over, state.norm.flatten(), history)
    # A restart has shown that the recurrence goes on below what x itself can reach.
    converged = (state.norm <= rtol) | (torch.isfinite(best) & is_rounding(state, rtol) & ~state.halted)
    end = ending(system, state, converged=converged, stagnated=failures >= PATIENCE, count=count)
    return lambda: read_ending(halt_status, end, state, residuals)


def first_residual(system: System) -> tuple[Tensor, Tensor]:
    """x0 as it is used, in the units of the scaled system, and b − A x there."""
    if system.x0 is None:
        return torch.zeros_like(system.rhs), system.rhs
    # No residual is small relative to a right-hand side of zero: the answer there is zero, whatever x0.
    x = torch.where(norms(system.rhs) != 0, system.scaled(system.x0), 0.0 * system.x0)
    residual = system.residual(x)
    # A start so far off that rounding of its residual would swamp b, or that overflows in b's units, is not used.
    limit = torch.finfo(x.dtype).eps ** -0.5 * norms(system.rhs)
    hopeless = all_finite(system.x0) & ~(norms(residual) <= limit)
    return torch.where(hopeless, 0.0, x), torch.where(hopeless, system.rhs, residual)


def _check(
    method: Method[State], system: System, state: State, rtol: float, rows: Sequence[int] | None
) -> tuple[State, Tensor]:
    """Put the true residuals in place of the recurrence's; start again from them where the two disagree materially."""
    residual = system.residual(state.x, rows)
    norm = norms(residual)
    if rows is not None:
        asked = torch.zeros_like(state.halted)
        asked[rows] = True
        norm = torch.where(asked, norm, state.norm)
    again = (norm > rtol) & ((state.norm <= rtol) | (norm > 2.0 * state.norm))
    corrected = dataclasses.replace(state, norm=norm)
    if reads_are_free(norm.device) and not bool(again.any()):
        return corrected, again
    fresh = dataclasses.replace(
        method.start(state.x, residual),
        negative=state.negative,
        halted=state.halted,
        operator_norm=state.operator_norm,
    )
    return _select(again, fresh, corrected), again


def is_rounding(state: Iterate, rtol: float) -> Tensor:
    """Whether the residual is no more than what rounding of A x leaves."""
    return state.norm <= rounding_allowance(state.x, state.operator_norm, rtol)


def _select(condition: Tensor, yes: State, no: State) -> State:
    names = [field.name for field in dataclasses.fields(yes)]
    return type(yes)(**{name: torch.where(condition, getattr(yes, name), getattr(no, name)) for name in names})


def ending(system: System, state: Iterate, *, converged: Tensor, stagnated: Tensor, count: Tensor) -> Tensor:
    """(K, 8) int64, all that the host is told of how each row ended: one tensor, so that it waits once."""
    start = system.rhs if system.x0 is None else system.x0
    columns = (
        converged,
        state.norm < float("inf"),
        all_finite(system.rhs),
        all_finite(start),
        state.halted,
        stagnated,
        state.negative,
        count,
    )
    return torch.stack([column.flatten().long() for column in columns], dim=-1)


def read_ending(halt_status: Status, end: Tensor, state: Iterate, residuals: Tensor) -> Outcome:
    """The outcome by what `ending` has told, `halt_status` being what it means when the method halts.

    `residuals`, (iterations or more + 1, K), are cut to the iterations taken.
    """
    rows = end.tolist()
    iterations = max((row[-1] for row in rows), default=0)
    return Outcome(
        x=state.x,
        statuses=[_status(halt_status, *map(bool, row[:-2])) for row in rows],
        iterations=iterations,
        residuals=residuals[: iterations + 1],
        negative=any(row[-2] for row in rows),
        operator_norm=state.operator_norm,
    )


def _status(
    halt_status: Status, converged: bool, finite: bool, rhs: bool, start: bool, halted: bool, stagnated: bool
) -> Status:
    if converged:
        return Status.CONVERGED
    if not finite:
        if not rhs:
            return Status.NON_FINITE_RHS
        return Status.NON_FINITE_OPERATOR if start else Status.NON_FINITE_START
    if halted:
        return halt_status
    return Status.STAGNATED if stagnated else Status.MAX_ITERATIONS
