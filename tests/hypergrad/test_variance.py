"""Independent batches, cross-fitting and baselines: exact, by summing over all samples."""

from __future__ import annotations

import itertools

import pytest
import torch

import parl_core as parl
from tests.hypergrad.enumerated import DTYPE, Enumerated
from tests.hypergrad.test_estimators import relative, true_utility

TIGHT = parl.CG(rtol=1e-12, max_iterations=500)


class Sampled:
    """An enumerated problem at its optimum, from which trajectories are drawn."""

    def __init__(self, **options) -> None:
        self.problem = Enumerated(**options)
        self.theta = self.problem.solve(self.problem.reward)
        self.problem.put(self.theta)
        self.probabilities = self.problem.probabilities(self.theta)
        self.all = parl.Trajectories(self.problem.observations, self.problem.actions, self.problem.offsets)
        self.exact = self.all.with_weights(self.probabilities)
        self.utility = true_utility(self.problem)

    def draw(self, number: int, generator: torch.Generator) -> tuple[parl.Trajectories, torch.Tensor]:
        index = torch.multinomial(self.probabilities, number, replacement=True, generator=generator)
        return self.all.select(index), index

    def loss(self, index: torch.Tensor) -> parl.TrajectoryLoss:
        """`utility_loss` on the trajectories of these numbers."""

        def fn(reward, trajectories):
            returns = trajectories.sum_steps(reward(trajectories.observations, trajectories.actions))
            return -self.utility[index] + 0.05 * returns**2

        return parl.TrajectoryLoss(fn)

    def call(self, lower, upper, index, **options) -> parl.Hypergradient:
        options = dict(curvature=parl.Identity(), solver=TIGHT) | options
        return parl.hypergradient(
            self.problem.policy,
            self.problem.reward,
            lower,
            upper,
            loss=self.loss(index),
            discount=self.problem.discount,
            **options,
        )

    def expectation(self, number: int, estimate) -> torch.Tensor:
        """Of estimate(trajectories, index) over all samples of `number` trajectories: exact."""
        total = 0.0
        for draw in itertools.product(range(len(self.probabilities)), repeat=number):
            index = torch.tensor(draw)
            total = total + self.probabilities[index].prod() * estimate(self.all.select(index), index)
        return total


@pytest.fixture(scope="module")
def tiny():
    """Ragged, nine trajectories."""
    sampled = Sampled(damping=0.1, terminal=True, states=2, horizon=2)
    assert len(sampled.probabilities) < 10
    return sampled


def every(sampled: Sampled) -> torch.Tensor:
    return torch.arange(len(sampled.probabilities))


def test_cross_fitting_is_unbiased_and_a_shared_sample_is_not(tiny):
    exact = tiny.call(tiny.exact, tiny.exact, every(tiny)).implicit
    fitted = tiny.expectation(3, lambda t, i: tiny.call(t, t, i, folds=3).implicit)
    torch.testing.assert_close(fitted, exact, rtol=1e-9, atol=1e-12)
    shared = tiny.expectation(3, lambda t, i: tiny.call(t, t, i).implicit)
    assert relative(shared, exact) > 0.2


@pytest.fixture(scope="module")
def smallest():
    """Four trajectories of one step, and a curvature that depends on the data."""
    return Sampled(damping=0.1, states=2, horizon=1), dict(
        curvature=parl.ScoreHessian(damping=2.0), solver=parl.Dense()
    )


def test_three_folds_take_each_factor_from_its_own(smallest):
    """One batch for all: the expectation is that of b, H and C from three independent batches of one trajectory."""
    small, options = smallest
    separate = small.expectation(
        1,
        lambda first, _: small.expectation(
            1, lambda second, _: small.call(first, small.exact, every(small), cross=second, **options).implicit
        ),
    )
    fitted = small.expectation(3, lambda t, i: small.call(t, t, i, folds=3, **options).implicit)
    torch.testing.assert_close(fitted, separate, rtol=1e-9, atol=1e-12)


def test_two_folds_suffice_for_an_independent_upper_batch(smallest):
    """The expectation is then that of H and C from batches of one trajectory each, with b exact."""
    small, options = smallest
    separate = small.expectation(
        1,
        lambda first, _: small.expectation(
            1, lambda second, _: small.call(first, small.exact, every(small), cross=second, **options).implicit
        ),
    )
    fitted = small.expectation(
        2,
        lambda upper, i: small.expectation(
            2, lambda lower, _: small.call(lower, upper, i, folds=2, **options).implicit
        ),
    )
    torch.testing.assert_close(fitted, separate, rtol=1e-9, atol=1e-12)


