"""check_hypergradient on problems of the user's own: two losses, or a policy and a reward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import parl_core as parl
from parl_core.hypergrad.check import bilevel
from tests.hypergrad.test_check import by_name

F64 = torch.float64


def regression(**changes):
    """A lower level without a closed form: logistic regression with a weight per penalty, from a far start."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(30, 3, generator=generator, dtype=F64)
    targets = (torch.rand(30, generator=generator, dtype=F64) > 0.5).to(F64)

    def lower(up, low):
        loss = nn.functional.binary_cross_entropy_with_logits(features @ low["w"], targets)
        return loss + 0.5 * (up["log_l2"].exp() * low["w"] ** 2).sum()

    def upper(up, low):
        return torch.tanh(features[:9] @ low["w"]).mean() + 0.1 * (up["log_l2"] ** 2).sum()

    fields = dict(
        upper_loss=upper,
        lower_loss=lower,
        upper_params={"log_l2": torch.tensor([0.3, -0.2, 0.1], dtype=F64)},
        lower_params={"w": torch.full((3,), 4.0, dtype=F64)},
    )
    return parl.BilevelProblem(**(fields | changes))


def test_a_problem_of_the_users_own_with_the_default_solve():
    problem = regression()
    table = parl.check_hypergradient(problem)
    assert by_name(table)["CG"].relative_error < 1e-8
    assert by_name(table)["DirectOnly"].relative_error > 1e-2
    assert "NOT SOLVED" not in table.title
    assert (problem.lower_params["w"] == 4.0).all()


def test_the_default_solve_leaves_a_region_of_negative_curvature():
    """g = (y² − x)²/4 + y/10 from y = 0.01, where g'' < 0: L-BFGS has to find the way."""
    x, y = {"x": torch.tensor(2.0, dtype=F64)}, {"y": torch.tensor(0.01, dtype=F64)}
    found = bilevel.minimise(lambda up, low: (low["y"] ** 2 - up["x"]) ** 2 / 4 + low["y"] / 10, x, y)["y"]
    slope = found * (found**2 - 2) + 0.1
    assert abs(float(slope)) < 1e-12
    assert float(3 * found**2 - 2) > 0


def test_a_lower_level_without_a_minimum_is_called_unsolved():
    problem = regression(lower_loss=lambda up, low: (low["w"] - up["log_l2"]).sum())
    assert "LOWER LEVEL NOT SOLVED" in str(parl.check_hypergradient(problem))


def test_a_nan_at_one_of_the_solves_shows_in_the_header():
    game, count = parl.LinearQuadraticGame(), 0
    inner = game.solve

    def nan_once(x, y):
        nonlocal count
        count += 1
        return {"y": inner(x, y)["y"] * (float("nan") if count == 3 else 1.0)}

    game.solve = nan_once
    assert "LOWER LEVEL NOT SOLVED: its gradient norm is up to nan" in parl.check_hypergradient(game).title


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 1.05])
def test_a_lower_solve_that_stops_short_or_goes_too_far_shows_in_the_header(share):
    game = parl.LinearQuadraticGame()
    inner = game.solve
    assert "NOT SOLVED" not in parl.check_hypergradient(game).title
    game.solve = lambda x, y: {"y": share * inner(x, y)["y"]}
    assert "LOWER LEVEL NOT SOLVED: its gradient norm is up to" in parl.check_hypergradient(game).title


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_solve_that_goes_a_share_of_the_way_from_a_perfect_start_is_measured_by_what_it_leaves(share):
    """The gradient is zero at the problem itself; what is left after a step is 1 − share of what the step adds. The
    differences then hold that share of the implicit term: with 0, DirectOnly would be certified."""
    game = parl.LinearQuadraticGame()
    inner = game.solve
    game.lower_params = inner(game.upper_params, {})
    game.solve = lambda x, y: {"y": y["y"] + share * (inner(x, y)["y"] - y["y"])}
    table = parl.check_hypergradient(game)
    left = float(table.title.split("LOWER LEVEL NOT SOLVED")[1].split(", ")[1].split()[0])
    assert left == pytest.approx(1 - share, rel=0.06)  # it is printed to one digit
    assert share or by_name(table)["DirectOnly"].relative_error < 1e-10


