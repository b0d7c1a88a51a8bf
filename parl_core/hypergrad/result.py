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


@dataclass(frozen=True)
class ErrorEstimate:
    """What a hypergradient may be off by; each (num_reward_params,), None where it was not estimated.

    To first order in each error. Upper samples and trajectories count as drawn independently, and one object that serves in
    two roles as one sample; given weights as importance weights of a sample: of an exact enumeration, which has no
    sampling error, the standard error means nothing. Cross-fitted estimates get that of the whole data in one piece, which
    is somewhat too small where folds are small.
    """

    stderr: Tensor | None = None
    """Standard error of `total` from the finite sample."""
    damping_bias: Tensor | None = None
    """`total` less what it would be without the damping. A damping that is part of the lower problem, as an L2 penalty, is
    no bias."""
    lower_bias: Tensor | None = None
    """`total` less what it would be at the lower optimum, by the Newton step there, whose own sampling error it contains. A
    damping that is a number counts as part of the lower problem here."""
    cost: float | None = None
    """Of the estimate, in gradients of the policy's log-probabilities, as far as solves and products go."""


@dataclass
class Hypergradient:
    """Gradient of the upper *loss* with respect to the upper parameters, term by term; every term is flat."""

    direct: Tensor
    """∂/∂ν of the loss at fixed data: all that classical RLHF uses."""
    implicit: Tensor
    """(dθ*/dν)ᵀ b: through the policy that the reward induces."""
    regularizer: Tensor
    """∂/∂ν of the regulariser; zeros without one."""
    solution: Solution | None
    """The linear solve behind `implicit`; look at `.status` before trusting it. None for an estimator without one."""
    parameters: Sequence[Tensor] = field(repr=False)
    """The upper parameters, in flat order."""
    error: ErrorEstimate | None = None
    """How far off `total` may be, if it was asked for."""
    aux: object = None
    """What the upper loss returned beside its value, as it came; `implicit_gradient(…, has_aux=True)` alone sets it."""

    @property
    def total(self) -> Tensor:
        """direct + implicit + regularizer."""
        return self.direct + self.implicit + self.regularizer

    @property
    def stderr(self) -> Tensor | None:
        """Standard error of `total`, (num_reward_params,), if it was asked for."""
        return None if self.error is None else self.error.stderr

    def summary(self) -> str:
        """A few lines that say what was computed, how good it is, and what it cost."""
        size = float(self.total.norm())

        def relative(vector: Tensor) -> str:
            return f"{float(vector.norm()) / size:.1%} of |total|" if size else f"{float(vector.norm()):.3g}"

        lines = [
            f"|total| {size:.4g}: direct {float(self.direct.norm()):.4g}, implicit {float(self.implicit.norm()):.4g}"
        ]
        if bool(self.regularizer.any()):
            lines[0] += f", regularizer {float(self.regularizer.norm()):.4g}"
        names = {
            "stderr": "standard error",
            "damping_bias": "effect of the damping",
            "lower_bias": "bias of the lower level",
        }
        for name, words in names.items():
            value = getattr(self.error, name, None)
            if value is not None:
                lines.append(f"{words}: {relative(value)}")
        if self.error is not None and self.error.cost is not None:
            lines[-1] += f" (these estimates: {self.error.cost:.1f} gradients)"
        solution = self.solution
        if solution is not None:
            cost = "" if solution.cost is None else f", {solution.cost:.1f} gradients"
            lines.append(
                f"solve: {solution.status.name} after {solution.iterations} iterations and {solution.products} products"
                f"{cost}, relative residual {float(solution.residuals[-1].max()):.1e}"
            )
        return "\n".join(lines)

    def backward(self) -> None:
        """Add `total` into the upper parameters' `.grad`, as `loss.backward()` would, hooks and all.

        A parameter that was itself computed passes it on to what it was computed from.
        """
        pieces = unflatten(self.total, self.parameters, name="total")
        pairs = [(p, piece) for p, piece in zip(self.parameters, pieces, strict=True) if p.requires_grad]
        if pairs:
            with torch.inference_mode(False):
                torch.autograd.backward([p for p, _ in pairs], [piece.clone() for _, piece in pairs])

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
    if solution is not None and not solution.status.ok:
        warn(
            f"the linear solve ended with {solution.status.name} after {solution.iterations} iterations, relative "
            f"residual {float(solution.residuals[-1].max()):.2e}: {solution.status.message}"
        )
    if solution is not None and solution.negative_curvature:
        warn(f"the lower level has a direction of the wrong curvature, so {not_at_optimum}")
    names = ("direct", "implicit", "regularizer")
    finite = torch.stack([torch.isfinite(getattr(result, name)).all() for name in names]).tolist()
    for name, is_finite in zip(names, finite, strict=True):
        if not is_finite:
            warn(f"the {name} term holds a NaN or an infinity")
