"""Estimators of one vector, the gradient of the upper loss through the policy that the reward induces.

the implicit function theorem      hypergradient(curvature=…, solver=…)     one linear system; any differentiable policy
HPGD, BCHG, SoBiRL                 closed forms at a maximum-entropy optimum; no linear system
NudgedContrast, ValuePenalty       first derivatives of lower levels solved again
Unrolled                           through the lower level's own steps
ZeroOrder                          differences of the re-solved upper loss
DirectOnly                         leaves the implicit term out
"""

from .base import DirectOnly, Estimator, Outcome
from .call import hypergradient
from .first_order import NudgedContrast, ValuePenalty, ZeroOrder
from .implicit_function import ImplicitFunction
from .problem import Problem
from .soft_optimal import BCHG, HPGD, SoBiRL
from .unrolled import Unrolled

__all__ = [
    "BCHG",
    "HPGD",
    "DirectOnly",
    "Estimator",
    "ImplicitFunction",
    "NudgedContrast",
    "Outcome",
    "Problem",
    "SoBiRL",
    "Unrolled",
    "ValuePenalty",
    "ZeroOrder",
    "hypergradient",
]