def test_a_lower_level_without_the_upper_parameters_is_solved_if_its_gradient_is_zero():
    alone = regression(lower_loss=lambda up, low: ((low["w"] - 0.1) ** 2).sum())
    assert "which no step changes" in parl.check_hypergradient(alone).title
    assert "NOT SOLVED" not in parl.check_hypergradient(alone).title
    alone.solve = lambda x, y: {"w": y["w"] - 1e-3}
    assert "LOWER LEVEL NOT SOLVED" in parl.check_hypergradient(alone).title


def test_float32_with_a_solve_and_float32_data_without_one():
    single = torch.tensor([1.0, 2.0])
    fields = dict(
        upper_loss=lambda up, low: ((low["y"] - 1.0) ** 2).sum(),
        lower_loss=lambda up, low: 0.5 * ((low["y"] - up["x"] @ torch.stack((single, single * 0.5))) ** 2).sum(),
        upper_params={"x": torch.tensor([0.5, 0.1])},
        lower_params={"y": torch.zeros(2)},
    )
    solved = parl.BilevelProblem(**fields, solve=lambda up, low: {"y": up["x"] @ torch.stack((single, single * 0.5))})
    table = parl.check_hypergradient(solved)
    assert by_name(table)["CG"].relative_error < 1e-3
    assert table.reference_error < 1e-3
    with pytest.raises(TypeError, match="lower_loss must take float64 parameters where solve is left out"):
        parl.check_hypergradient(parl.BilevelProblem(**fields))


def test_many_parameters_are_checked_along_random_directions():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(300, generator=generator, dtype=F64)
    problem = parl.BilevelProblem(
        upper_loss=lambda up, low: ((low["y"] - target) ** 2).mean() + torch.sin(up["x"]).mean(),
        lower_loss=lambda up, low: 0.5 * ((low["y"] - torch.tanh(up["x"])) ** 2).sum(),
        upper_params={"x": torch.randn(300, generator=generator, dtype=F64)},
        lower_params={"y": torch.zeros(300, dtype=F64)},
        solve=lambda up, low: {"y": torch.tanh(up["x"])},
    )
    table = parl.check_hypergradient(problem)
    assert "along 32 random directions" in table.title and "to which error, cosine" in table.title
    assert table.reference.shape == (32,)
    assert by_name(table)["CG"].relative_error < 1e-7
    assert by_name(table)["CG"].cosine == pytest.approx(1.0, abs=1e-9)
    assert by_name(table)["DirectOnly"].relative_error > 0.1


