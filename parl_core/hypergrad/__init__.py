"""The hypergradient engine. Needs torch alone; knows no environment, file or logger."""

from .check import BilevelProblem, CheckTable, LinearQuadraticGame, PolicyProblem, check_hypergradient
from .curvature import CurvatureOperator, Fisher, Identity, LogProbHessian, ScoreHessian
from .estimators import BCHG, HPGD, DirectOnly, NudgedContrast, SoBiRL, Unrolled, ValuePenalty, ZeroOrder, hypergradient
from .implicit import implicit_gradient
from .linearize import Linearization, linearize
from .losses import PreferenceLoss, TrajectoryLoss
from .preflight import Finding, Preflight, Severity, preflight
from .result import ErrorEstimate, Hypergradient, HypergradientWarning
from .solvers import (
    CG,
    MINRES,
    PCG,
    Damped,
    Dense,
    Neumann,
    NystromPCG,
    OuterProducts,
    Solution,
    Status,
    Woodbury,
    automatic_damping,
    capture_solve,
)

__all__ = [
    "BCHG",
    "CG",
    "HPGD",
    "MINRES",
    "PCG",
    "BilevelProblem",
    "CheckTable",
    "CurvatureOperator",
    "Damped",
    "Dense",
    "DirectOnly",
    "ErrorEstimate",
    "Finding",
    "Fisher",
    "Hypergradient",
    "HypergradientWarning",
    "Identity",
    "LinearQuadraticGame",
    "Linearization",
    "LogProbHessian",
    "Neumann",
    "NudgedContrast",
    "NystromPCG",
    "OuterProducts",
    "PolicyProblem",
    "PreferenceLoss",
    "Preflight",
    "ScoreHessian",
    "Severity",
    "SoBiRL",
    "Solution",
    "Status",
    "TrajectoryLoss",
    "Unrolled",
    "ValuePenalty",
    "Woodbury",
    "ZeroOrder",
    "automatic_damping",
    "capture_solve",
    "check_hypergradient",
    "hypergradient",
    "implicit_gradient",
    "linearize",
    "preflight",
]
