"""Every estimator of the implicit term against finite differences of a re-solved, exactly enumerated lower level."""

from __future__ import annotations

import functools

import pytest
import torch

import parl_core as parl
from tests.hypergrad.enumerated import DTYPE, Enumerated
from tests.hypergrad.test_estimators import preference_pairs, relative, true_utility, utility_loss

TEMPERATURE = 0.3


class Nudged(Enumerated):
    """Its lower objective has `nudge`·L added, L the upper loss with U as `losses` (N,) gives it."""

    nudge: float = 0.0
    losses: torch.Tensor | None = None

    def value(self, theta, reward):
        value = super().value(theta, reward)
        return value if self.losses is None else value + self.nudge * (self.probabilities(theta) @ self.losses)


@functools.lru_cache
def soft_problem():
    """At the soft optimum of a policy class that contains it; with its utility loss and finite differences."""
    problem = Nudged(temperature=TEMPERATURE, observe_time=True)
    theta = problem.solve(problem.reward)
    problem.put(theta)
    loss, oracle = utility_loss(problem)
    return problem, theta, loss, problem.finite_differences(oracle)


def call(problem, theta, loss, **options):
    trajectories = problem.trajectories(theta)
    return parl.hypergradient(
        problem.policy, problem.reward, trajectories, trajectories, loss=loss, discount=problem.discount, **options
    )


def best_response(problem, theta, loss):
    def respond(coefficient):
        problem.losses = loss.fn(problem.reward, problem.trajectories(theta)).detach()
        problem.nudge = coefficient
        try:
            return problem.trajectories(problem.solve(problem.reward, theta))
        finally:
            problem.losses = None

    return respond


@pytest.mark.parametrize("estimator", [parl.HPGD(TEMPERATURE), parl.BCHG(TEMPERATURE)], ids=lambda e: type(e).__name__)
def test_closed_forms_match_finite_differences(estimator):
    problem, theta, loss, expected = soft_problem()
    result = call(problem, theta, loss, estimator=estimator)
    assert relative(result.total, expected) < 1e-6
    assert result.solution is None


@pytest.mark.parametrize("estimator", [parl.HPGD(TEMPERATURE), parl.BCHG(TEMPERATURE)], ids=lambda e: type(e).__name__)
def test_closed_forms_match_finite_differences_of_the_preference_loss(estimator):
    problem = Enumerated(states=2, temperature=TEMPERATURE, observe_time=True)
    theta = problem.solve(problem.reward)
    problem.put(theta)
    pairs, oracle = preference_pairs(problem, theta)
    result = parl.hypergradient(
        problem.policy,
        problem.reward,
        problem.trajectories(theta),
        pairs,
        loss=parl.PreferenceLoss(),
        discount=problem.discount,
        estimator=estimator,
    )
    assert relative(result.total, problem.finite_differences(oracle)) < 1e-6


def test_given_advantages_replace_the_averages():
    problem, theta, loss, _ = soft_problem()
    averaged = call(problem, theta, loss, estimator=parl.BCHG(TEMPERATURE))
    losses = loss.fn(problem.reward, problem.trajectories(theta)).detach()
    probabilities = problem.probabilities(theta)

    def advantages(trajectories):
        """E[U | h, s, a] − E[U | h, s], by one loop over the steps; observations hold the time."""
        states = trajectories.observations.argmax(-1)
        weights, values = probabilities[problem.owner], losses[problem.owner]
        found = torch.empty(trajectories.num_steps, dtype=DTYPE)
        for step in range(trajectories.num_steps):
            same_state = states == states[step]
            same = same_state & (problem.actions == problem.actions[step])
            found[step] = (weights[same] @ values[same]) / weights[same].sum() - (
                weights[same_state] @ values[same_state]
            ) / weights[same_state].sum()
        return found

    given = call(problem, theta, loss, estimator=parl.BCHG(TEMPERATURE, advantages))
    torch.testing.assert_close(given.total, averaged.total)


def test_the_shortcut_is_exact_for_one_step_and_off_for_more():
    problem, theta, loss, expected = soft_problem()
    direct = call(problem, theta, loss, estimator=parl.DirectOnly())
    result = call(problem, theta, loss, estimator=parl.SoBiRL(TEMPERATURE))
    assert not direct.implicit.any()
    implicit = expected - direct.total
    assert relative(result.implicit, implicit) > 0.1  # three steps only; the longer the horizon the worse
    myopic = Enumerated(temperature=TEMPERATURE, observe_time=True, horizon=1, states=6)
    theta = myopic.solve(myopic.reward)
    myopic.put(theta)
    loss, oracle = utility_loss(myopic)
    result = call(myopic, theta, loss, estimator=parl.SoBiRL(TEMPERATURE))
    assert relative(result.total, myopic.finite_differences(oracle)) < 1e-6