class Softmax(nn.Module):
    """Logits linear in the first features; a buffer that counts calls."""

    def __init__(self, features: int, actions: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((features, actions), 0.25, dtype=F64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def log_prob(self, observations, actions):
        logits = observations[:, : self.weight.shape[0]] @ self.weight
        return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


class Linear(nn.Module):
    def __init__(self, features: int, actions: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.weight = nn.Parameter(torch.randn(features, actions, generator=generator, dtype=F64))

    def forward(self, observations, actions):
        values = torch.tanh(observations[:, : self.weight.shape[0]] @ self.weight)
        return values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def contextual_bandit(*, temperature=0.0, damping=0.2, distinct=False, solve=None, data=None):
    """Four contexts with two features, three actions, all enumerated; the lower level is solved by Newton's method."""
    contexts, actions = 4, 3
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(contexts, 2, generator=generator, dtype=F64).repeat_interleave(actions, 0)
    taken = torch.arange(actions).repeat(contexts)
    if distinct:  # a feature that neither policy nor reward reads
        features = torch.cat((features, torch.arange(contexts * actions, dtype=F64).unsqueeze(-1)), dim=1)
    worth = torch.rand(contexts * actions, generator=generator, dtype=F64)
    every = parl.Trajectories(features, taken, torch.arange(contexts * actions + 1))

    def losses(reward, trajectories):
        return (reward(trajectories.observations, trajectories.actions) - worth) ** 2 - 2 * worth

    def enumerate_under(policy):
        weights = policy.log_prob(features, taken).detach().exp() / contexts
        exact = every.with_weights(weights)
        return exact, exact

    def newton(policy, reward, nudge):
        with torch.no_grad():
            gains = reward(features, taken) + nudge * losses(reward, every)
            policy.calls += 1
        inputs = features[:, :2]

        def value(flat):
            log_prob = (inputs @ flat.view(2, actions)).log_softmax(-1).gather(-1, taken.unsqueeze(-1)).squeeze(-1)
            return (log_prob.exp() / contexts) @ (gains - temperature * log_prob) - 0.5 * damping * flat @ flat

        flat = policy.weight.detach().reshape(-1)
        for _ in range(30):
            gradient = torch.autograd.functional.jacobian(value, flat)
            if gradient.norm() < 1e-14:
                break
            flat = flat - torch.linalg.solve(torch.autograd.functional.hessian(value, flat), gradient)
        with torch.no_grad():
            policy.weight.copy_(flat.view(2, actions))

    return parl.PolicyProblem(
        Softmax(2, actions),
        Linear(2, actions),
        parl.TrajectoryLoss(losses),
        discount=1.0,
        data=data or enumerate_under,
        solve=solve or newton,
        temperature=temperature,
        damping=damping,
    )


def test_a_policy_problem_without_temperature_says_what_does_not_apply():
    table = parl.check_hypergradient(contextual_bandit())
    rows = by_name(table)
    assert float(table.title.split("lower level: gradient norm at most ")[1].split()[0]) < 1e-12
    for name in ("ScoreHessian", "ScoreHessian, MINRES", "ScoreHessian, Dense"):
        assert rows[name].relative_error < 1e-6, name
    assert rows["NudgedContrast"].relative_error < 1e-2
    for name in ("Fisher", "HPGD", "BCHG", "SoBiRL"):
        assert rows[name].relative_error is None and rows[name].seconds is None
        assert rows[name].note == "does not apply: no temperature"


def test_a_policy_class_without_the_optimum_and_states_that_do_not_recur():
    rows = by_name(parl.check_hypergradient(contextual_bandit(temperature=0.3, damping=0.05, distinct=True)))
    assert rows["ScoreHessian"].relative_error < 1e-6
    assert rows["Fisher"].relative_error > 1e-3
    for name in ("HPGD", "BCHG", "SoBiRL"):
        assert rows[name].relative_error is None
        assert rows[name].note == "does not apply: no state recurs"


def test_closed_forms_say_that_they_know_no_damping():
    rows = by_name(parl.check_hypergradient(contextual_bandit(temperature=0.3, damping=0.05)))
    for name in ("HPGD", "BCHG", "SoBiRL"):
        assert rows[name].relative_error > 1e-3
        assert rows[name].note == "takes the lower level as undamped"


@pytest.mark.parametrize("share", [0.4, 0.99])
def test_a_policy_short_of_its_optimum_shows_in_the_header(share):
    problem = contextual_bandit(temperature=0.3, damping=0.05)
    newton = problem.solve

    def short(policy, reward, nudge):
        newton(policy, reward, nudge)
        with torch.no_grad():
            policy.weight.mul_(share)

    problem.solve = short
    title = parl.check_hypergradient(problem).title
    assert "LOWER LEVEL NOT SOLVED" in title and "at the optimum" not in title


def test_a_policy_that_never_moves_shows_in_the_header():
    """It sits at the optimum of the reward as it is, so that its gradient there is zero."""
    problem = contextual_bandit(temperature=0.3, damping=0.05)
    problem.solve(problem.policy, problem.reward, 0.0)
    problem.solve = lambda policy, reward, nudge: None
    table = parl.check_hypergradient(problem)
    assert "LOWER LEVEL NOT SOLVED" in table.title and "1e+00 times what a step" in table.title
    assert by_name(table)["DirectOnly"].relative_error < 1e-10


def test_preference_pairs_and_a_solve_that_knows_no_nudge():
    problem = contextual_bandit(temperature=0.3, damping=0.05)
    newton, enumerate_under = problem.solve, problem.data

    def only_plain(policy, reward, nudge):
        if nudge:
            raise NotImplementedError("no nudge here")
        newton(policy, reward, 0.0)

    def pairs_under(policy):
        exact, _ = enumerate_under(policy)
        number = exact.num_trajectories
        first, second = torch.arange(number).repeat_interleave(number), torch.arange(number).repeat(number)
        labels = torch.sigmoid((second - first).to(F64))
        weights = exact.weights[first] * exact.weights[second]
        return exact, parl.PreferencePairs(exact.select(first), exact.select(second), labels, weights=weights)

    problem = dataclasses.replace(problem, loss=parl.PreferenceLoss(), solve=only_plain, data=pairs_under)
    rows = by_name(parl.check_hypergradient(problem))
    assert rows["ScoreHessian"].relative_error < 1e-6
    assert rows["DirectOnly"].relative_error > 1e-2
    for name in ("NudgedContrast", "ValuePenalty"):
        assert rows[name].relative_error is None
        assert rows[name].note == "NotImplementedError: no nudge here"


def test_a_solve_that_ignores_the_nudge_is_exposed():
    problem = contextual_bandit()
    newton = problem.solve
    problem.solve = lambda policy, reward, nudge: newton(policy, reward, 0.0)
    rows = by_name(parl.check_hypergradient(problem))
    assert rows["ScoreHessian"].relative_error < 1e-6
    assert rows["NudgedContrast"].relative_error == pytest.approx(rows["DirectOnly"].relative_error, rel=1e-6)
    assert rows["NudgedContrast"].relative_error > 0.1


def test_sampled_actions_share_their_random_numbers():
    """Data drawn from the global generator: without common random numbers the differences would be noise."""

    def data(policy):
        noise = torch.randn(64, 1, dtype=F64)
        observations = policy.weight.detach().reshape(1, -1)[:, :2] + noise
        sample = parl.Trajectories(observations, torch.zeros(64, dtype=torch.int64), torch.arange(65))
        return sample, sample

    problem = contextual_bandit(data=data)
    problem.loss = parl.TrajectoryLoss(lambda reward, t: reward(t.observations, t.actions))
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(parl.check_hypergradient(problem))
    assert found[0].reference_error < 1e-6
    assert torch.equal(found[0].reference, found[1].reference)


def test_arguments_of_the_wrong_kind_are_named():
    with pytest.raises(TypeError, match="problem must be a PolicyProblem or a BilevelProblem, got str"):
        parl.check_hypergradient("tabular")
    with pytest.raises(ValueError, match="step must be positive and finite, got 0"):
        parl.check_hypergradient(parl.LinearQuadraticGame(), step=0.0)
    with pytest.raises(ValueError, match="extra: 'CG' is a row of the table already"):
        parl.check_hypergradient(parl.LinearQuadraticGame(), extra={"CG": {}})
    with pytest.raises(TypeError, match=r"extra\['mine'\] must be a dict of keyword arguments, got CG"):
        parl.check_hypergradient(parl.LinearQuadraticGame(), extra={"mine": parl.CG()})
    with pytest.raises(ValueError, match="leader must be at least 1, got 0"):
        parl.LinearQuadraticGame(leader=0)
    with pytest.raises(TypeError, match="upper_params must be a non-empty dict"):
        regression(upper_params={})
    with pytest.raises(TypeError, match=r"lower_params\['w'\] must be a tensor, got list"):
        regression(lower_params={"w": [1.0]})
    with pytest.raises(TypeError, match="upper_loss must be a callable"):
        regression(upper_loss=3)
    with pytest.raises(TypeError, match="solve must be a callable"):
        regression(solve=3)
    with pytest.raises(ValueError, match="solve must return lower_params, with the same keys and shapes"):
        parl.check_hypergradient(regression(solve=lambda x, y: {"w": y["w"][:2]}))
    with pytest.raises(ValueError, match=r"upper_loss must return a scalar tensor, got \(3,\)"):
        parl.check_hypergradient(regression(upper_loss=lambda up, low: low["w"]))
    with pytest.raises(TypeError, match=r"data\(policy\) must return \(lower, upper\)"):
        parl.check_hypergradient(contextual_bandit(data=lambda policy: None))
    with pytest.raises(ValueError, match="damping must be finite and at least 0"):
        contextual_bandit(damping=-1.0)
    problem = contextual_bandit()
    with pytest.raises(TypeError, match="loss must be an instance, got the class: write PreferenceLoss"):
        dataclasses.replace(problem, loss=parl.PreferenceLoss)
    with pytest.raises(TypeError, match=r"policy must be a torch\.nn\.Module, got NoneType"):
        dataclasses.replace(problem, policy=None)
    with pytest.raises(TypeError, match="data must be a callable, got int"):
        dataclasses.replace(problem, data=3)
    with pytest.raises(ValueError, match="discount must lie in"):
        dataclasses.replace(problem, discount=1.5)
