"""MINRES: the smallest residual over the Krylov space, for a symmetric operator of any sign.

How this differs from Paige & Saunders' code, and why:
1. Negative curvature is reported from the Givens quantities: −c_{k−1} γ̄_k = rᵀA r / ‖r‖² at the residual r of step k−1
   (Liu & Roosta, "MINRES: from negative curvature detection to monotonicity properties", 2022), at no product.
2. A singular system without a solution ends when ‖A r‖ ≤ √eps·‖A‖·‖r‖, with a status of its own, never as converged;
   rounding does not let it fall much lower, while x goes off along the null space. A few small eigenvalues look the same,
   but from a new start at that x, with ‖A‖ as the new start sees it, they are no longer small: only a start that does
   not halve the residual has the last word, and is undone. Nor is the system called inconsistent where the residual is
   within 4·eps·‖A‖·‖x‖. The null component that x then has along r is removed, which leaves the minimum-norm
   least-squares solution (Liu, Milzarek & Roosta, "Obtaining pseudo-inverse solutions with MINRES", 2023).
3. Convergence is decided on b − A x, not on the estimate |φ̄| (see drive.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .drive import Iterate, drive, launch
from .solution import LinearOperator, Solution, Status
from .system import Launch, Outcome, System, as_rows, check_limits, dots, norms


@dataclass(frozen=True)
class MINRES:
    """Minimum residuals (Paige & Saunders, 1975) for a symmetric operator, which may be indefinite or singular.

    After k steps from zero ‖b − A x‖ is the smallest over span{b, Ab, …, A^{k−1} b}. A consistent singular system gets
    its minimum-norm solution; an inconsistent one ends as INCONSISTENT with the minimum-norm least-squares solution.
    Eigenvalues below max(10, √P)·eps·‖A‖ count as zero.

    >>> import torch
    >>> diagonal = torch.tensor([1.0, -2.0, 4.0])
    >>> solution = MINRES()(lambda v: diagonal * v, torch.ones(3))
    >>> solution.value, solution.negative_curvature
    (tensor([ 1.0000, -0.5000,  0.2500]), True)
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
        """See `Recordable`; a system that ends as inconsistent goes on where that is read."""

        def launched(system: System) -> Callable[[], Solution]:
            method = _MinimumResiduals(torch.zeros_like(norms(system.rhs)), 0.5)
            read = launch(method, system, rtol=self.rtol, max_iterations=self.max_iterations)
            return lambda: self._finished(system, read())

        return launched

    def _finished(self, system: System, outcome: Outcome) -> Solution:
        while outcome.iterations < self.max_iterations and Status.INCONSISTENT in outcome.statuses:
            further = _go_on(system, outcome, self.rtol, self.max_iterations - outcome.iterations)
            if further is None:
                break
            outcome = further
        return system.solution(_with_least_norm(system, outcome))


def _with_least_norm(system: System, outcome: Outcome) -> Outcome:
    """x without its null component along r in the rows that are inconsistent; those that rounding ended have none."""
    assert outcome.operator_norm is not None
    rounding = 4.0 * torch.finfo(outcome.x.dtype).eps * outcome.operator_norm * norms(outcome.x)
    ended = (outcome.residuals[-1] <= rounding.flatten()).tolist()
    statuses = [
        Status.STAGNATED if status is Status.INCONSISTENT and ended[row] else status
        for row, status in enumerate(outcome.statuses)
    ]
    rows = [row for row, status in enumerate(statuses) if status is Status.INCONSISTENT]
    x = outcome.x.clone()
    if rows:
        residual = as_rows(system.residual(x, rows))[rows]
        moved = as_rows(x)[rows]
        as_rows(x)[rows] = moved - dots(residual, moved) / dots(residual, residual) * residual
    return dataclasses.replace(outcome, x=x, statuses=statuses)


def _go_on(system: System, outcome: Outcome, rtol: float, max_iterations: int) -> Outcome | None:
    """What a new start makes of the rows that ended as inconsistent; None if it halves the residual of none of them."""
    again = System(system.product, system.rhs, outcome.x)
    assert outcome.operator_norm is not None
    further = drive(_MinimumResiduals(outcome.operator_norm, 0.75), again, rtol=rtol, max_iterations=max_iterations)
    before, after = outcome.residuals[-1], further.residuals[-1]
    halved = (after <= 0.5 * before).tolist()
    better = [halved[row] and status is Status.INCONSISTENT for row, status in enumerate(outcome.statuses)]
    if not any(better):
        return None
    chosen = torch.tensor(better, device=before.device)
    return Outcome(
        x=torch.where(chosen[:, None], as_rows(further.x), as_rows(outcome.x)).reshape(outcome.x.shape),
        statuses=[(further if better[row] else outcome).statuses[row] for row in range(len(better))],
        iterations=outcome.iterations + further.iterations,
        residuals=torch.cat([outcome.residuals, torch.where(chosen, further.residuals[1:], before)]),
        negative=outcome.negative or further.negative,
        operator_norm=further.operator_norm,
    )


