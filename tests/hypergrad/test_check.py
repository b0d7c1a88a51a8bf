"""check_hypergradient: that its reference is right, that right estimators pass and wrong ones are exposed."""

from __future__ import annotations

import dataclasses
import doctest
import math
import time
import warnings

import pytest
import torch
from torch import nn

import parl_core as parl
from parl_core.hypergrad.check import bilevel, call, policy, reference, subject, tabular

F64 = torch.float64
EXACT = ["Fisher", "Fisher, MINRES", "Fisher, NystromPCG", "Fisher, Neumann", "Fisher, Dense", "ScoreHessian"]
EXACT += ["HPGD", "BCHG"]


def by_name(table: parl.CheckTable) -> dict:
    return {row.name: row for row in table.rows}


@pytest.fixture(scope="module")
def default():
    begin = time.perf_counter()
    table = parl.check_hypergradient()
    return table, time.perf_counter() - begin


def test_every_estimator_of_the_default_problem_is_where_it_should_be(default):
    table, seconds = default
    rows = by_name(table)
    assert table.reference_error < 1e-8
    for name in EXACT:
        assert rows[name].relative_error < 1e-6, name
        assert rows[name].cosine == pytest.approx(1.0, abs=1e-9)
        assert rows[name].norm_ratio == pytest.approx(1.0, abs=1e-6)
    assert rows["NudgedContrast"].relative_error < 1e-3
    assert 1e-3 < rows["ValuePenalty"].relative_error < 0.1
    assert rows["Unrolled"].relative_error < 1e-4
    for name in ("LogProbHessian", "Identity", "SoBiRL", "DirectOnly"):
        assert rows[name].relative_error > 0.3, name
    # √(R / directions) = .42; this seed's draw is fixed.
    assert 0.05 < rows["ZeroOrder"].relative_error < 1.0
    assert set(rows) == {
        *EXACT,
        *(
            "LogProbHessian",
            "Identity",
            "SoBiRL",
            "DirectOnly",
            "NudgedContrast",
            "ValuePenalty",
            "Unrolled",
            "ZeroOrder",
        ),
    }
    assert seconds < 30
    assert all(row.seconds >= 0 for row in table.rows)


def exact_objective(problem, logits, nudge):
    """V + nudge·L of the tabular problem at `logits`, by sums over all trajectories; differentiable in them."""
    data = problem.data(problem.policy)[0]
    time, state = data.observations.unbind(-1)
    log_prob = logits.log_softmax(-1)[time, state, data.actions]
    with torch.no_grad():
        now = problem.policy.log_prob(data.observations, data.actions)
        dynamics = data.weights / data.sum_steps(now).exp()
        rewards = problem.reward(data.observations, data.actions)
        losses = problem.loss.per_sample(problem.reward, data)
    probabilities = dynamics * data.sum_steps(log_prob).exp()
    gains = problem.discount ** time.to(F64) * (rewards - problem.temperature * log_prob)
    return probabilities @ (data.sum_steps(gains) + nudge * losses), probabilities


