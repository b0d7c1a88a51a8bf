"""parl-core: hypergradients for reward learning from preferences, and the loops that use them.

Public names are imported on first use, so that `import parl_core` is instant and pulls in nothing but torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import hypergrad, ops
    from .errors import MissingExtraError, NonFiniteError, ParlError, RunFolderError, UnknownNameError
    from .hypergrad import (
        BCHG,
        CG,
        HPGD,
        MINRES,
        PCG,
        BilevelProblem,
        CheckTable,
        Damped,
        Dense,
        DirectOnly,
        ErrorEstimate,
        Fisher,
        Hypergradient,
        HypergradientWarning,
        Identity,
        LinearQuadraticGame,
        LogProbHessian,
        Neumann,
        NudgedContrast,
        NystromPCG,
        OuterProducts,
        PolicyProblem,
        PreferenceLoss,
        Preflight,
        ScoreHessian,
        SoBiRL,
        Solution,
        Status,
        TrajectoryLoss,
        Unrolled,
        ValuePenalty,
        Woodbury,
        ZeroOrder,
        automatic_damping,
        capture_solve,
        check_hypergradient,
        hypergradient,
        implicit_gradient,
        linearize,
        preflight,
    )
    from .models import policies, rewards
    from .ops import available_backends, backend, discounted_returns, prefix_sum
    from .trajectories import PreferencePairs, Trajectories

__version__ = "0.1.0"

_HOMES = {
    "errors": ("MissingExtraError", "NonFiniteError", "ParlError", "RunFolderError", "UnknownNameError"),
    "hypergrad": (
        "BCHG",
        "HPGD",
        "DirectOnly",
        "ErrorEstimate",
        "NudgedContrast",
        "SoBiRL",
        "Unrolled",
        "ValuePenalty",
        "ZeroOrder",
        "CG",
        "MINRES",
        "Damped",
        "BilevelProblem",
        "CheckTable",
        "Dense",
        "Fisher",
        "Hypergradient",
        "HypergradientWarning",
        "Identity",
        "LinearQuadraticGame",
        "LogProbHessian",
        "Neumann",
        "NystromPCG",
        "OuterProducts",
        "PCG",
        "PolicyProblem",
        "PreferenceLoss",
        "Preflight",
        "ScoreHessian",
        "Solution",
        "Status",
        "TrajectoryLoss",
        "Woodbury",
        "automatic_damping",
        "capture_solve",
        "check_hypergradient",
        "hypergradient",
        "implicit_gradient",
        "linearize",
        "preflight",
    ),
    "ops": ("available_backends", "backend", "discounted_returns", "prefix_sum"),
    "trajectories": ("PreferencePairs", "Trajectories"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = {
    "hypergrad": "hypergrad",
    "ops": "ops",
    "policies": "models.policies",
    "rewards": "models.rewards",
}

__all__ = [
    "BCHG",
    "CG",
    "HPGD",
    "MINRES",
    "PCG",
    "BilevelProblem",
    "CheckTable",
    "Damped",
    "Dense",
    "DirectOnly",
    "ErrorEstimate",
    "Fisher",
    "Hypergradient",
    "HypergradientWarning",
    "Identity",
    "LinearQuadraticGame",
    "LogProbHessian",
    "MissingExtraError",
    "Neumann",
    "NonFiniteError",
    "NudgedContrast",
    "NystromPCG",
    "OuterProducts",
    "ParlError",
    "PolicyProblem",
    "PreferenceLoss",
    "PreferencePairs",
    "Preflight",
    "RunFolderError",
    "ScoreHessian",
    "SoBiRL",
    "Solution",
    "Status",
    "Trajectories",
    "TrajectoryLoss",
    "UnknownNameError",
    "Unrolled",
    "ValuePenalty",
    "Woodbury",
    "ZeroOrder",
    "automatic_damping",
    "available_backends",
    "backend",
    "capture_solve",
    "check_hypergradient",
    "discounted_returns",
    "hypergrad",
    "hypergradient",
    "implicit_gradient",
    "linearize",
    "ops",
    "policies",
    "prefix_sum",
    "preflight",
    "rewards",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = importlib.import_module(f".{_MODULES[name]}", __name__)
    elif name in _HOME_OF:
        value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    else:
        raise AttributeError(f"module 'parl_core' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