@dataclass(frozen=True)
class _State(Iterate):
    vector: Tensor  # (…, P) v_k, the Lanczos vector
    previous: Tensor  # (…, P) v_{k−1}
    beta: Tensor  # β_k
    cosine: Tensor  # of the last rotation
    sine: Tensor
    delta_bar: Tensor  # δ̄_k and ε_k: what the rotations so far left for column k of the tridiagonal matrix
    epsilon: Tensor
    phi_bar: Tensor  # φ̄_k, the residual's norm as the recurrence has it
    direction: Tensor  # (…, P) d_{k−1}
    previous_direction: Tensor  # (…, P) d_{k−2}
    own_norm: Tensor  # the largest ‖A v‖ since this start


@dataclass(frozen=True)
class _MinimumResiduals:
    operator_norm: Tensor  # () or (K, 1), what is known of ‖A‖, from below
    exponent: float  # halts where ‖A r‖ ≤ eps^exponent·‖A‖·‖r‖
    halt_status = Status.INCONSISTENT
    residual_is_true = False

    def start(self, x: Tensor, residual: Tensor) -> _State:
        norm = norms(residual)
        no = torch.zeros_like(norm, dtype=torch.bool)
        zero, zeros = torch.zeros_like(norm), torch.zeros_like(x)
        return _State(
            x=x,
            norm=norm,
            negative=no,
            halted=no,
            vector=residual / torch.where(norm > 0, norm, 1.0),
            previous=zeros,
            beta=zero,
            cosine=-torch.ones_like(norm),
            sine=zero,
            delta_bar=zero,
            epsilon=zero,
            phi_bar=norm,
            direction=zeros,
            previous_direction=zeros,
            own_norm=zero,
            operator_norm=self.operator_norm,
        )

    def step(self, system: System, state: _State, rows: Sequence[int] | None) -> _State:
        image = system.product(state.vector, rows)
        image = torch.addcmul(image, state.beta, state.previous, value=-1.0)
        alpha = dots(state.vector, image)
        image = torch.addcmul(image, alpha, state.vector, value=-1.0)
        beta = norms(image)
        length = (alpha**2 + beta**2 + state.beta**2).sqrt()
        operator_norm, own_norm = torch.maximum(state.operator_norm, length), torch.maximum(state.own_norm, length)
        eps = torch.finfo(beta.dtype).eps
        lost = max(10.0, image.shape[-1] ** 0.5) * eps * operator_norm

        delta = state.cosine * state.delta_bar + state.sine * alpha
        gamma_bar = state.sine * state.delta_bar - state.cosine * alpha
        delta_bar = -state.cosine * beta
        # ‖A r‖ / ‖r‖ before this step
        halted = torch.hypot(gamma_bar, delta_bar) <= torch.maximum(eps**self.exponent * own_norm, lost)
        gamma = torch.hypot(gamma_bar, beta)
        gamma = torch.where(gamma > 0, gamma, 1.0)
        cosine, sine = gamma_bar / gamma, beta / gamma

        direction = torch.addcmul(state.vector, state.epsilon, state.previous_direction, value=-1.0)
        direction = torch.addcmul(direction, delta, state.direction, value=-1.0) / gamma
        phi_bar = torch.where(halted, state.phi_bar, sine * state.phi_bar)
        step = torch.where(halted, 0.0, cosine * state.phi_bar)
        return _State(
            x=torch.addcmul(state.x, step, direction),
            norm=phi_bar,
            negative=state.negative | (state.cosine * gamma_bar > 10.0 * eps * operator_norm),
            halted=halted,
            vector=image / torch.where(beta > 0, beta, 1.0),
            previous=state.vector,
            beta=beta,
            cosine=cosine,
            sine=sine,
            delta_bar=delta_bar,
            epsilon=state.sine * beta,
            phi_bar=phi_bar,
            direction=direction,
            previous_direction=state.direction,
            own_norm=own_norm,
            operator_norm=operator_norm,
        )
