"""Random bilevel problems on tabular MDPs, and finite differences of them."""

import numpy as np

from parl_core.envs.tabular import TabularMDP, expected_return, random_mdp, soft_value_iteration


def make_problem(num_states=5, num_actions=3, discount=0.9, num_params=4, seed=0, dynamics="dense"):
    """An MDP, r(ν) = tanh(features·ν) and r_U(ν) = fixed + ½ (features_U·ν)², both with Jacobians, and ν.

    dynamics: "dense", all successors possible; "sparse", two from each (state, action); "deterministic", one. The last
    two start in state 0, so that some states may never be reached.
    """
    rng = np.random.default_rng(seed)
    mdp = random_mdp(num_states, num_actions, discount, seed)
    lower, upper = rng.normal(size=(2, num_states, num_actions, num_params))
    fixed = rng.normal(size=(num_states, num_actions))

    def reward(params):
        value = np.tanh(lower @ params)
        return value, (1.0 - value**2)[..., None] * lower

    def upper_reward(params):
        product = upper @ params
        return fixed + 0.5 * product**2, product[..., None] * upper

    params = rng.normal(size=num_params)
    if dynamics != "dense":
        num_successors = {"sparse": 2, "deterministic": 1}[dynamics]
        transitions = np.zeros((num_states, num_actions, num_states))
        for row in transitions.reshape(-1, num_states):
            chosen = rng.choice(num_states, num_successors, replace=False)
            row[chosen] = rng.dirichlet(np.ones(num_successors))
        mdp = TabularMDP(transitions, np.eye(num_states)[0], discount)
    return mdp, reward, upper_reward, params


def central_difference(function, params, step=1e-5):
    """(P,) second-order central differences of a scalar function."""
    return np.array(
        [(function(params + step * e) - function(params - step * e)) / (2 * step) for e in np.eye(len(params))]
    )


def resolved_objective(mdp, reward, upper_reward, temperature):
    """f as a function of ν, its lower level solved anew each time."""

    def objective(params):
        solution = soft_value_iteration(mdp, reward(params)[0], temperature, tolerance=1e-14)
        return expected_return(mdp, solution.policy, upper_reward(params)[0])

    return objective
