"""Tax design: the budget, the rewards by hand, derivatives by differences, and an optimum inside the box."""

import itertools

import numpy as np
import pytest

from parl_core.envs.tabular import TaxDesign, expected_return, grid_search, occupancy
from parl_core.envs.tabular.problems.tax import DISUTILITY, HOURS, MAX_RATE, NUM_ASSETS, SPENDING, WAGE
from tests.envs.tabular_problems import central_difference

ACTIONS = list(itertools.product(HOURS, SPENDING, SPENDING))


def _params_of(rates):
    share = np.asarray(rates) / MAX_RATE
    return np.log(share / (1.0 - share))


def test_assets_move_by_earnings_and_spending():
    problem = TaxDesign()
    for assets, (action, (hours, *basket)) in itertools.product(range(NUM_ASSETS), enumerate(ACTIONS)):
        spent = problem.spending[assets, action]
        assert spent.sum() == pytest.approx(min(assets, sum(basket)))  # all of the basket, or all there is
        np.testing.assert_allclose(spent * sum(basket), spent.sum() * np.array(basket))  # in its proportions
        expected = min(assets - spent.sum() + WAGE * hours, NUM_ASSETS - 1)
        row = problem.mdp.transitions[assets, action]
        assert row.sum() == pytest.approx(1.0) and row @ np.arange(NUM_ASSETS) == pytest.approx(expected)
        assert np.ptp(np.flatnonzero(row)) <= 1


def test_rewards_by_hand():
    """One hour, 1 on the necessity and 2 on the luxury, out of 4 assets; taxes of 30% and 60%."""
    problem = TaxDesign(welfare=0.2)
    lower, upper = problem.rewards(np.array([[0.3, 0.6]]))
    action = ACTIONS.index((1, 1, 2))
    utility = 0.3 * 0.7**0.3 / 0.3 + 0.6 * 0.8**0.8 / 0.8
    assert lower[0, 4, action] == pytest.approx(utility - DISUTILITY)
    assert upper[0, 4, action] == pytest.approx(np.log(1.0 + 0.3 + 1.2) + 0.2 * (0.7 + 0.8))
    # with 1 asset it buys a third of the basket
    assert upper[0, 1, action] == pytest.approx(np.log(1.0 + 1.5 / 3.0) + 0.2 * 1.5 / 3.0)


def test_derivatives_are_those_of_differences():
    problem = TaxDesign()
    for params in np.random.default_rng(0).normal(size=(3, 2)):
        for reward in (problem.lower, problem.upper):
            jacobian = reward(params).jacobian
            for at in np.ndindex(jacobian.shape[:2]):
                expected = central_difference(lambda x, at=at, of=reward: of(x).value[at], params)
                np.testing.assert_allclose(jacobian[at], expected, atol=1e-9)
        result = problem.hypergradient(params)
        np.testing.assert_allclose(result.total, central_difference(problem.objective, params, 1e-4), atol=1e-6)
        assert np.linalg.norm(result.implicit) > 0.1 * np.linalg.norm(result.direct)


def test_the_optimum_is_a_maximum_inside_the_box():
    """The gradient vanishes there and the Hessian is negative definite; the necessity, less elastic, is taxed more."""
    problem = TaxDesign()
    best = grid_search(problem.objectives, problem.low, problem.high, points=31)
    assert (best.point > 0.1).all() and (best.point < MAX_RATE - 0.1).all()
    params = _params_of(best.point)
    np.testing.assert_allclose(problem.choice(params), best.point)
    np.testing.assert_allclose(problem.hypergradient(params).total, 0.0, atol=1e-4)
    hessian = [central_difference(lambda x, i=i: problem.hypergradient(x).total[i], params, 1e-4) for i in range(2)]
    assert np.linalg.eigvalsh(hessian).max() < -0.05
    edges = np.array([(x, y) for x in np.linspace(0, MAX_RATE, 31) for y in (0.0, MAX_RATE)])
    on_edges = problem.objectives(np.concatenate([edges, edges[:, ::-1]]))
    assert on_edges.max() < best.value - 0.1
    assert best.point[0] > best.point[1] + 0.2


def test_taxes_discourage_work_and_revenue_has_a_peak():
    problem = TaxDesign()
    hours = np.array([hours for hours, _, _ in ACTIONS])

    def outcome(rate):
        params = _params_of([rate, rate])
        visits = occupancy(problem.mdp, problem.response(params))
        return visits.sum(0) @ hours, np.sum(visits * (problem.spending @ [rate, rate]))

    worked, revenue = zip(*(outcome(rate) for rate in np.linspace(0.05, 0.88, 12)), strict=True)
    assert (np.diff(worked) < 0.0).all()
    peak = int(np.argmax(revenue))
    assert 0 < peak < len(revenue) - 1 and revenue[-1] < 0.98 * revenue[peak]


def test_without_weight_on_welfare_only_revenue_counts():
    problem = TaxDesign(welfare=0.0)
    assert problem.objectives(np.zeros((1, 2)))[0] == 0.0
    params = np.array([0.3, -0.2])
    revenue = problem.spending @ problem.choice(params)
    expected = expected_return(problem.mdp, problem.response(params), np.log1p(revenue))
    assert problem.objective(params) == pytest.approx(expected)


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="temperature must be positive and finite, got -1"):
        TaxDesign(temperature=-1.0)
    with pytest.raises(ValueError, match=r"welfare must be at least 0 and finite, got -0\.5"):
        TaxDesign(welfare=-0.5)
