"""Solves that need not be exact: those behind an error estimate."""

from __future__ import annotations

import copy

from .solution import Solver

BIAS_RTOL = 0.01  # a bias is wanted to some percent


def looser(solver: Solver, rtol: float) -> Solver:
    """The same solver with at least this tolerance; a preconditioner that it keeps stays."""
    if getattr(solver, "rtol", rtol) >= rtol:
        return solver
    loose = copy.copy(solver)
    object.__setattr__(loose, "rtol", rtol)  # the solvers are frozen
    return loose
