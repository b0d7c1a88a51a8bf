"""Whether the lower level was solved, on the scale of the differences that are taken of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_SHARE = 0.01
_NOISES = 3.0


@dataclass
class Slopes:
    """Gradients of the lower objective over the solves behind the reference.

    The scale is what the differences do to that gradient: a step of the upper parameters adds `added` to it, and the solve
    has to bring it back to zero. A solve that stays where it was leaves all of it, and the reference then lacks the implicit
    term; one that leaves a share leaves the reference off by about that share.
    """

    left: list[Tensor] = field(default_factory=list)
    """Norms of the gradient at the solutions."""
    added: list[Tensor] = field(default_factory=list)
    """Norms of its change at the unperturbed solution, as the upper parameters take a step."""

    def describe(self, floor: float, remedy: str, noise: float = 0.0) -> str:
        """A line of the header.

        Args:
            floor: what is left of a lower level that does not depend on the upper parameters, at most.
            remedy: what the caller may do.
            noise: of the gradient, from a finite sample; three times that much is no sign of a bad solve.
        """
        left, added = (float(torch.stack(norms).max()) for norms in (self.left, self.added))  # a NaN stays one
        share = f"{left / added:.0e} times what a step of the differences adds" if added else "which no step changes"
        if left <= (_SHARE * added if added else floor):
            return f"lower level: gradient norm at most {left:.0e} over all solves, {share}"
        if left <= _NOISES * noise:
            return f"lower level: gradient norm up to {left:.0e}, as expected of this sample's noise, {noise:.0e}"
        wanted = f"at most {_SHARE:g} times that" if added else f"{floor:.0e}"
        return f"LOWER LEVEL NOT SOLVED: its gradient norm is up to {left:.0e}, {share}, where {wanted} was wanted; {remedy}"
