"""Solvers for A x = b, with A symmetric and given only by its products; one file per algorithm.

What they share is in `drive.py` (the loop around every iterative one) and `solution.py` (what a solve returns):

    CG           A positive definite; a consistent semi-definite system is solved too
    MINRES       A symmetric of any sign: what to use when a full Hessian is not yet definite
    Neumann      a fixed number of plain gradient steps: cheap bias instead of an exact solve
    NystromPCG   A = (few large eigenvalues) + damping, solved many times over as A changes slowly
    Dense        the oracle for small P
"""

from .cg import CG
from .dense import Dense
from .minres import MINRES
from .neumann import Neumann
from .nystrom import NystromPCG
from .solution import LinearOperator, Solution, Solver, Status

__all__ = ["CG", "MINRES", "Dense", "LinearOperator", "Neumann", "NystromPCG", "Solution", "Solver", "Status"]
