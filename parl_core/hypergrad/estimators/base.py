"""What an estimator of the implicit term is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..result import ErrorEstimate
from ..solvers import Solution
from .problem import Problem


@dataclass
class Outcome:
    """What an estimator returns."""

    implicit: Tensor
    """(R,) (dθ*/dν)ᵀ b."""
    solution: Solution | None = None
    """The linear solve behind it, if there was one."""
    error: ErrorEstimate | None = None
    """What the estimator knows of its own error without being asked."""


class Estimator(Protocol):
    """What `hypergradient` asks of an estimator."""

    def implicit(self, problem: Problem, x0: Tensor | None) -> Outcome:
        """(dθ*/dν)ᵀ b, from the start x0 (P,) if it solves a linear system."""
        ...


class DirectOnly:
    """No implicit term: classical RLHF, which takes the data as if it did not depend on the reward."""

    def implicit(self, problem: Problem, x0: Tensor | None) -> Outcome:
        """Zeros (R,)."""
        return Outcome(torch.zeros_like(problem.direct()))