def test_contrasts_converge_at_their_rates():
    problem, theta, loss, expected = soft_problem()
    respond = best_response(problem, theta, loss)
    errors = {}
    for nudge in (0.04, 0.02):
        two_sided = call(problem, theta, loss, estimator=parl.NudgedContrast(respond, nudge))
        one_sided = call(problem, theta, loss, estimator=parl.ValuePenalty(respond, 1 / nudge))
        errors[nudge] = relative(two_sided.total, expected), relative(one_sided.total, expected)
    (two, one), (half_two, half_one) = errors.values()
    assert half_two < 1e-3
    assert two / half_two == pytest.approx(4.0, rel=0.05)
    assert one / half_one == pytest.approx(2.0, rel=0.1)


def test_unrolling_is_the_neumann_series_cut_after_its_steps():
    problem = Enumerated(temperature=0.1, damping=0.1)
    theta = problem.solve(problem.reward)
    problem.put(theta)
    loss, oracle = utility_loss(problem)
    hessian = torch.autograd.functional.hessian(lambda t: problem.value(t, problem.reward), theta)
    losses = loss.fn(problem.reward, problem.trajectories(theta)).detach()
    b = torch.autograd.functional.jacobian(lambda t: problem.probabilities(t) @ losses, theta)
    start = theta.clone().requires_grad_()
    (ascent,) = torch.autograd.grad(problem.value(start, problem.reward), start, create_graph=True)
    step_size, series, term = 2.0, torch.zeros_like(b), b
    for _ in range(10):
        series, term = series + step_size * term, term + step_size * (hessian @ term)
    (expected,) = torch.autograd.grad(ascent @ series, problem.reward.table)
    estimator = parl.Unrolled(10, step_size, temperature=0.1, damping=0.1)
    result = call(problem, theta, loss, estimator=estimator)
    torch.testing.assert_close(result.implicit, expected.reshape(-1), rtol=1e-8, atol=1e-11)
    longer = call(problem, theta, loss, estimator=parl.Unrolled(60, step_size, temperature=0.1, damping=0.1))
    assert relative(longer.total, problem.finite_differences(oracle)) < 1e-3


