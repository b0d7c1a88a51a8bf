"""Finite MDPs whose every quantity is exact: the oracles against which estimators are tested.

Notation: S states, A actions, P parameters, γ discount, τ entropy temperature, d the discounted occupancy of a policy.
Everything is float64 NumPy, except that `enumerate_trajectories` returns the library's `Trajectories`. This is the place
to import from; the files behind it:

    mdp           the MDP; values and occupancy of a fixed policy
    soft          the max-entropy optimum, and derivatives of functions of it
    enumeration   all trajectories with their probabilities
    estimators    hypergradients that differentiate the optimum; in iteration, along with value iteration (AMD)
    perturbed     hypergradients that compare the optima of perturbed rewards
    sampled       hypergradients from episodes alone
    problem       an MDP with both rewards as functions of the leader's parameters
    four_rooms    the published Four-Rooms problem; four_rooms_ascent solves it with any estimator
    rand_mdp      the published RandMDP problem; in m_sobirl, the iteration published with it
    design        problems whose leader picks a point of a box; their objective at many points at once
    stackelberg   games in which the leader commits to a mixed strategy; equilibria without commitment
    tax           consumption taxes on a household
    search        maxima on a box without gradients
    environment   MDPs as environments to train agents on; in tasks, those that `make_env` knows
"""

from __future__ import annotations

from .bilevel import ExactHypergradient
from .enumeration import enumerate_trajectories
from .estimators import bc_hg, exact_hypergradient, fisher_implicit, hpgd, sobirl_shortcut
from .iteration import AMDState, amd, amd_iteration
from .mdp import Array, PolicyValue, TabularMDP, expected_return, occupancy, policy_value, random_mdp
from .perturbed import nudged_contrast, value_penalty, zero_order
from .problem import BilevelMDP, ParametricReward
from .problems.design import DesignProblem
from .problems.four_rooms import FourRooms
from .problems.m_sobirl import MSoBiRLResult, MSoBiRLState, m_sobirl_iteration, m_sobirl_start
from .problems.rand_mdp import RandMDP, rand_mdp
from .problems.search import Maximum, grid_search, pattern_search
from .problems.stackelberg import (
    SimultaneousPlay,
    StackelbergGame,
    audit_game,
    matrix_game,
    random_game,
    simultaneous_play,
    strong_stackelberg,
)
from .problems.tax import TaxDesign
from .soft import SoftSolution, soft_policy_iteration, soft_policy_vjp, soft_value_iteration

__all__ = [
    "AMDState",
    "Array",
    "BilevelMDP",
    "DesignProblem",
    "ExactHypergradient",
    "FourRooms",
    "MSoBiRLResult",
    "MSoBiRLState",
    "Maximum",
    "ParametricReward",
    "PolicyValue",
    "RandMDP",
    "SimultaneousPlay",
    "SoftSolution",
    "StackelbergGame",
    "TabularMDP",
    "TaxDesign",
    "amd",
    "amd_iteration",
    "audit_game",
    "bc_hg",
    "enumerate_trajectories",
    "exact_hypergradient",
    "expected_return",
    "fisher_implicit",
    "grid_search",
    "hpgd",
    "m_sobirl_iteration",
    "m_sobirl_start",
    "matrix_game",
    "nudged_contrast",
    "occupancy",
    "pattern_search",
    "policy_value",
    "rand_mdp",
    "random_game",
    "random_mdp",
    "simultaneous_play",
    "sobirl_shortcut",
    "soft_policy_iteration",
    "soft_policy_vjp",
    "soft_value_iteration",
    "strong_stackelberg",
    "value_penalty",
    "zero_order",
]
