"""Several right-hand sides at once: each row is solved as if it were alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import parl_core as parl
from parl_core.hypergrad.solvers import cg, drive, minres, neumann, system
from parl_core.hypergrad.solvers.system import worst
from tests.hypergrad.systems import F64, Counted, CountedBlocks, solved_unseen, spd, symmetric
from tests.hypergrad.test_solvers import DIRECT, ITERATIVE, OPERATORS, SOLVERS, TOLERANCES

LIMITS = {name: 20 if name == "Neumann" else 200 for name in SOLVERS}  # 300 terms for Neumann


def right_hand_sides(matrix, seed=0):
    """(4, P): generic, an eigenvector (one Krylov step), zero, and generic of another size."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.eigh(matrix.to(F64))[1]
    first, last = torch.randn(2, matrix.shape[0], generator=generator, dtype=F64)
    return torch.stack([first, vectors[:, -1], torch.zeros_like(first), 1e6 * last]).to(matrix.dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float64", "float32"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("operator_of", [Counted, CountedBlocks], ids=["row by row", "block"])
@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_row_is_that_of_its_own_solve(name, kind, operator_of, warm, dtype):
    matrix, _ = symmetric(OPERATORS[kind], dtype=dtype)
    rhs = right_hand_sides(matrix)
    if kind == "singular":  # consistent, so that rounding does not decide between two ends
        rhs = rhs @ matrix
    x0 = 0.1 * rhs if warm else None
    rtol = TOLERANCES[dtype]
    operator = operator_of(matrix)
    solution = SOLVERS[name](rtol, LIMITS[name])(operator, rhs, x0)
    singles = [
        SOLVERS[name](rtol, LIMITS[name])(Counted(matrix), row, None if x0 is None else x0[k])
        for k, row in enumerate(rhs)
    ]

    assert solution.value.shape == rhs.shape
    assert solution.status is worst([single.status for single in singles])
    assert solution.negative_curvature == any(single.negative_curvature for single in singles)
    assert solution.residuals.shape == (solution.iterations + 1, 4)
    assert solution.products == operator.products
    if kind == "well conditioned":  # elsewhere rounding moves the count
        assert solution.iterations == pytest.approx(max(single.iterations for single in singles), abs=1)
    inverse = torch.linalg.pinv(matrix.to(F64), rtol=1e-6, hermitian=True)
    for k, single in enumerate(singles):
        if single.status is parl.Status.CONVERGED:
            # Both are within rtol of the right-hand side; beyond that rounding may part them.
            tolerance = 3 * rtol * float(rhs[k].norm()) * float(torch.linalg.matrix_norm(inverse, 2))
            assert float((solution.value[k] - single.value).norm()) <= tolerance
            assert float(solution.residuals[-1, k]) <= rtol
        else:
            assert float(solution.residuals[-1, k]) > rtol


def _dots_one_by_one(left, right):
    if left.dim() == 1:
        return left.dot(right)
    return torch.stack([x.dot(y) for x, y in zip(left, right, strict=True)])[:, None]


def _norms_one_by_one(vectors):
    if vectors.dim() == 1:
        return torch.linalg.vector_norm(vectors)
    return torch.stack([torch.linalg.vector_norm(row) for row in vectors])[:, None]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float64", "float32"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize(("name", "module"), [("CG", cg), ("MINRES", minres), ("Neumann", neumann)])
def test_every_row_is_that_of_its_own_solve_bit_by_bit(name, module, kind, warm, dtype, monkeypatch):
    """Where dot products and norms round alike, nothing else may differ: restarts, stagnation and breakdown included."""
    matrix, _ = symmetric(OPERATORS[kind], dtype=dtype)
    rhs = right_hand_sides(matrix)
    x0 = 0.1 * rhs if warm else None
    monkeypatch.setattr(module, "dots", _dots_one_by_one)
    for place in (module, drive, system):
        monkeypatch.setattr(place, "norms", _norms_one_by_one)
    for rtol in (TOLERANCES[dtype], 1e-3 * TOLERANCES[dtype]):  # the second is out of reach for many
        solver = SOLVERS[name](rtol, LIMITS[name])
        singles = [solver(Counted(matrix), row, None if x0 is None else x0[k]) for k, row in enumerate(rhs)]
        solution = solver(Counted(matrix), rhs, x0)
        assert solution.status is worst([single.status for single in singles])
        assert solution.iterations == max(single.iterations for single in singles)
        assert solution.negative_curvature == any(single.negative_curvature for single in singles)
        for k, single in enumerate(singles):
            assert torch.equal(solution.value[k], single.value)
            assert torch.equal(solution.residuals[: single.iterations + 1, k], single.residuals)
            assert (solution.residuals[single.iterations :, k] == single.residuals[-1]).all()


@pytest.mark.parametrize("operator_of", [Counted, CountedBlocks], ids=["row by row", "block"])
@pytest.mark.parametrize("name", ["CG", "MINRES", "Neumann"])
def test_a_row_costs_what_it_costs_alone(name, operator_of):
    matrix, _ = spd(20, 5.0)
    rhs = right_hand_sides(matrix)
    solver = parl.Neumann(0.2, rtol=1e-8) if name == "Neumann" else SOLVERS[name](1e-8, 200)
    singles = [solver(Counted(matrix), row) for row in rhs]
    assert len({single.iterations for single in singles}) >= 3
    operator = operator_of(matrix)
    solution = solver(operator, rhs)
    assert solution.products == operator.products == sum(single.products for single in singles)
    if operator_of is CountedBlocks:
        assert set(operator.shapes) >= {(3, 20), (2, 20)}  # the row of zero is over at once, then the eigenvector


def test_a_single_vector_is_never_a_block():
    matrix, rhs = spd()
    for single in (rhs, rhs[None]):
        operator = CountedBlocks(matrix)
        solution = parl.CG()(operator, single)
        assert set(operator.shapes) == {(20,)}
        assert solution.value.shape == single.shape
        assert solution.residuals.shape == (solution.iterations + 1, *single.shape[:-1])


@pytest.mark.parametrize("name", ITERATIVE)
def test_a_row_that_is_done_does_not_move(name):
    matrix, _ = spd(20, 30.0)
    rhs = right_hand_sides(matrix)[:2]
    iterations = SOLVERS[name](1e-6, 2000)(Counted(matrix), rhs[1]).iterations
    short = SOLVERS[name](1e-6, iterations + 1)(Counted(matrix), rhs)
    long = SOLVERS[name](1e-6, 2000)(Counted(matrix), rhs)
    assert long.iterations > short.iterations > iterations
    assert torch.equal(long.value[1], short.value[1])
    assert not torch.equal(long.value[0], short.value[0])
    assert (long.residuals[iterations:, 1] == long.residuals[-1, 1]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("operator_of", [Counted, CountedBlocks], ids=["row by row", "block"])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_nan_in_one_row_leaves_the_others_right(name, operator_of, bad):
    matrix, first = spd(20, 10.0)
    rhs = torch.stack([first, first.flip(0), first.roll(3)])
    exact = torch.linalg.solve(matrix, rhs.T).T
    rhs[1, 4] = bad
    solution = SOLVERS[name](1e-9, 1000)(operator_of(matrix), rhs)
    assert solution.status is parl.Status.NON_FINITE_RHS
    assert solution.value[1].isnan().all()
    assert solution.residuals[-1, 1].isnan()
    torch.testing.assert_close(solution.value[[0, 2]], exact[[0, 2]], rtol=1e-7, atol=1e-7)
    assert (solution.residuals[-1, [0, 2]] <= 1e-9).all()


@pytest.mark.parametrize("name", ITERATIVE)
def test_a_nan_in_one_start_leaves_the_others_right(name):
    matrix, first = spd(20, 10.0)
    rhs = torch.stack([first, first.flip(0)])
    x0 = torch.zeros_like(rhs)
    x0[0, 0] = float("nan")
    solution = SOLVERS[name](1e-9, 1000)(Counted(matrix), rhs, x0)
    assert solution.status is parl.Status.NON_FINITE_START
    assert solution.value[0].isnan().all()
    torch.testing.assert_close(solution.value[1], torch.linalg.solve(matrix, rhs[1]), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ["well conditioned", "indefinite"])
@pytest.mark.parametrize("name", ITERATIVE)
def test_away_from_the_cpu_a_block_waits_only_at_the_end(name, kind, monkeypatch):
    matrix, _ = symmetric(OPERATORS[kind])
    rhs = right_hand_sides(matrix)
    for limit in (60, 160):
        monkeypatch.setattr(drive, "reads_are_free", lambda device: True)
        on_cpu = SOLVERS[name](1e-9, limit)(Counted(matrix), rhs)
        monkeypatch.setattr(drive, "reads_are_free", lambda device: False)
        elsewhere = solved_unseen(SOLVERS[name](1e-9, limit), Counted(matrix), rhs)
        assert (elsewhere.status, elsewhere.iterations) == (on_cpu.status, on_cpu.iterations)
        torch.testing.assert_close(elsewhere.value, on_cpu.value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(elsewhere.residuals, on_cpu.residuals, rtol=1e-6, atol=1e-12)


def test_a_row_that_claims_too_much_is_checked_while_the_others_go_on():
    """The second row's first product is off by a factor: its recurrence claims a solution that the check refuses."""
    matrix = torch.diag(torch.linspace(1, 50, 20, dtype=F64))
    hard = torch.ones(20, dtype=F64)
    easy = torch.zeros(20, dtype=F64)
    easy[0] = 1.0
    operator = Counted(matrix)
    glitched = parl.CG(rtol=1e-8)(
        lambda v: operator(v) * (2.0 if operator.products == 2 else 1.0), torch.stack([hard, easy])
    )
    clean = parl.CG(rtol=1e-8)(Counted(matrix), hard)
    assert glitched.status is parl.Status.CONVERGED
    torch.testing.assert_close(glitched.value[1], easy, rtol=0, atol=1e-8)
    torch.testing.assert_close(glitched.value[0], clean.value, rtol=1e-9, atol=1e-12)
    assert glitched.iterations == clean.iterations
    assert glitched.products == clean.products + 4  # for the second row: a step, a check that fails, and both again


def test_minres_lifts_only_the_rows_that_have_no_solution():
    values = torch.cat([torch.zeros(4), torch.linspace(1, 10, 16)])
    matrix, generic = symmetric(values)
    rhs = torch.stack([matrix @ generic, generic, generic.flip(0)])
    solution = parl.MINRES(rtol=1e-8)(Counted(matrix), rhs)
    exact = rhs @ torch.linalg.pinv(matrix, rtol=1e-6, hermitian=True)
    assert solution.status is parl.Status.INCONSISTENT
    torch.testing.assert_close(solution.value, exact, rtol=0, atol=1e-6)
    assert float(solution.residuals[-1, 0]) <= 1e-8 < 0.1 < float(solution.residuals[-1, 1:].min())


def test_the_worst_status_is_told():
    order = list(parl.Status)
    assert order[0] is parl.Status.CONVERGED
    assert order[-3:] == [parl.Status.NON_FINITE_RHS, parl.Status.NON_FINITE_START, parl.Status.NON_FINITE_OPERATOR]
    assert worst([]) is parl.Status.CONVERGED
    for k, status in enumerate(order):
        assert worst([parl.Status.CONVERGED, status, order[k // 2]]) is status


@pytest.mark.parametrize("name", SOLVERS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    number=st.integers(0, 5),
    size=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    exponents=st.lists(st.integers(-30, 30), min_size=5, max_size=5),
)
def test_rows_may_be_permuted_and_scaled(name, number, size, seed, exponents):
    """Powers of two and the order of the rows change nothing but themselves: for these the arithmetic is exact."""
    generator = torch.Generator().manual_seed(seed)
    matrix, _ = symmetric(torch.logspace(0, 1, size, dtype=F64), seed=seed)
    rhs = torch.randn(number, size, generator=generator, dtype=F64)
    order = torch.randperm(number, generator=generator)
    scales = torch.tensor([2.0**e for e in exponents[:number]], dtype=F64)[:, None]
    solver = SOLVERS[name](1e-8, 200)
    first = solver(Counted(matrix), rhs)
    second = SOLVERS[name](1e-8, 200)(Counted(matrix), (scales * rhs)[order])
    assert first.status is second.status is parl.Status.CONVERGED
    # Row by row products are the same numbers; a matrix product of rows may round by place.
    exact = name not in (*DIRECT, "NystromPCG") and number > 1
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(second.value / scales[order], first.value[order], **tolerance)
    torch.testing.assert_close(second.residuals, first.residuals[:, order], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solution_beyond_the_range_of_the_dtype_is_named(name):
    matrix = torch.diag(torch.tensor([0.1, 1.0, 2.0]))
    rhs = torch.tensor([[1e38, 0.0, 1.0], [1.0, 2.0, 4.0]])
    solver = SOLVERS[name](1e-5, 20)
    solution = solver(Counted(matrix), rhs[0])
    assert solution.status is parl.Status.OVERFLOW
    assert not solution.status.ok
    assert solution.value.isnan().all()
    assert "float64" in solution.status.message
    both = SOLVERS[name](1e-5, 20)(Counted(matrix), rhs)
    assert both.status is parl.Status.OVERFLOW
    assert both.value[0].isnan().all()
    torch.testing.assert_close(both.value[1], torch.tensor([10.0, 2.0, 2.0]), rtol=1e-3, atol=1e-3)
    wide = SOLVERS[name](1e-5, 20)(Counted(matrix.double()), rhs.double())
    assert wide.status is parl.Status.CONVERGED


@pytest.mark.parametrize("name", SOLVERS)
def test_the_cost_is_told_in_gradients_if_the_operator_tells_its_own(name):
    matrix, rhs = spd()
    operator = CountedBlocks(matrix)
    assert SOLVERS[name](1e-8, 200)(operator, rhs).cost is None
    operator.cost = 2.5
    solution = SOLVERS[name](1e-8, 200)(operator, torch.stack([rhs, 2 * rhs]))
    assert solution.products > 0
    assert math.isclose(solution.cost, 2.5 * solution.products)


def test_a_block_product_of_the_wrong_shape_is_named():
    operator = CountedBlocks(torch.eye(3))
    operator.block = lambda vectors: vectors[:1]
    with pytest.raises(ValueError, match=r"operator\.block"):
        parl.CG()(operator, torch.ones(2, 3))
    with pytest.raises(ValueError, match="x0"):
        parl.CG()(Counted(torch.eye(3)), torch.ones(2, 3), torch.ones(3))
