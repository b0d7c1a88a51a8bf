"""The hypergradient engine. Needs torch alone; knows no environment, file or logger."""

from .curvature import CurvatureOperator, Fisher, Identity, LogProbHessian, ScoreHessian
from .estimators import hypergradient
from .implicit import implicit_gradient
from .linearize import Linearization, linearize
from .losses import PreferenceLoss, TrajectoryLoss
from .preflight import Finding, Preflight, Severity, preflight
from .result import Hypergradient, HypergradientWarning
from .solvers import (
    CG,
    MINRES,
    Damped,
    Dense,
    Neumann,
    NystromPCG,
    OuterProducts,
    Solution,
    Status,
    Woodbury,
    automatic_damping,
)

__all__ = [
    "CG",
    "MINRES",
    "CurvatureOperator",
    "Damped",
    "Dense",
    "Finding",
    "Fisher",
    "Hypergradient",
    "HypergradientWarning",
    "Identity",
    "Linearization",
    "LogProbHessian",
    "Neumann",
    "NystromPCG",
    "OuterProducts",
    "PreferenceLoss",
    "Preflight",
    "ScoreHessian",
    "Severity",
    "Solution",
    "Status",
    "TrajectoryLoss",
    "Woodbury",
    "automatic_damping",
    "hypergradient",
    "implicit_gradient",
    "linearize",
    "preflight",
]
