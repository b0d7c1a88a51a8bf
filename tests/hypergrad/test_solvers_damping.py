"""The automatic damping: the rule as it is written, on known spectra, and what it makes solvable."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

import parl_core as parl
from parl_core.hypergrad.solvers import check_damping, solve_with_automatic_damping
from tests.hypergrad.systems import F64, Counted, CountedBlocks, krylov_basis, symmetric


def rule(ritz):
    return 1e-3 * float(ritz.abs().max()) + 2.0 * max(0.0, -float(ritz.min()))


@pytest.mark.parametrize("products", [1, 3, 10])
@pytest.mark.parametrize("lowest", [0.5, 0.0, -2.0, -60.0])
def test_it_follows_the_rule_on_the_ritz_values_of_the_krylov_space(lowest, products):
    matrix, rhs = symmetric(torch.linspace(lowest, 50.0, 40, dtype=F64))
    basis = krylov_basis(matrix, rhs, products)
    ritz = torch.linalg.eigvalsh(basis.T @ matrix @ basis)
    operator = Counted(matrix)
    damping = parl.automatic_damping(operator, rhs, products=products)
    assert damping == pytest.approx(rule(ritz), rel=1e-9)
    assert operator.products == products


@pytest.mark.parametrize("size", [1, 2, 6])
def test_with_fewer_parameters_than_products_the_spectrum_itself_decides(size):
    spectrum = torch.linspace(-3.0, 4.0, size, dtype=F64)
    matrix, rhs = symmetric(spectrum)
    operator = Counted(matrix)
    assert parl.automatic_damping(operator, rhs) == pytest.approx(rule(spectrum), rel=1e-9)
    assert operator.products == size


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_an_invariant_subspace_ends_it(dtype):
    """Three distinct eigenvalues: the fourth direction would be rounding alone."""
    spectrum = torch.tensor([-1.0, 2.0, 5.0]).repeat(20)
    matrix, rhs = symmetric(spectrum, dtype=dtype)
    operator = Counted(matrix)
    assert parl.automatic_damping(operator, rhs) == pytest.approx(2.005, rel=1e-4)
    assert operator.products == 3


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("scale", [1e-8, 1e-3, 3.0, 1e6])
def test_it_scales_with_the_operator_and_not_with_the_right_hand_side(scale, dtype):
    for seed in range(5):
        matrix, rhs = symmetric(torch.linspace(-1.0, 10.0, 30, dtype=F64), seed=seed, dtype=dtype)
        damping = parl.automatic_damping(Counted(matrix), rhs)
        rel = 1e-9 if dtype is F64 else 1e-3
        assert parl.automatic_damping(Counted(scale * matrix), rhs) == pytest.approx(scale * damping, rel=rel)
        assert parl.automatic_damping(Counted(matrix), scale * rhs) == pytest.approx(damping, rel=rel)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("spectrum", ["definite", "singular", "a few negative", "as many negative"])
def test_it_makes_the_system_one_for_cg(spectrum, dtype):
    values = {
        "definite": torch.logspace(-6, 1, 60),
        "singular": torch.cat([torch.zeros(30), torch.linspace(0, 4, 30)]),
        "a few negative": torch.cat([-torch.linspace(0.2, 2, 5), torch.linspace(0.1, 10, 55)]),
        "as many negative": torch.linspace(-7.0, 6.0, 60),
    }[spectrum]
    for seed in range(20):
        matrix, rhs = symmetric(values.to(F64), seed=seed, dtype=dtype)
        damping = parl.automatic_damping(Counted(matrix), rhs)
        solution = parl.CG(rtol=1e-4)(parl.Damped(Counted(matrix), damping), rhs)
        assert solution.status is parl.Status.CONVERGED
        assert not solution.negative_curvature
        assert solution.damping == damping > 0


def test_more_products_find_what_ten_may_miss_and_the_solve_reports_it():
    """One eigenvalue of −1 beside many near 0: Lanczos gets there late."""
    values = torch.cat([-torch.logspace(-2, 0, 5), torch.logspace(-3, 1, 55)]).to(F64)
    missed = 0
    for seed in range(50):
        matrix, rhs = symmetric(values, seed=seed)
        few, more = (parl.automatic_damping(Counted(matrix), rhs, products=products) for products in (10, 20))
        assert more > 1.99
        missed += few < 1.0
        solution = parl.CG(rtol=1e-4)(parl.Damped(Counted(matrix), few), rhs)
        assert solution.negative_curvature == (few < 1.0)
    assert 1 <= missed <= 5


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_the_negative_curvature_that_the_damping_lifts_is_reported(dtype):
    """Ritz values lie inside the spectrum: of a semi-definite operator only rounding can make one negative."""
    for seed in range(10):
        for lowest in (-1.0, -0.2):
            matrix, rhs = symmetric(torch.linspace(lowest, 1.0, 60, dtype=F64), seed=seed, dtype=dtype)
            damped, solution = solve_with_automatic_damping(parl.CG(rtol=1e-4), Counted(matrix), rhs, None)
            assert damped.damping > -lowest  # so that the shifted system is positive definite
            assert not parl.CG(rtol=1e-4)(damped, rhs).negative_curvature
            assert solution.negative_curvature
        for values in (
            torch.cat([torch.zeros(55), torch.logspace(-2, 0, 5)]),
            torch.cat([torch.zeros(3), torch.ones(3)]),
            torch.logspace(-12, 0, 60),
            torch.logspace(-7, 3, 8),
        ):
            matrix, rhs = symmetric(values.to(F64), seed=seed, dtype=dtype)
            solution = solve_with_automatic_damping(parl.CG(rtol=1e-4), Counted(matrix), rhs, None)[1]
            assert not solution.negative_curvature


def test_what_choosing_the_damping_took_is_counted():
    matrix, rhs = symmetric(torch.linspace(1, 20, 40, dtype=F64))
    operator = Counted(matrix)
    damped, solution = solve_with_automatic_damping(parl.CG(), operator, rhs, None)
    assert solution.products == operator.products == 10 + parl.CG()(damped, rhs).products
    assert solution.cost is None
    operator.cost = 3.0
    assert solve_with_automatic_damping(parl.CG(), operator, rhs, None)[1].cost == 3.0 * solution.products
    few = Counted(torch.diag(torch.tensor([1.0, 2.0], dtype=F64)))
    assert solve_with_automatic_damping(parl.CG(), few, rhs[:2], None)[1].products == few.products


def test_where_nothing_sets_a_scale_it_is_one():
    matrix, rhs = symmetric(torch.linspace(1, 2, 5, dtype=F64))
    zero = Counted(torch.zeros_like(matrix))
    assert parl.automatic_damping(zero, rhs) == 1.0
    solution = parl.CG()(parl.Damped(zero, 1.0), rhs)
    assert solution.status is parl.Status.CONVERGED
    torch.testing.assert_close(solution.value, rhs)
    operator = Counted(matrix)
    assert parl.automatic_damping(operator, torch.zeros_like(rhs)) == 1.0
    assert operator.products == 0
    assert parl.automatic_damping(operator, torch.zeros(0, dtype=F64)) == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_left_to_the_solve_to_name(bad):
    matrix, rhs = symmetric(torch.linspace(1, 2, 20, dtype=F64))
    for at in (1, 4, 10):
        operator = Counted(matrix)

        def broken(v, operator=operator, at=at):
            return operator(v) * (bad if operator.products >= at else 1.0)

        damping = parl.automatic_damping(broken, rhs)
        assert damping == 0.0
        assert parl.CG()(parl.Damped(broken, damping), rhs).status is parl.Status.NON_FINITE_OPERATOR
    rhs[3] = bad
    damping = parl.automatic_damping(Counted(matrix), rhs)
    assert damping == 0.0
    assert parl.CG()(parl.Damped(Counted(matrix), damping), rhs).status is parl.Status.NON_FINITE_RHS


@pytest.mark.parametrize(
    "solver",
    [parl.CG(1e-10), parl.MINRES(1e-10), parl.Neumann(rtol=1e-10, max_iterations=5000), parl.NystromPCG(rtol=1e-10),
     parl.Woodbury(1e-10), parl.Dense()],
    ids=lambda solver: type(solver).__name__,
)  # fmt: skip
@pytest.mark.parametrize("own", [0.0, 0.25])
def test_damped_serves_every_solver_and_adds_up(solver, own):
    matrix, first = symmetric(torch.cat([torch.zeros(10), torch.linspace(1, 5, 10)]).to(F64))
    inner = CountedBlocks(matrix, damping=own)
    inner.cost = 3.0
    operator = parl.Damped(inner, 0.5)
    rhs = torch.stack([first, first.flip(0)])
    solution = solver(operator, rhs)
    exact = torch.linalg.solve(matrix + (own + 0.5) * torch.eye(20, dtype=F64), rhs.T).T
    assert solution.status is parl.Status.CONVERGED
    torch.testing.assert_close(solution.value, exact, rtol=1e-7, atol=1e-8)
    assert solution.damping == operator.damping == own + 0.5
    assert solution.cost == pytest.approx(3.0 * solution.products)
    assert isinstance(solver, parl.Dense) or any(len(shape) == 2 for shape in inner.shapes)


def test_damped_offers_no_more_than_what_it_wraps():
    plain = parl.Damped(lambda v: v, 0.5)
    assert not hasattr(plain, "block") and not hasattr(plain, "outer_products")
    assert plain.cost is None
    assert hasattr(parl.Damped(Counted(torch.eye(2)), 0.5), "outer_products")
    torch.testing.assert_close(plain(torch.ones(2)), torch.full((2,), 1.5))
    for damping in (-1.0, float("nan"), float("inf"), True, "0.1"):
        with pytest.raises(ValueError, match=f"damping must be finite.* a number and not a bool, got {damping}"):
            parl.Damped(lambda v: v, damping)
    for damping in (True, False, -1, None):
        with pytest.raises(ValueError, match=f"damping must be finite.* a number and not a bool, got {damping}"):
            check_damping(damping)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="products"):
        parl.automatic_damping(lambda v: v, torch.ones(3), products=0)
    with pytest.raises(ValueError, match="rhs"):
        parl.automatic_damping(lambda v: v, torch.ones(2, 3))


@pytest.mark.parametrize("name", ["cg", "minres", "neumann", "woodbury", "damping"])
def test_the_examples_in_the_docstrings_are_true(name):
    module = importlib.import_module(f"parl_core.hypergrad.solvers.{name}")
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
