"""The study of environment steps at small settings, and its counting by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from parl_core.envs.tabular import FourRooms, nudged_contrast, occupancy, value_penalty
from parl_core.envs.tabular.problems.four_rooms_ascent import initial_weights
from parl_core.envs.tabular.sampled import sample_episodes
from parl_core.errors import ConfigError
from parl_core.reproduce.studies import samples
from parl_core.reproduce.studies.samples import SamplesStudy


def _rows(cosines, name="HPGD", temperature=0.001, where="start", seed=0):
    return [
        {
            "temperature": temperature,
            "where": where,
            "seed": seed,
            "estimator": name,
            "env_steps": steps,
            "cosine": cosine,
        }
        for steps, cosine in zip((500, 1000, 2000, 4000), cosines, strict=True)
    ]


@pytest.mark.parametrize(
    ("cosines", "needed"),
    [
        ((0.1, 0.5, 0.96, 0.99), 2000),
        ((0.96, 0.5, 0.96, 0.99), 2000),  # it has to stay
        ((0.96, 0.97, 0.96, 0.99), 500),
        ((0.96, 0.97, 0.96, 0.9), np.inf),
        ((0.1, 0.97, float("nan"), 0.99), 4000),
    ],
)
def test_steps_that_were_needed(cosines, needed):
    assert samples.steps_needed(list(zip((500, 1000, 2000, 4000), cosines, strict=True)), 0.95) == needed


def test_a_task_gives_every_estimator_at_every_budget():
    study = SamplesStudy(seeds=1, most_steps=16_000)
    rows = study.run({"temperature": 0.005, "where": "start", "seed": 0})["cosines"]
    names = {row["estimator"] for row in rows}
    assert names == {*samples.FROM_EPISODES, *samples.CONTRASTS, "ZeroOrder", "DirectOnly"}
    assert max(row["env_steps"] for row in rows) == 16_000 and all(-1 <= row["cosine"] <= 1 for row in rows)
    last = {row["estimator"]: row["cosine"] for row in rows if row["env_steps"] == 16_000}
    assert last["CertaintyEquivalent"] > 0.9 > last["SoBiRL"]
    assert rows == study.run({"temperature": 0.005, "where": "start", "seed": 0})["cosines"]


@pytest.mark.parametrize(("name", "form"), [("NudgedContrast", nudged_contrast), ("ValuePenalty", value_penalty)])
def test_contrasts_are_the_exact_ones_but_for_the_noise_of_visits(name, form, monkeypatch):
    """With the two policies' exact visits in place of the episodes' to rounding; from a million steps each, nearly."""
    weights, problem = initial_weights(0), FourRooms(1, 0.005, 1.0)
    exact = problem.hypergradient(weights, form, penalty=1 / 0.005).total
    sides = samples._nudged(problem, weights, name, 1_000_000, 0)
    estimate = samples._contrast(problem, weights, name, *sides)
    assert np.linalg.norm(estimate - exact) < 0.5 * np.linalg.norm(exact)

    monkeypatch.setattr(samples, "sample_episodes", lambda mdp, policy, *_: policy)
    monkeypatch.setattr(samples.sampled, "mean_visits", occupancy)
    sides = samples._nudged(problem, weights, name, 0, 0)
    np.testing.assert_allclose(samples._contrast(problem, weights, name, *sides), exact, rtol=1e-6, atol=1e-9)


def test_the_direct_term_of_many_episodes_is_the_exact_one():
    weights, problem = initial_weights(0), FourRooms(1, 0.005, 1.0)
    episodes = sample_episodes(problem.mdp, problem.response(weights), 200_000, 200, 0)
    exact = problem.hypergradient(weights).direct
    assert np.linalg.norm(samples._direct(problem, weights, episodes) - exact) < 0.05 * np.linalg.norm(exact)


def test_zero_order_gives_the_gradient_of_a_linear_objective(monkeypatch):
    """Two problems whose episodes all return c·w: the mean over directions is the mean c.

    A coordinate's mean over 20 000 directions has a standard error of at most √2·|c|/√20000 = .02: six of them are a false
    alarm of probability 1e-8.
    """

    class Linear:
        mdp, temperature = SimpleNamespace(discount=1.0), 1.0

        def __init__(self, slope):
            self.slope = np.array(slope)

        def lower(self, weights):
            return SimpleNamespace(value=None)

        def upper(self, weights):
            return SimpleNamespace(value=np.array([self.slope @ weights]))

    returns = SimpleNamespace(returns=lambda rewards, discount: rewards)
    monkeypatch.setattr(samples, "soft_policy_iteration", lambda *_: SimpleNamespace(policy=None))
    asked = []
    monkeypatch.setattr(samples, "sample_episodes", lambda mdp, policy, steps, *_: asked.append(steps) or returns)
    problems, weights = [Linear((3.0, 0.0, -1.0)), Linear((1.0, 0.0, 1.0))], np.array([0.3, -0.2, 0.1])
    budgets = [500, 2000, 5999, 6000, 40_000_000]
    estimates = samples._zero_order(problems, weights, budgets, 0)
    assert [budget for budget, _ in estimates] == budgets[1:]  # 500 steps pay for no direction
    assert (estimates[0][1] != estimates[2][1]).any() and sum(asked) == budgets[-1]
    np.testing.assert_allclose(estimates[-1][1], [2.0, 0.0, 0.0], atol=0.12)
    # along its first direction z the estimate is (c·z) z, and z is not the draw that the weights of this seed are
    first = estimates[0][1]
    direction = first / first[0] * np.sqrt(first[0] / 2.0)
    np.testing.assert_allclose(np.abs(direction), np.abs(np.random.default_rng((0, 1)).normal(size=3)), rtol=1e-9)


def test_budgets_end_with_the_most_steps():
    budgets = SamplesStudy(most_steps=5000)._budgets()
    assert budgets == [500, 592, 704, 840, 1000, 1188, 1412, 1680, 2000, 2376, 2828, 3360, 4000, 4756, 5000]
    assert SamplesStudy(most_steps=4000)._budgets()[-2:] == [3360, 4000]
    assert SamplesStudy(most_steps=500)._budgets() == [500]
    assert SamplesStudy()._budgets()[-1] == 1_000_000


def test_an_estimator_that_never_got_an_estimate_did_not_get_there():
    """A seed in which Fisher never had three episodes, and a task with the fewest steps there may be."""
    study = SamplesStudy(seeds=1, most_steps=500)
    rows = study.run({"temperature": 0.001, "where": "start", "seed": 0})["cosines"]
    assert {row["env_steps"] for row in rows} == {500}
    everywhere = [
        {**row, "temperature": temperature, "where": where}
        for temperature in samples.TEMPERATURES
        for where in samples._POINTS
        for row in rows
    ]
    everywhere.append({**everywhere[0], "estimator": "Fisher", "cosine": 0.99})
    (table,) = study.tables({"cosines": everywhere})
    assert {line[0]: line[1:] for line in table.rows}["Fisher"] == ("≤ 500", *["> 500"] * 5)


@pytest.mark.parametrize(
    ("theirs", "ours", "ratio"),
    [
        (6000.0, 1500.0, ("4.0", 4.0)),
        (6000.0, 500.0, ("≥ 12.0", 12.0)),
        (np.inf, 1500.0, ("> 6.0", 6.0)),
        (np.inf, 500.0, ("> 18.0", 18.0)),
        (500.0, 1500.0, ("≤ 0.3", 0.0)),
        (6000.0, np.inf, ("< 0.7", 0.0)),
        (500.0, np.inf, ("< 0.1", 0.0)),
        (500.0, 500.0, ("–", 0.0)),
        (np.inf, np.inf, ("–", 0.0)),
    ],
)
def test_ratios_say_no_more_than_is_known(theirs, ours, ratio):
    assert samples._ratio(theirs, ours, 9000) == ratio


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"most_steps": 499}, "most_steps must be at least 500, got 499"),
        ({"cosine": 0.0}, "cosine must be between 0 and 1, got 0"),
        ({"cosine": 1.0}, "cosine must be between 0 and 1, got 1"),
    ],
)
def test_settings_that_make_no_study_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SamplesStudy(**settings).tasks()


def test_table_and_ratio(tmp_path):
    study = SamplesStudy(seeds=1, most_steps=4000)
    rows = []
    for temperature in samples.TEMPERATURES:
        for where in ("start", "after 1000 steps"):
            rows += _rows((0.1, 0.97, 0.96, 0.99), "CertaintyEquivalent", temperature, where)
            rows += _rows((0.1, 0.5, 0.6, 0.99 if where == "start" else 0.5), "HPGD", temperature, where)
    (table,) = study.tables({"cosines": rows})
    assert table.rows[0] == ("CertaintyEquivalent", *["1,000"] * 6)
    assert table.rows[1] == ("HPGD", *["4,000", "> 4,000"] * 3)
    assert table.rows[2][1:] == ("4.0", "> 4.0") * 3
    assert "HPGD needs at least 3 times the steps of CertaintyEquivalent in 6 of 6 places" in table.note
    assert "the smallest ratio is 4.0." in table.note
    (figure,) = study.figures({"cosines": rows}, tmp_path)
    assert figure.stat().st_size > 10_000
