"""The hypergradient engine. Needs torch alone; knows no environment, file or logger."""

from .curvature import CurvatureOperator, Fisher, Identity, LogProbHessian, ScoreHessian
from .estimators import hypergradient
from .implicit import implicit_gradient
from .linearize import Linearization, linearize
from .losses import PreferenceLoss, TrajectoryLoss
from .result import Hypergradient, HypergradientWarning
from .solvers import CG, Dense, Solution, Status

__all__ = [
    "CG",
    "CurvatureOperator",
    "Dense",
    "Fisher",
    "Hypergradient",
    "HypergradientWarning",
    "Identity",
    "Linearization",
    "LogProbHessian",
    "PreferenceLoss",
    "ScoreHessian",
    "Solution",
    "Status",
    "TrajectoryLoss",
    "hypergradient",
    "implicit_gradient",
    "linearize",
]
