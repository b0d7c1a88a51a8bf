"""check_hypergradient: that its reference is right, that right estimators pass and wrong ones are exposed."""

from __future__ import annotations

import dataclasses
import doctest
import math
import time
import warnings

import pytest
import torch

import parl_core as parl
from parl_core.hypergrad.check import bilevel, call, policy, reference, subject, tabular

F64 = torch.float64
EXACT = [
    "Fisher",
    "Fisher, MINRES",
    "Fisher, NystromPCG",
    "Fisher, Neumann",
    "Fisher, Dense",
    "Fisher, Woodbury",
    "ScoreHessian",
]
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


def test_a_reference_of_zero_is_no_division_by_zero_and_is_told():
    flat = parl.BilevelProblem(
        upper_loss=lambda up, low: (low["y"] - up["x"]).sum(),
        lower_loss=lambda up, low: ((low["y"] - up["x"]) ** 2).sum(),
        upper_params={"x": torch.tensor([0.5, 2.0], dtype=F64)},
        lower_params={"y": torch.zeros(2, dtype=F64)},
        solve=lambda up, low: {"y": up["x"]},
    )
    table = parl.check_hypergradient(flat)
    rows = by_name(table)
    assert rows["Dense"].relative_error == 0.0 and rows["Dense"].norm_ratio == 0.0 and rows["Dense"].cosine is None
    assert rows["DirectOnly"].relative_error == math.inf and rows["DirectOnly"].cosine is None
    text = " ".join(str(table).split())
    assert "they are exactly 0, so that any other gradient has the relative error inf" in text
    assert "nan" not in text
    assert "exactly 0" not in parl.check_hypergradient(parl.LinearQuadraticGame()).title


def test_a_nan_gradient_stays_nan():
    row = call._row(subject.Candidate("mine", lambda: torch.tensor([math.nan, 1.0])), reference_of([1.0, 2.0]))
    assert math.isnan(row.relative_error) and math.isnan(row.cosine) and math.isnan(row.norm_ratio)


def reference_of(values):
    return reference.Reference(torch.tensor(values, dtype=F64), None, 0.0, 0.1, 1)


def test_one_product_is_not_several():
    solution = parl.Dense()(lambda v: v, torch.ones(1, dtype=F64))
    zero = torch.zeros(1, dtype=F64)

    def note(products):
        result = parl.Hypergradient(zero, zero, zero, dataclasses.replace(solution, products=products), [])
        return call._row(subject.Candidate("mine", lambda: result), reference_of([1.0])).note

    assert [note(count) for count in (0, 1, 2)] == [
        f"CONVERGED, {n}" for n in ("0 products", "1 product", "2 products")
    ]


def test_dense_is_left_out_where_it_would_take_too_long():
    rows = subject.with_every_solver(lambda **options: None, F64, 5000)
    assert [row.name for row in rows] == ["CG", "MINRES", "NystromPCG", "Neumann", "Dense"]
    assert rows[-1].compute is None and "5000 parameters" in rows[-1].note


@pytest.mark.parametrize("module", [bilevel, call, policy], ids=lambda m: m.__name__.rsplit(".", 1)[-1])
def test_the_examples_run(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted and not outcome.failed
