"""PCG on operators that tell an approximate inverse: when it is asked for, kept and made anew."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import parl_core as parl
from parl_core.hypergrad.solvers import Preconditioner
from tests.hypergrad.systems import F64, Counted, spd, symmetric

COST = 3.0


class Knowing(Counted):
    """Knows the diagonal of A, and counts how often it was asked."""

    cost = 1.0

    def __init__(self, matrix, damping=0.0):
        super().__init__(matrix, damping)
        self.asked = 0

    def preconditioner(self, extra=0.0):
        self.asked += 1
        diagonal = self.matrix.diagonal() + self.damping + extra
        return Preconditioner(lambda residual: residual / diagonal, cost=COST)


def scaled(condition=1e4, seed=0, dtype=F64):
    """A system that its diagonal all but solves."""
    matrix, rhs = spd(40, condition=2.0, seed=seed)
    root = torch.logspace(0, torch.tensor(condition).log10().item() / 2, 40, dtype=F64)
    return (root[:, None] * matrix * root).to(dtype), rhs.to(dtype)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_it_is_used_and_its_cost_counts(dtype):
    matrix, rhs = scaled(dtype=dtype)
    operator = Knowing(matrix)
    rtol = 1e-8 if dtype == F64 else 1e-4
    plain, found = parl.CG(rtol=rtol)(operator, rhs), parl.PCG(rtol=rtol)(operator, rhs)
    assert found.status is parl.Status.CONVERGED
    assert found.iterations < plain.iterations / 2
    assert found.products == found.iterations + 1
    assert found.cost == found.products + COST
    assert float((rhs - matrix @ found.value).norm()) <= rtol * float(rhs.norm())


def test_without_one_it_is_cg():
    matrix, rhs = scaled()
    plain, found = parl.CG()(Counted(matrix), rhs), parl.PCG()(Counted(matrix), rhs)
    assert torch.equal(found.value, plain.value)
    assert torch.equal(found.residuals, plain.residuals)
    assert found.products == plain.products


def test_one_is_kept_for_operators_that_change():
    matrix, rhs = scaled()
    first, second = Knowing(matrix), Knowing(1.01 * matrix)
    solver = parl.PCG(rtol=1e-8)
    solver(first, rhs)
    again = solver(second, rhs)
    assert (first.asked, second.asked) == (1, 0)
    assert again.cost == again.products
    solver.reset()
    solver(second, rhs)
    assert second.asked == 1


def test_a_stale_one_is_made_anew_after_the_solve_that_shows_it():
    matrix, rhs = scaled()
    other = Knowing(matrix.flip(0, 1).contiguous())
    solver = parl.PCG(rtol=1e-8, max_iterations=2000)
    fresh = solver(Knowing(matrix), rhs)
    slow = solver(other, rhs)
    assert slow.status is parl.Status.CONVERGED
    assert slow.iterations > 1.5 * fresh.iterations
    assert other.asked == 0
    quick = solver(other, rhs)
    assert other.asked == 1
    assert quick.iterations <= fresh.iterations + 1


@pytest.mark.parametrize(("size", "dtype"), [(30, F64), (40, torch.float32)], ids=["size", "dtype"])
def test_another_size_or_dtype_makes_its_own(size, dtype):
    solver = parl.PCG()
    solver(Knowing(scaled()[0]), scaled()[1])
    matrix, rhs = symmetric(torch.linspace(1, 10, size), dtype=dtype)
    other = Knowing(matrix)
    assert solver(other, rhs).status is parl.Status.CONVERGED
    assert other.asked == 1


def test_a_first_solve_that_did_not_converge_keeps_nothing():
    matrix, rhs = scaled()
    operator = Knowing(matrix)
    solver = parl.PCG(rtol=1e-8, max_iterations=3)
    assert solver(operator, rhs).status is parl.Status.MAX_ITERATIONS
    solver(operator, rhs)
    assert operator.asked == 2


def test_a_solve_that_did_not_converge_forgets_the_one_that_was_kept():
    """Within the limit of 1.5 times the iterations, so that their number alone would not show it."""
    matrix, rhs = scaled()
    fresh = parl.PCG(rtol=1e-8)(Knowing(matrix), rhs).iterations
    solver = parl.PCG(rtol=1e-8, max_iterations=fresh + 1)
    solver(Knowing(matrix), rhs)
    other = Knowing(matrix.flip(0, 1).contiguous())
    assert solver(other, rhs).status is parl.Status.MAX_ITERATIONS
    assert solver(other, rhs).status is parl.Status.CONVERGED
    assert other.asked == 1


@pytest.mark.parametrize(("damping", "asked"), [(0.6, 0), (1.9, 0), (0.0, 1), (0.4, 1), (2.1, 1), (1e3, 1)])
def test_a_damping_of_another_size_makes_its_own(damping, asked):
    matrix, rhs = scaled()
    solver = parl.PCG()
    solver(Knowing(matrix, 1.0), rhs)
    other = Knowing(matrix, damping)
    solver(other, rhs)
    assert other.asked == asked


def test_copies_and_hashes():
    """A used solver travels by pickle without the functions that it keeps; a shallow copy shares them."""
    matrix, rhs = scaled()
    operator, solver = Knowing(matrix), parl.PCG(rtol=1e-8, max_iterations=50)
    solver(operator, rhs)
    for travelled in (pickle.loads(pickle.dumps(solver)), copy.deepcopy(solver)):
        assert travelled == solver
        assert hash(travelled) == hash(solver)
        travelled(operator, rhs)
    assert operator.asked == 3
    copy.copy(solver)(operator, rhs)
    solver(operator, rhs)
    assert operator.asked == 3
    assert len({solver, parl.PCG(rtol=1e-8, max_iterations=50), parl.PCG()}) == 2


def test_what_a_nan_made_is_not_kept():
    matrix, rhs = scaled()
    solver = parl.PCG(rtol=1e-8)
    assert solver(Knowing(matrix * float("nan")), rhs).status is parl.Status.NON_FINITE_OPERATOR
    operator = Knowing(matrix)
    assert solver(operator, rhs).status is parl.Status.CONVERGED
    assert operator.asked == 1
    assert solver(operator, rhs * float("nan")).status is parl.Status.NON_FINITE_RHS
    assert solver(operator, rhs).status is parl.Status.CONVERGED


def test_a_start_that_is_the_solution_keeps_nothing():
    matrix, rhs = scaled()
    solver, operator = parl.PCG(rtol=1e-6), Knowing(matrix)
    solved = solver(operator, rhs, torch.linalg.solve(matrix, rhs))
    assert (solved.iterations, solved.products) == (0, 1)
    solver(operator, rhs)
    assert operator.asked == 2


def test_negative_curvature_is_told():
    values = torch.linspace(1, 10, 20, dtype=F64)
    values[3] = -4.0
    operator = Knowing(torch.diag(values))
    operator.preconditioner = lambda extra=0.0: Preconditioner(lambda residual: residual / values.abs(), cost=0.0)
    assert parl.PCG()(operator, torch.ones(20, dtype=F64)).negative_curvature


def test_the_damping_chosen_by_itself_reaches_it():
    matrix, rhs = scaled()
    damped = parl.Damped(Knowing(matrix), 7.0)
    expected = rhs / (matrix.diagonal() + 7.0)
    torch.testing.assert_close(damped.preconditioner().apply(rhs), expected)


@pytest.mark.parametrize(("field", "value"), [("rtol", 0.0), ("max_iterations", 0)])
def test_limits_are_checked(field, value):
    with pytest.raises(ValueError, match=field):
        parl.PCG(**{field: value})
