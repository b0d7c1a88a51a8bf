"""Finite MDPs whose every quantity is exact: the oracles against which estimators are tested.

Notation: S states, A actions, P parameters, γ discount, τ entropy temperature, d the discounted occupancy of a policy.
Everything is float64 NumPy, except that `enumerate_trajectories` returns the library's `Trajectories`. This is the place
to import from; the files behind it:

    tabular_mdp           the MDP; values and occupancy of a fixed policy
    tabular_soft          the max-entropy optimum, and derivatives of functions of it
    tabular_enumeration   all trajectories with their probabilities
    tabular_estimators    hypergradients that differentiate the optimum; tabular_amd by iteration
    tabular_perturbed     hypergradients that compare the optima of perturbed rewards
"""

from __future__ import annotations

from .tabular_amd import AMDState, amd, amd_iteration
from .tabular_bilevel import ExactHypergradient
from .tabular_enumeration import enumerate_trajectories
from .tabular_estimators import bc_hg, exact_hypergradient, fisher_implicit, hpgd, sobirl_shortcut
from .tabular_mdp import Array, PolicyValue, TabularMDP, expected_return, occupancy, policy_value, random_mdp
from .tabular_perturbed import nudged_contrast, value_penalty, zero_order
from .tabular_soft import SoftSolution, soft_policy_vjp, soft_value_iteration

__all__ = [
    "AMDState",
    "Array",
    "ExactHypergradient",
    "PolicyValue",
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
    "nudged_contrast",
    "occupancy",
    "policy_value",
    "random_mdp",
    "sobirl_shortcut",
    "soft_policy_vjp",
    "soft_value_iteration",
    "value_penalty",
    "zero_order",
]