def test_zero_order_is_within_its_own_standard_error():
    problem, theta, loss, expected = soft_problem()
    utility = true_utility(problem)

    def objective(reward):
        with torch.no_grad():
            theta_star = problem.solve(reward, theta)
            returns = problem.sum_steps(reward(problem.observations, problem.actions))
            return problem.probabilities(theta_star) @ (-utility + 0.05 * returns**2)

    result = call(problem, theta, loss, estimator=parl.ZeroOrder(objective, radius=1e-3, directions=60, seed=1))
    z = (result.total - expected) / result.stderr
    # 18 coordinates, each a mean of 60 products of Gaussians: |z| > 5 has a false-alarm rate below 1e-3 by Student's t.
    assert z.abs().max() < 5
    assert 0.5 < z.square().mean() < 2
    assert torch.cosine_similarity(result.total, expected, dim=0) > 0.7


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("states", [2, 3], ids=["preferences", "utility"])
def test_unrolling_off_the_optimum_is_the_derivative_of_its_own_steps(states, baseline):
    """Finite differences of L after four ascent steps on the exact value, from a policy that is not at the optimum."""
    problem = Enumerated(terminal=True, temperature=0.2, damping=0.1, states=states)
    theta = torch.randn(problem.num_params, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
    problem.put(theta)
    if states == 2:
        data, loss = preference_pairs(problem, theta)[0], parl.PreferenceLoss()
        number = torch.arange(len(problem.dynamics))
        first, second = (i.reshape(-1) for i in torch.meshgrid(number, number, indexing="ij"))
    else:
        data, loss = problem.trajectories(theta), utility_loss(problem)[0]
    fixed = loss.per_sample(problem.reward, data).detach()

    def after_steps():
        moved = theta
        for _ in range(4):
            moved = moved.detach().requires_grad_()
            (ascent,) = torch.autograd.grad(problem.value(moved, problem.reward), moved)
            moved = moved + 0.7 * ascent
        with torch.no_grad():
            probabilities = problem.probabilities(moved)
            joint = probabilities[first] * probabilities[second] if states == 2 else probabilities
            return float(joint @ fixed)

    expected = torch.zeros_like(problem.reward.table)
    for place in torch.cartesian_prod(*map(torch.arange, expected.shape)).tolist():
        ends = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                problem.reward.table[tuple(place)] += step
            ends.append(after_steps())
        with torch.no_grad():
            problem.reward.table[tuple(place)] += 1e-5
        expected[tuple(place)] = (ends[0] - ends[1]) / 2e-5
    result = parl.hypergradient(
        problem.policy,
        problem.reward,
        problem.trajectories(theta),
        data,
        loss=loss,
        discount=problem.discount,
        estimator=parl.Unrolled(4, 0.7, temperature=0.2, damping=0.1),
        baseline=baseline,
    )
    assert relative(result.implicit, expected.detach().reshape(-1)) < 1e-7


def test_unrolling_too_far_warns():
    problem, theta, loss, _ = soft_problem()
    away = theta + torch.randn(theta.shape, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    problem.put(away)
    try:
        with pytest.warns(parl.HypergradientWarning, match=r"effective .* of the sample") as caught:
            call(problem, away, loss, estimator=parl.Unrolled(5, 50.0, temperature=TEMPERATURE))
        assert caught[0].filename == __file__
    finally:
        problem.put(theta)
    with pytest.raises(ValueError, match="leave out cross and chunk_steps"):
        call(problem, theta, loss, estimator=parl.Unrolled(2, 0.1), chunk_steps=4)
    with pytest.raises(ValueError, match="whole number"):
        parl.Unrolled(1.5, 0.1)


@pytest.mark.parametrize("estimator", [parl.HPGD(TEMPERATURE), parl.BCHG(TEMPERATURE)], ids=lambda e: type(e).__name__)
def test_closed_forms_on_samples_agree_with_the_exact_vector(estimator):
    """200 batches of 300; coordinates of the mean within 5 of its standard errors plus 5% for the averages."""
    problem, theta, _, _ = soft_problem()
    utility, probabilities = true_utility(problem), problem.probabilities(theta)
    every = parl.Trajectories(problem.observations, problem.actions, problem.offsets)
    exact = call(problem, theta, utility_loss(problem)[0], estimator=estimator).implicit
    generator = torch.Generator().manual_seed(0)

    def draw():
        index = torch.multinomial(probabilities, 300, replacement=True, generator=generator)
        return every.select(index), index

    found = []
    for _ in range(200):
        (lower, _), (upper, index) = draw(), draw()

        def fn(reward, trajectories, index=index):
            returns = trajectories.sum_steps(reward(trajectories.observations, trajectories.actions))
            return -utility[index] + 0.05 * returns**2

        found.append(
            parl.hypergradient(
                problem.policy,
                problem.reward,
                lower,
                upper,
                loss=parl.TrajectoryLoss(fn),
                discount=problem.discount,
                estimator=estimator,
            ).implicit
        )
    mean = torch.stack(found).mean(0)
    spread = torch.stack(found).std(0) / len(found) ** 0.5
    assert ((mean - exact).abs() < 5 * spread + 0.05 * exact.norm()).all()
    assert relative(mean, exact) < 0.1


@pytest.mark.parametrize(
    "estimator", [parl.HPGD(0.1), parl.BCHG(0.1), parl.SoBiRL(0.1)], ids=lambda e: type(e).__name__
)
def test_closed_forms_refuse_data_without_recurring_states(estimator):
    torch.manual_seed(0)
    policy = parl.policies.GaussianPolicy(3, 2, hidden=(4,))
    reward = parl.rewards.RewardEnsemble(3, 2, hidden=(4,))
    observations = torch.randn(20, 3)
    data = parl.Trajectories(observations, policy.sample(observations)[0].detach(), torch.arange(0, 21, 4))
    loss = parl.TrajectoryLoss(lambda r, t: t.sum_steps(r(t.observations, t.actions)))
    with pytest.raises(ValueError, match="no state recurs"):
        parl.hypergradient(policy, reward, data, data, loss=loss, discount=0.9, estimator=estimator)


@pytest.mark.filterwarnings("ignore::parl_core.HypergradientWarning")
@pytest.mark.parametrize(
    "estimator",
    [parl.HPGD(TEMPERATURE), parl.BCHG(TEMPERATURE), parl.SoBiRL(TEMPERATURE)],
    ids=lambda e: type(e).__name__,
)
def test_closed_forms_of_empty_upper_trajectories_are_zero(estimator):
    problem, theta, _, _ = soft_problem()
    none = torch.zeros(0, dtype=torch.int64)
    empty = parl.Trajectories(problem.observations[none], problem.actions[none], torch.zeros(4, dtype=torch.int64))
    result = parl.hypergradient(
        problem.policy,
        problem.reward,
        problem.trajectories(theta),
        empty,
        loss=parl.TrajectoryLoss(lambda r, t: torch.tensor([1.0, 2.0, 4.0], dtype=DTYPE)),
        discount=problem.discount,
        estimator=estimator,
    )
    assert not result.implicit.any()
