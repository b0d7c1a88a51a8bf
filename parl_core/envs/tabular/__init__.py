"""Finite MDPs whose every quantity is exact: the oracles against which estimators are tested.

Notation: S states, A actions, P parameters, γ discount, τ entropy temperature, d the discounted occupancy of a policy.
Everything is float64 NumPy, except that `enumerate_trajectories` returns the library's `Trajectories`. This is the place
to import from; the files behind it:

    mdp           the MDP; values and occupancy of a fixed policy
    soft          the max-entropy optimum, and derivatives of functions of it
    enumeration   all trajectories with their probabilities
    estimators    hypergradients that differentiate the optimum; in iteration, along with value iteration (AMD)
    perturbed     hypergradients that compare the optima of perturbed rewards
    problem       an MDP with both rewards as functions of the leader's parameters
    four_rooms    the published Four-Rooms problem
    rand_mdp      the published RandMDP problem; in m_sobirl, the iteration published with it
"""

from __future__ import annotations

from .bilevel import ExactHypergradient
from .enumeration import enumerate_trajectories
from .estimators import bc_hg, exact_hypergradient, fisher_implicit, hpgd, sobirl_shortcut
from .four_rooms import FourRooms
from .iteration import AMDState, amd, amd_iteration
from .m_sobirl import MSoBiRLResult, MSoBiRLState, m_sobirl_iteration, m_sobirl_start
from .mdp import Array, PolicyValue, TabularMDP, expected_return, occupancy, policy_value, random_mdp
from .perturbed import nudged_contrast, value_penalty, zero_order
from .problem import BilevelMDP, ParametricReward
from .rand_mdp import RandMDP, rand_mdp
from .soft import SoftSolution, soft_policy_vjp, soft_value_iteration

__all__ = [
    "AMDState",
    "Array",
    "BilevelMDP",
    "ExactHypergradient",
    "FourRooms",
    "MSoBiRLResult",
    "MSoBiRLState",
    "ParametricReward",
    "PolicyValue",
    "RandMDP",
    "SoftSolution",
    "TabularMDP",
    "amd",
    "amd_iteration",
    "bc_hg",
    "enumerate_trajectories",
    "exact_hypergradient",
    "expected_return",
    "fisher_implicit",
    "hpgd",
    "m_sobirl_iteration",
    "m_sobirl_start",
    "nudged_contrast",
    "occupancy",
    "policy_value",
    "rand_mdp",
    "random_mdp",
    "sobirl_shortcut",
    "soft_policy_vjp",
    "soft_value_iteration",
    "value_penalty",
    "zero_order",
]