@pytest.mark.parametrize("nudge", [0.0, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_problem_is_solved_and_enumerated(seed, nudge):
    problem = tabular.tabular_problem(seed)
    problem.solve(problem.policy, problem.reward, nudge)
    logits = problem.policy.logits.detach().clone().requires_grad_()
    value, probabilities = exact_objective(problem, logits, nudge)
    assert float(probabilities.detach().sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(torch.autograd.grad(value, logits)[0].norm()) < 1e-12
    noise = 0.1 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    assert float(exact_objective(problem, logits.detach() + noise, nudge)[0]) < float(value.detach())
    other = tabular.tabular_problem(seed)
    other.solve(other.policy, other.reward, 0.0)
    assert (nudge == 0.0) == bool(torch.allclose(other.policy.logits, problem.policy.logits))


def test_other_seeds_of_the_default_problem_agree_too():
    rows = by_name(parl.check_hypergradient(tabular.tabular_problem(3)))
    assert all(rows[name].relative_error < 1e-6 for name in EXACT)


def test_the_printed_table_fits_and_lines_up(default):
    table, _ = default
    text = str(table)
    lines = text.splitlines()
    assert repr(table) == text
    assert max(map(len, lines)) <= 100
    head = next(line for line in lines if line.startswith("estimator"))
    body = lines[lines.index(head) + 2 :][: len(table.rows)]
    ends = [head.index(title) + len(title) for title in ("rel. error", "cosine", "norm ratio", "cost", "seconds")]
    for row, line in zip(table.rows, body, strict=True):
        assert line.startswith(row.name)
        assert line[ends[0] - 7 : ends[0]] == f"{row.relative_error:.1e}"
        assert line[ends[1] - 6 : ends[1]] == f"{row.cosine:.4f}"
        assert line[ends[4] - 5 : ends[4]] == f"{row.seconds:.3f}"
        assert line[ends[4] + 2 :] == row.note
    for name in ("LogProbHessian", "Identity", "SoBiRL", "DirectOnly", "ZeroOrder"):
        assert f"{name} *" in text
    assert "24 policy, 18 reward" in text
    assert "all 18 coordinates" in text and "108 lower" in text


def test_long_names_and_notes_move_below_the_table():
    row = parl.hypergrad.check.CheckRow(
        "a name that would take half of the table's width", 1.0, 0.5, 1e7, 12.4, 0.1, ""
    )
    notes = ["ValueError: " + "words " * 30, "short", "ValueError: " + "words " * 30, "OTHER, " + "words " * 30]
    rows = tuple(dataclasses.replace(row, note=note) for note in notes)
    text = str(parl.CheckTable("title", rows, torch.zeros(1), 0.0))
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("ValueError [1]") == 2 and text.count("OTHER [2]") == 1
    assert text.count("[1] ValueError: words") == 1
    assert "1.0e+07" in text and "  short" in text and "   12  " in text


def test_linear_quadratic_game_against_its_closed_form_and_autograd():
    game = parl.LinearQuadraticGame(seed=2, leader=3, follower=5)
    x = game.upper_params["x"].clone().requires_grad_()
    through = game.upper_loss({"x": x}, game.solve({"x": x}, {}))
    torch.testing.assert_close(game.closed_form(), torch.autograd.grad(through, x)[0])
    table = parl.check_hypergradient(game)
    rows = by_name(table)
    for name in ("closed form", "CG", "MINRES", "NystromPCG", "Neumann", "Dense"):
        assert rows[name].relative_error < 1e-8, name
    assert rows["DirectOnly"].relative_error > 0.1
    torch.testing.assert_close(table.reference, game.closed_form(), rtol=1e-8, atol=1e-10)
    assert "seed 2): 3 upper, 5 lower parameters" in str(table)


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
    assert "gradient norm at most nan" in parl.check_hypergradient(game).title


def test_a_lower_solve_that_stops_short_shows_in_the_header():
    lazy = regression(solve=lambda x, y: {"w": 0.9 * y["w"]})
    table = parl.check_hypergradient(lazy)
    assert float(table.title.split("gradient norm at most ")[1].split()[0]) > 0.01
    assert by_name(table)["CG"].relative_error > 0.1


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
    assert float(table.title.split("gradient norm ")[1].split()[0]) < 1e-12
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


def snapshot(problem):
    tensors = [*problem.policy.parameters(), *problem.policy.buffers(), *problem.reward.parameters()]
    return [t.detach().clone() for t in tensors]


def test_everything_is_left_as_it_was():
    problem = contextual_bandit()
    newton = problem.solve

    def careless(policy, reward, nudge):
        newton(policy, reward, nudge)
        (policy.weight.sum() + reward.weight.sum()).backward()

    problem.solve = careless
    problem.policy.weight.grad = torch.ones_like(problem.policy.weight)
    before, state = snapshot(problem), torch.get_rng_state()
    parl.check_hypergradient(problem)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(problem), strict=True))
    assert torch.equal(problem.policy.weight.grad, torch.ones_like(problem.policy.weight))
    assert problem.reward.weight.grad is None
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("at", [1, 2, 7])
def test_everything_is_left_as_it_was_when_a_solve_raises(at):
    problem = contextual_bandit()
    newton, count = problem.solve, 0

    def failing(policy, reward, nudge):
        nonlocal count
        newton(policy, reward, nudge)
        count += 1
        if count == at:
            raise RuntimeError("the cluster is down")

    problem.solve = failing
    before = snapshot(problem)
    with pytest.raises(RuntimeError, match="the cluster is down"):
        parl.check_hypergradient(problem)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(problem), strict=True))


def test_bilevel_parameters_are_left_as_they_were_by_a_solve_in_place():
    game = parl.LinearQuadraticGame()
    inner = game.solve

    def in_place(x, y):
        y["y"].copy_(inner(x, y)["y"])
        x["x"].zero_()
        return y

    game.solve = in_place
    before = game.upper_params["x"].clone()
    assert by_name(parl.check_hypergradient(game))["CG"].relative_error < 1e-8
    assert torch.equal(game.upper_params["x"], before)
    assert not game.lower_params["y"].any()


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


def lying(operator, rhs, x0=None):
    """Half of the right answer, with every sign of success."""
    solution = parl.CG(1e-10)(operator, rhs, x0)
    return dataclasses.replace(solution, value=0.5 * solution.value, cost=7.0)


