"""check_hypergradient on data that are a sample: what its differences can see, and that it says so where they cannot."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import parl_core as parl
from tests.hypergrad.test_check import by_name
from tests.hypergrad.test_check_problems import contextual_bandit

F64 = torch.float64
WORTH = torch.tensor([1.0, 0.0, 0.2], dtype=F64)
TEMPERATURE = 0.3


class Arms(nn.Module):
    """Three arms: logits as a policy, rewards as a reward."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=F64))

    def log_prob(self, observations, actions):
        return self.values.log_softmax(0)[actions]

    def forward(self, observations, actions):
        return self.values[actions]


def trajectories(actions, weights=None):
    number = actions.shape[0]
    return parl.Trajectories(torch.zeros(number, 1, dtype=F64), actions, torch.arange(number + 1), weights=weights)


def every(policy):
    return trajectories(torch.arange(3), policy.values.detach().softmax(0))


def drawn(policy, number=30):
    return trajectories(torch.multinomial(policy.values.detach().softmax(0), number, replacement=True))


def pairs(policy):
    first, second = drawn(policy, 10), drawn(policy, 10)
    return parl.PreferencePairs(first, second, (WORTH[second.actions] > WORTH[first.actions]).to(F64))


def bandit(lower, upper, loss=None):
    def losses(reward, data):
        return (reward(data.observations, data.actions) - WORTH[data.actions]) ** 2

    def solve(policy, reward, nudge):
        with torch.no_grad():
            policy.values.copy_((reward.values + nudge * (reward.values - WORTH) ** 2) / TEMPERATURE)

    return parl.PolicyProblem(
        Arms([0.0, 0.0, 0.0]),
        Arms([0.0, 0.5, 1.0]),
        loss or parl.TrajectoryLoss(losses),
        discount=1.0,
        data=lambda policy: (lower(policy), upper(policy)),
        solve=solve,
        temperature=TEMPERATURE,
    )


@pytest.mark.parametrize(
    ("upper", "loss"), [(drawn, None), (pairs, parl.PreferenceLoss())], ids=["trajectories", "pairs"]
)
def test_discrete_actions_with_the_same_random_numbers_make_the_reference_blind(upper, loss):
    """No draw crosses the edge of its arm within the differences' steps: they see the direct term alone, exactly."""
    table = parl.check_hypergradient(bandit(drawn, upper, loss))
    assert by_name(table)["DirectOnly"].relative_error < 1e-10
    assert by_name(table)["Fisher"].relative_error > 0.01
    assert "REFERENCE BLIND TO THE IMPLICIT TERM: at 18 of 18 perturbed rewards" in " ".join(table.title.split())
    assert "SAMPLED DATA, lower (30) and upper (" in table.title
    assert table.reference_error == math.inf and "accurate to" not in table.title


def test_a_sample_of_which_a_few_actions_jump_is_found_too():
    """Where one jumps the differences are far off, which the second step size shows; where none does they are blind."""
    table = parl.check_hypergradient(bandit(every, lambda policy: drawn(policy, 100)))
    blind, looks = table.title.split("BLIND TO THE IMPLICIT TERM: at ")[1].split(" perturbed")[0].split(" of ")
    assert 0 < int(blind) < int(looks) == 18
    assert "SAMPLED DATA, upper (100):" in table.title


def test_data_that_the_policy_does_not_touch_are_found():
    fixed = trajectories(torch.tensor([0, 1, 2]), torch.tensor([0.2, 0.3, 0.5], dtype=F64))
    table = parl.check_hypergradient(bandit(every, lambda policy: fixed))
    assert "BLIND" in table.title and "SAMPLED" not in table.title


def test_enumerated_data_raise_no_alarm():
    table = parl.check_hypergradient(bandit(every, every))
    assert "BLIND" not in table.title and "SAMPLED" not in table.title
    assert table.reference_error < 1e-8
    assert by_name(table)["Fisher"].relative_error < 1e-8


def test_the_footnote_claims_nothing_that_a_row_contradicts():
    """SoBiRL lacks nothing where there is one step."""
    table = parl.check_hypergradient(bandit(every, every))
    assert by_name(table)["SoBiRL"].relative_error < 1e-6
    text = " ".join(str(table).split())
    assert "SoBiRL *" in text and "not exact in general:" in text and "of which a single step has none" in text
    assert "expected to be off" not in text


