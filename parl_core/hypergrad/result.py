"""What a hypergradient call returns."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .flat import unflatten
from .solvers import Solution


class HypergradientWarning(UserWarning):
    """The hypergradient was computed, but something about it should be known before it is used."""


@dataclass
class Hypergradient:
    """Gradient of the upper *loss* with respect to the upper parameters, term by term; every term is flat."""

    direct: Tensor
    """∂/∂ν of the loss at fixed data: all that classical RLHF uses."""
    implicit: Tensor
    """(dθ*/dν)ᵀ b: through the policy that the reward induces."""
    regularizer: Tensor
    """∂/∂ν of the regulariser; zeros without one."""
    solution: Solution
    """The linear solve behind `implicit`; look at `.status` before trusting it."""
    parameters: Sequence[Tensor] = field(repr=False)
    """The upper parameters, in flat order."""
    aux: object = None
    """What the upper loss returned beside its value, as it came; `implicit_gradient(…, has_aux=True)` alone sets it."""

    @property
    def total(self) -> Tensor:
        """direct + implicit + regularizer."""
        return self.direct + self.implicit + self.regularizer

    def backward(self) -> None:
        """Add `total` into the upper parameters' `.grad`, as `loss.backward()` would."""
        with torch.no_grad():
            for parameter, piece in zip(
                self.parameters, unflatten(self.total, self.parameters, name="total"), strict=True
            ):
                if not parameter.requires_grad:
                    continue
                if parameter.grad is None:
                    parameter.grad = piece.clone()
                else:
                    parameter.grad.add_(piece)

    def surrogate(self) -> Tensor:
        """A scalar that is 0 and whose gradient in the upper parameters is `implicit` alone.

        For a training loop that already has its upper loss, whose own gradient is the direct term:

            loss = cross_entropy + result.surrogate()
            loss.backward()

        It is Σ ⟨implicit, p − p.detach()⟩, so it scales, accumulates and reaches tensors that `p` was computed from as any
        term of a loss does. Frozen parameters take no part. Each call gives a graph of its own. Where `implicit` holds
        a NaN or an infinity the value is NaN and the gradient what `implicit` holds, so that a loss scaler skips the step.
        """
        pieces = unflatten(self.implicit, self.parameters, name="implicit")
        value = self.implicit.new_zeros(())
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            if parameter.requires_grad:
                value = value + (piece * (parameter - parameter.detach())).sum()
        return value


def warn_about(result: Hypergradient, not_at_optimum: str, stacklevel: int) -> None:
    """Say aloud what a caller who does not look at the parts would miss."""

    def warn(sentence: str) -> None:
        warnings.warn(sentence, HypergradientWarning, stacklevel=stacklevel + 2)

    solution = result.solution
    if not solution.status.ok:
        warn(
            f"the linear solve ended with {solution.status.name} after {solution.iterations} iterations, relative "
            f"residual {float(solution.residuals[-1]):.2e}: {solution.status.message}"
        )
    if solution.negative_curvature:
        warn(f"the lower level has a direction of the wrong curvature, so {not_at_optimum}")
    for name in ("direct", "implicit", "regularizer"):
        if not bool(torch.isfinite(getattr(result, name)).all()):
            warn(f"the {name} term holds a NaN or an infinity")