class Failing:
    def implicit(self, problem, x0):
        raise ValueError("first line\nsecond line")


def test_wrong_raising_and_warning_rows_are_told_apart():
    fisher = parl.Fisher(0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = parl.check_hypergradient(
            extra={
                "lying": {"curvature": fisher, "solver": lying},
                "failing": {"estimator": Failing()},
                "stopped": {"curvature": fisher, "solver": parl.CG(1e-10, max_iterations=1)},
                "misspelt": {"curvatures": fisher},
            }
        )
    rows = by_name(table)
    assert rows["lying"].relative_error > 0.1
    assert "CONVERGED" in rows["lying"].note and rows["lying"].cost == 7.0
    assert rows["failing"].relative_error is None and rows["failing"].note == "ValueError: first line"
    assert rows["stopped"].relative_error > 1e-3
    assert rows["stopped"].note.startswith("MAX_ITERATIONS") and "raise max_iterations" in rows["stopped"].note
    assert rows["misspelt"].note.startswith("TypeError")
    assert all(rows[name].relative_error < 1e-6 for name in EXACT)
    assert max(map(len, str(table).splitlines())) <= 100
    assert "[1]" in str(table)


def test_a_lying_solver_is_exposed_on_a_bilevel_problem():
    rows = by_name(parl.check_hypergradient(parl.LinearQuadraticGame(), extra={"lying": {"solver": lying}}))
    assert rows["lying"].relative_error > 0.1 and "CONVERGED" in rows["lying"].note
    assert rows["CG"].relative_error < 1e-8


def test_other_warnings_come_through():
    def noisy(operator, rhs, x0=None):
        warnings.warn("look here", RuntimeWarning, stacklevel=1)
        return parl.CG()(operator, rhs, x0)

    with pytest.warns(RuntimeWarning, match="look here"):
        table = parl.check_hypergradient(parl.LinearQuadraticGame(), extra={"noisy": {"solver": noisy}})
    assert "look here" not in by_name(table)["noisy"].note


def test_it_differentiates_in_any_mode():
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            table = parl.check_hypergradient(parl.LinearQuadraticGame())
        assert by_name(table)["CG"].relative_error < 1e-8


def test_finite_differences_know_their_own_error():
    start = torch.tensor([0.3, 1.1, -0.4], dtype=F64)
    expected = torch.cos(start) * torch.exp(torch.sin(start).sum())

    def smooth(x):
        return float(torch.exp(torch.sin(x).sum()))

    for step in (0.2, 0.05, None, 1e-6):
        found = reference.finite_differences(smooth, start, step)
        true = float((found.values - expected).norm() / expected.norm())
        assert true < 2 * found.error + 1e-13, step
    # Truncation is of fourth order; rounding is all that is left for a quartic.
    coarse, fine = (reference.finite_differences(smooth, start, h).values - expected for h in (0.2, 0.1))
    assert float(coarse.norm() / fine.norm()) == pytest.approx(16, rel=0.1)
    quartic = reference.finite_differences(lambda x: float((x**4).sum()), start, 0.5)
    torch.testing.assert_close(quartic.values, 4 * start**3)
    draws = torch.Generator().manual_seed(0)
    noisy = reference.finite_differences(lambda x: smooth(x) + 1e-3 * float(torch.randn((), generator=draws)), start)
    assert noisy.error > 0.1


def test_a_gradient_of_zero_is_no_division_by_zero():
    flat = parl.BilevelProblem(
        upper_loss=lambda up, low: (low["y"] ** 2).sum() + 0.0 * up["x"].sum(),
        lower_loss=lambda up, low: ((low["y"] - 1.0) ** 2).sum() + 0.0 * up["x"].sum(),
        upper_params={"x": torch.ones(2, dtype=F64)},
        lower_params={"y": torch.ones(2, dtype=F64)},
    )
    row = by_name(parl.check_hypergradient(flat))["CG"]
    assert row.relative_error == 0.0 and row.norm_ratio == 0.0 and math.isnan(row.cosine)


def test_dense_is_left_out_where_it_would_take_too_long():
    rows = subject.with_every_solver(lambda **options: None, F64, 5000)
    assert [row.name for row in rows] == ["CG", "MINRES", "NystromPCG", "Neumann", "Dense"]
    assert rows[-1].compute is None and "5000 parameters" in rows[-1].note


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


@pytest.mark.parametrize("module", [bilevel, call, policy], ids=lambda m: m.__name__.rsplit(".", 1)[-1])
def test_the_examples_run(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted and not outcome.failed