def test_a_reward_that_moves_no_policy_raises_no_alarm():
    """Every arm gets the same reward, so that the policy stays and the implicit term is zero."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(0.3, dtype=F64))

        def forward(self, observations, actions):
            return self.value.expand(actions.shape[0])

    problem = dataclasses.replace(bandit(every, drawn), reward=Constant())

    def solve(policy, reward, nudge):
        with torch.no_grad():
            policy.values.zero_().add_(1e-13 * reward.value)  # the rounding of a solve

    problem.solve = solve
    table = parl.check_hypergradient(problem)
    assert "BLIND" not in table.title
    assert by_name(table)["Fisher"].relative_error < 1e-8


def test_a_fixed_sample_with_density_ratios_is_a_reference():
    """The weighted mean of the losses is differentiated exactly; the lower level is enumerated."""
    fixed = Arms([0.0, 1.0, 2.0])
    actions = drawn(fixed, 50).actions

    def reweighted(policy):
        ratio = (policy.log_prob(None, actions) - fixed.log_prob(None, actions)).detach().exp()
        return trajectories(actions, ratio / ratio.sum())

    table = parl.check_hypergradient(bandit(every, reweighted))
    assert "BLIND" not in table.title and "SAMPLED" not in table.title
    assert by_name(table)["Fisher"].relative_error < 1e-8
    assert by_name(table)["DirectOnly"].relative_error > 1e-2


def test_reparameterised_actions_are_seen_up_to_sampling_noise():
    """The action is mean + noise and the best mean is r: the loss is E[(a − 1)²] = (r − 1)² + 1, of slope 2 (r − 1) = −1.

    The differences average 2 (a − 1), with a standard error of 2/√4000 = .032. The estimator's b, H and C have ones of .055,
    .068 and .022 about ∓1, and so their quotient one of .09, .1 with the differences'. Four of each: a false alarm in 1 of
    8000. The seed is fixed.
    """

    class Gaussian(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Parameter(torch.zeros((), dtype=F64))

        def log_prob(self, observations, actions):
            return torch.distributions.Normal(self.mean, 1.0, validate_args=False).log_prob(actions[:, 0])

    class Peak(nn.Module):
        def __init__(self):
            super().__init__()
            self.place = nn.Parameter(torch.tensor(0.5, dtype=F64))

        def forward(self, observations, actions):
            return -0.5 * (actions[:, 0] - self.place) ** 2

    def data(policy):
        sample = trajectories(policy.mean.detach() + torch.randn(4000, 1, dtype=F64))
        return sample, sample

    def solve(policy, reward, nudge):
        with torch.no_grad():
            policy.mean.copy_(reward.place)

    problem = parl.PolicyProblem(
        Gaussian(),
        Peak(),
        parl.TrajectoryLoss(lambda reward, t: (t.actions[:, 0] - 1.0) ** 2),
        discount=1.0,
        data=data,
        solve=solve,
    )
    table = parl.check_hypergradient(problem)
    assert "BLIND" not in table.title and "SAMPLED DATA, lower (4000) and upper (4000)" in table.title
    assert "as expected of this sample's noise" in table.title
    assert abs(float(table.reference) + 1.0) < 4 * 0.032
    assert by_name(table)["DirectOnly"].relative_error == 1.0
    assert by_name(table)["ScoreHessian"].relative_error < 0.4


def sampled(problem, number=400):
    """The contextual bandit of two features with drawn actions: its policy class is too small for the soft optimum."""
    enumerated = problem.data

    def data(policy):
        exact, upper = enumerated(policy)
        lower = exact.select(torch.multinomial(exact.weights, number, replacement=True))
        return parl.Trajectories(lower.observations, lower.actions, lower.offsets), upper

    return dataclasses.replace(problem, data=data)


def test_the_noise_of_a_sample_is_no_unsolved_lower_level_and_excuses_none():
    problem = sampled(contextual_bandit(temperature=0.3, damping=0.05))
    title = parl.check_hypergradient(problem).title
    assert "SAMPLED DATA, lower (400):" in title and "as expected of this sample's noise" in title
    left, noise = title.split("gradient norm up to ")[1].split(", as")[0], title.split("noise, ")[1].split("\n")[0]
    assert 0.3 < float(left) / float(noise) < 3.0
    newton = problem.solve

    def short(policy, reward, nudge):
        newton(policy, reward, nudge)
        with torch.no_grad():
            policy.weight.mul_(0.4)

    problem.solve = short
    assert "LOWER LEVEL NOT SOLVED" in parl.check_hypergradient(problem).title