def test_two_folds_suffice_where_only_two_factors_share_their_data(smallest):
    """b and C from one batch and H from another; or b and H, with C apart."""
    small, options = smallest

    def apart(one, other, i, *, cross_shares):
        lower, cross = (other, one) if cross_shares else (one, other)
        return small.call(lower, one, i, cross=cross, folds=2, **options).implicit

    separate = small.expectation(
        1,
        lambda first, _: small.expectation(
            1, lambda second, _: small.call(first, small.exact, every(small), cross=second, **options).implicit
        ),
    )
    for cross_shares in (True, False):
        fitted = small.expectation(
            2,
            lambda one, i, share=cross_shares: small.expectation(
                2, lambda other, _: apart(one, other, i, cross_shares=share)
            ),
        )
        torch.testing.assert_close(fitted, separate, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::parl_core.HypergradientWarning")
def test_the_solution_of_folds_is_their_worst_and_their_sum():
    """One iteration is not enough for the third of them."""
    sampled = Sampled(damping=0.3)
    data, index = sampled.draw(40, torch.Generator().manual_seed(3))
    solutions = []

    def solver(operator, rhs, x0=None):
        limit = 1 if len(solutions) == 2 else 200
        solutions.append(parl.CG(rtol=1e-6, max_iterations=limit)(operator, rhs, x0))
        return solutions[-1]

    options = dict(curvature=parl.ScoreHessian(damping=0.3), solver=solver, folds=4)
    result = sampled.call(data, data, index, **options)
    assert len({solution.status for solution in solutions}) > 1
    assert not result.solution.status.ok
    assert float(result.solution.residuals[-1]) == max(float(s.residuals[-1]) for s in solutions)
    assert result.solution.products == sum(s.products for s in solutions)
    assert result.solution.cost == pytest.approx(sum(s.cost for s in solutions))
    torch.testing.assert_close(result.solution.value, torch.stack([s.value for s in solutions]).mean(0))


@pytest.mark.parametrize(
    ("folds", "shared", "words"),
    [(2, True, "from 3 up since upper and lower share"), (1.5, False, "whole number"), (4, True, "at most the number")],
)
def test_folds_that_cannot_work_are_refused(tiny, folds, shared, words):
    lower, index = tiny.draw(3, torch.Generator().manual_seed(0))
    upper = lower if shared else tiny.all.select(index)
    with pytest.raises(ValueError, match=words):
        tiny.call(lower, upper, index, folds=folds)
    with pytest.raises(ValueError, match="without given weights"):
        tiny.call(tiny.exact, tiny.exact, every(tiny), folds=3)


def test_a_centred_cross_term_is_unbiased(tiny):
    """Over all samples of three lower trajectories, with b exact."""
    exact = tiny.call(tiny.exact, tiny.exact, every(tiny)).implicit
    mean = tiny.expectation(3, lambda t, _: tiny.call(t, tiny.exact, every(tiny)).implicit)
    torch.testing.assert_close(mean, exact, rtol=1e-9, atol=1e-12)


def test_centring_takes_most_of_the_noise_off_a_network_reward():
    """The gradient of a network's reward has a large mean over states, which an uncentred S multiplies."""
    torch.manual_seed(0)
    policy = parl.policies.GaussianPolicy(3, 2, hidden=(8,)).double()
    reward = parl.rewards.RewardEnsemble(3, 2, hidden=(8,), members=1).double()
    fixed = torch.ones(sum(p.numel() for p in policy.parameters()), dtype=DTYPE)

    def solver(operator, rhs, x0=None):
        return parl.Solution(fixed, parl.Status.CONVERGED, 0, rhs[:1], 0.0, False)

    implicit = {True: [], False: []}
    for _ in range(40):
        observations = torch.randn(200, 3, dtype=DTYPE)
        actions = policy.sample(observations)[0]
        data = parl.Trajectories(observations, actions, torch.arange(0, 201, 10))
        for baseline, found in implicit.items():
            result = parl.hypergradient(
                policy,
                reward,
                data,
                data,
                loss=parl.TrajectoryLoss(lambda r, t: torch.ones(t.num_trajectories, dtype=DTYPE)),
                discount=0.99,
                curvature=parl.Identity(),
                solver=solver,
                baseline=baseline,
            )
            found.append(result.implicit)
    variance = {baseline: torch.stack(found).var(0).sum() for baseline, found in implicit.items()}
    assert variance[True] < 0.25 * variance[False]


def test_a_state_baseline_is_unbiased_and_less_noisy(tiny):
    """b over all samples of two upper trajectories, with C exact; the baseline is the mean loss from the first state."""
    exact = tiny.call(tiny.exact, tiny.exact, every(tiny)).implicit
    returns = tiny.problem.sum_steps(tiny.problem.reward(tiny.problem.observations, tiny.problem.actions)).detach()
    losses = tiny.probabilities * (-tiny.utility + 0.05 * returns**2)

    def first_state(trajectories):
        return trajectories.observations[trajectories.offsets[:-1]].argmax(-1)

    mass, total = (
        torch.zeros(2, dtype=DTYPE).index_add(0, first_state(tiny.all), values)
        for values in (tiny.probabilities, losses)
    )

    def expected(trajectories):
        return (total / mass.clamp_min(1e-9))[first_state(trajectories)][trajectories.trajectory_index]

    def moments(baseline):
        def implicit(upper, index):
            return tiny.call(tiny.exact, upper, index, baseline=baseline).implicit

        mean = tiny.expectation(2, implicit)
        return mean, tiny.expectation(2, lambda upper, index: (implicit(upper, index) - exact).square().sum())

    (with_baseline, less), (without, more) = moments(expected), moments(False)
    for mean in (with_baseline, without):
        torch.testing.assert_close(mean, exact, rtol=1e-9, atol=1e-12)
    assert less < 0.8 * more
