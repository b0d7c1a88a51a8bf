"""The objective at many choices at once, against the one-by-one way of the tabular module."""

import numpy as np
import pytest

from parl_core.envs.tabular import (
    TabularMDP,
    TaxDesign,
    audit_game,
    expected_return,
    matrix_game,
    random_game,
    random_mdp,
    soft_value_iteration,
)
from parl_core.envs.tabular.problems.design import expected_returns, soft_optima
from parl_core.errors import NonFiniteError

PROBLEMS = {"matrix": matrix_game, "audit": audit_game, "random": random_game, "tax": TaxDesign}


def _ending_mdp():
    """Each step ends the episode with probability .1."""
    mdp = random_mdp(4, 3, 0.95, seed=3)
    return TabularMDP(0.9 * mdp.transitions, mdp.initial, 0.95)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("mdp", [random_mdp(5, 3, 0.9, seed=0), random_mdp(4, 2, 0.0, seed=1), _ending_mdp()])
def test_policy_iteration_finds_what_value_iteration_finds(mdp, temperature):
    rewards = np.random.default_rng(0).normal(size=(7, mdp.num_states, mdp.num_actions))
    policies = soft_optima(mdp, rewards, temperature)
    returns = expected_returns(mdp, policies, rewards)
    for policy, earned, reward in zip(policies, returns, rewards, strict=True):
        expected = soft_value_iteration(mdp, reward, temperature, tolerance=1e-14).policy
        np.testing.assert_allclose(policy, expected, atol=1e-10 / temperature)
        np.testing.assert_allclose(earned, expected_return(mdp, policy, reward), rtol=1e-11)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_objectives_at_choices_are_those_at_parameters(problem):
    problem = problem()
    params = np.random.default_rng(0).normal(scale=2.0, size=(5, problem.num_params))
    choices = np.stack([problem.choice(x) for x in params])
    assert (choices >= problem.low).all() and (choices <= problem.high).all()
    np.testing.assert_allclose(problem.objectives(choices), [problem.objective(x) for x in params], atol=1e-9)


def test_many_choices_are_solved_in_parts():
    problem = matrix_game()
    choices = np.linspace(0.0, 1.0, 10_001)[:, None]
    pieces = [problem.objectives(piece) for piece in np.array_split(choices, 7)]
    np.testing.assert_allclose(problem.objectives(choices), np.concatenate(pieces), rtol=1e-12)
    assert problem.objectives(np.empty((0, 1))).shape == (0,)


def test_choices_that_are_none_are_refused():
    problem = TaxDesign()
    with pytest.raises(ValueError, match=r"choices must have shape \(N, 2\), got \(2,\)"):
        problem.objectives(np.zeros(2))
    with pytest.raises(ValueError, match=r"choices must lie between low and high, got 0\.95"):
        problem.objectives([[0.1, 0.95]])
    with pytest.raises(NonFiniteError, match="choices must be finite, got nan"):
        problem.objectives([[0.1, np.nan]])
