"""Solvers for A x = b, with A symmetric and given only by its products; one file per algorithm.

What they share is in `drive.py` (the loop around every iterative one), `system.py` (right-hand sides, products, scale) and
`solution.py` (what goes in and comes out):

    CG           A positive definite; a consistent semi-definite system is solved too
    PCG          the same behind an approximate inverse that A knows of itself, as that of the package's policies does
    MINRES       A symmetric of any sign: what to use when a full Hessian is not yet definite
    Neumann      a fixed number of plain gradient steps: cheap bias instead of an exact solve
    NystromPCG   A = (few large eigenvalues) + damping, solved many times over as A changes slowly
    Woodbury     A = (few outer products) + damping: exact, if the operator tells its rows
    Dense        the oracle for small P

`damping.py` chooses a damping for an operator that has none, `capture.py` makes a CUDA graph of a whole solve.
"""

from .capture import CapturedSolve, capture_solve
from .cg import CG
from .damping import Damped, Damping, automatic_damping, check_damping, solve_with_automatic_damping
from .dense import Dense
from .minres import MINRES
from .neumann import Neumann
from .nystrom import NystromPCG
from .pcg import PCG
from .solution import (
    LinearOperator,
    NativeOperator,
    OuterProducts,
    Preconditioner,
    Solution,
    Solver,
    Status,
    damping_of,
)
from .tolerance import BIAS_RTOL, looser
from .woodbury import Woodbury

__all__ = [
    "BIAS_RTOL",
    "CG",
    "MINRES",
    "PCG",
    "CapturedSolve",
    "Damped",
    "Damping",
    "Dense",
    "LinearOperator",
    "NativeOperator",
    "Neumann",
    "NystromPCG",
    "OuterProducts",
    "Preconditioner",
    "Solution",
    "Solver",
    "Status",
    "Woodbury",
    "automatic_damping",
    "capture_solve",
    "check_damping",
    "damping_of",
    "looser",
    "solve_with_automatic_damping",
]
