"""Finite differences of the upper loss with the lower level solved again, and an estimate of their own error.

    D(h) = (8 (f(+h) − f(−h)) − (f(+2h) − f(−2h))) / 12h        error O(h⁴) and rounding / h

D(h) and D(h/2) share two of their four evaluations, so that six give both. Their distance bounds the error of D(h) from both
sources: it holds 15/16 of the truncation and all of the rounding, which is larger at h/2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ALL_COORDINATES = 200  # up to this many parameters each gets its own difference
_DIRECTIONS = 32


@dataclass(frozen=True)
class Reference:
    """The gradient by finite differences, or its products with some directions."""

    values: Tensor
    """(K,) derivatives along the directions, float64 on the CPU."""
    directions: Tensor | None
    """(K, R) of unit length; None for the coordinates themselves, K = R."""
    error: float
    """Estimated relative error of `values`, absolute if they are 0; inf where they are known to be of something else."""
    step: float
    """h, in units of the parameters."""
    solves: int
    """Lower solves they took."""

    def seen(self, gradient: Tensor) -> Tensor:
        """(K,) what of a gradient (R,) can be held against `values`."""
        gradient = gradient.detach().to("cpu", torch.float64)
        return gradient if self.directions is None else self.directions @ gradient

    def describe(self) -> str:
        """How they were taken and how accurate they are."""
        count = self.values.shape[0]
        where = f"along all {count} coordinates"
        if self.directions is not None:
            where = f"along {count} random directions, to which error, cosine and norm ratio refer"
        accuracy = (
            f"accurate to about {self.error:.0e} (by half the step), so errors of that size are the reference's own"
            if self.error != float("inf")
            else "no measure of an estimator that holds the implicit term"
        )
        if not bool(self.values.any()):
            accuracy += "; they are exactly 0, so that any other gradient has the relative error inf and none a cosine"
        return f"fourth-order central differences {where}, step {self.step:.1e}, {self.solves} lower solves; {accuracy}"


def finite_differences(loss_at: Callable[[Tensor], float], start: Tensor, step: float | None = None) -> Reference:
    """Central differences of `loss_at` at `start` (R,).

    Args:
        step: h; by default eps^(1/5), which balances truncation against rounding for parameters of size 1.
    """
    size = start.shape[0]
    step = torch.finfo(start.dtype).eps ** 0.2 if step is None else step
    directions = None
    if size > _ALL_COORDINATES:
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(_DIRECTIONS, size, generator=generator, dtype=torch.float64)
        directions /= directions.norm(dim=1, keepdim=True)
    count = size if directions is None else _DIRECTIONS
    coarse, fine = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for k in range(count):
        if directions is None:
            direction = torch.zeros_like(start)
            direction[k] = 1.0
        else:
            direction = directions[k].to(start)
        change = [loss_at(start + h * direction) - loss_at(start - h * direction) for h in (0.5 * step, step, 2 * step)]
        coarse[k] = (8 * change[1] - change[2]) / (12 * step)
        fine[k] = (8 * change[0] - change[1]) / (6 * step)
    length = float(coarse.norm())
    error = float((coarse - fine).norm()) / length if length else float((coarse - fine).norm())
    return Reference(coarse, directions, error, step, 6 * count)
