"""The Nyström preconditioner: what it saves, and that an old sketch costs time only."""

from __future__ import annotations

import pytest
import torch

import parl_core as parl
from tests.hypergrad.systems import F64, Counted, symmetric

DAMPING = 1e-2
SPECTRUM = torch.cat([torch.logspace(0, 3, 12, dtype=F64), torch.logspace(-5, -3, 288, dtype=F64)])


def damped_solution(matrix, rhs, damping=DAMPING):
    return torch.linalg.solve(matrix + damping * torch.eye(len(rhs), dtype=rhs.dtype), rhs)


def test_it_needs_far_fewer_iterations_than_cg():
    matrix, rhs = symmetric(SPECTRUM)
    operator = Counted(matrix, DAMPING)
    plain = parl.CG(rtol=1e-8, max_iterations=1000)(operator, rhs)
    before = operator.products
    solution = parl.NystromPCG(rank=20, rtol=1e-8)(operator, rhs)
    assert plain.status is solution.status is parl.Status.CONVERGED
    assert plain.iterations > 35
    assert solution.iterations <= 8
    assert solution.products == operator.products - before == 20 + solution.iterations + 1
    torch.testing.assert_close(solution.value, damped_solution(matrix, rhs), rtol=1e-6, atol=1e-6)


def test_a_full_sketch_without_damping_solves_in_a_step_or_two():
    matrix, rhs = symmetric(torch.logspace(0, 3, 30, dtype=F64))
    solution = parl.NystromPCG(rank=50, rtol=1e-8)(lambda v: matrix @ v, rhs)
    assert solution.iterations <= 2
    assert solution.products == 30 + solution.iterations + 1
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, rhs), rtol=1e-6, atol=1e-9)


def test_a_kept_sketch_solves_the_operator_that_has_moved():
    matrix, rhs = symmetric(SPECTRUM)
    solver = parl.NystromPCG(rank=20, rtol=1e-8)
    first = solver(Counted(matrix, DAMPING), rhs)
    noise, _ = symmetric(torch.linspace(0, 1e-3, 300, dtype=F64), seed=1)
    moved = Counted(1.1 * matrix + noise, 2 * DAMPING)  # the damping may move as well
    second = solver(moved, rhs)
    assert second.status is parl.Status.CONVERGED
    assert second.products == moved.products == second.iterations + 1  # no new sketch
    assert second.iterations <= first.iterations + 5
    torch.testing.assert_close(second.value, damped_solution(moved.matrix, rhs, moved.damping), rtol=1e-6, atol=1e-6)


def test_a_sketch_of_quite_another_operator_only_costs_iterations():
    matrix, rhs = symmetric(SPECTRUM, seed=0)
    other, _ = symmetric(SPECTRUM, seed=5)
    solver = parl.NystromPCG(rank=20, rtol=1e-8, max_iterations=2000)
    fresh = solver(Counted(matrix, DAMPING), rhs)
    stale = solver(Counted(other, DAMPING), rhs)
    assert stale.status is parl.Status.CONVERGED
    torch.testing.assert_close(stale.value, damped_solution(other, rhs), rtol=1e-5, atol=1e-5)
    assert stale.iterations > 5 * fresh.iterations
    solver.reset()
    again = solver(Counted(other, DAMPING), rhs)
    assert again.iterations <= 8
    assert again.products == 20 + again.iterations + 1


def test_another_size_or_dtype_makes_a_new_sketch():
    solver = parl.NystromPCG(rank=5)
    for size, dtype in [(30, F64), (30, torch.float32), (20, torch.float32)]:
        matrix, rhs = symmetric(torch.linspace(1, 10, size), dtype=dtype)
        solution = solver(Counted(matrix, 0.1), rhs)
        assert solution.status is parl.Status.CONVERGED
        assert solution.products == 5 + solution.iterations + 1


def test_a_sketch_of_nans_is_not_kept():
    matrix, rhs = symmetric(SPECTRUM)
    solver = parl.NystromPCG(rank=20, rtol=1e-8)
    failed = solver(lambda v: v * float("nan"), rhs)
    assert failed.status is parl.Status.NON_FINITE_OPERATOR
    recovered = solver(Counted(matrix, DAMPING), rhs)
    assert recovered.status is parl.Status.CONVERGED
    assert recovered.iterations <= 8


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_rank_beyond_the_rank_of_the_operator(dtype):
    values = torch.zeros(60, dtype=F64)
    values[:5] = torch.linspace(1, 10, 5)
    matrix, rhs = symmetric(values, dtype=dtype)
    solution = parl.NystromPCG(rank=20)(Counted(matrix, 0.1), rhs)
    assert solution.status is parl.Status.CONVERGED
    assert solution.iterations <= 4
    torch.testing.assert_close(solution.value, damped_solution(matrix, rhs, 0.1), rtol=1e-3, atol=1e-4)
    assert not solution.negative_curvature


def test_negative_curvature_seen_by_the_sketch_alone_is_reported():
    """A right-hand side without a component along the negative direction: CG never meets it, the sketch does."""
    values = torch.linspace(1, 10, 20, dtype=F64)
    values[0] = -100.0
    matrix = torch.diag(values)
    rhs = torch.ones(20, dtype=F64)
    rhs[0] = 0.0
    assert not parl.CG()(Counted(matrix), rhs).negative_curvature
    assert parl.NystromPCG(rank=10)(Counted(matrix), rhs).negative_curvature
    assert parl.NystromPCG(rank=10)(Counted(matrix), torch.zeros_like(rhs)).negative_curvature  # without an iteration
    assert not parl.NystromPCG(rank=10)(Counted(matrix, damping=200.0), rhs).negative_curvature


def test_a_rank_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="rank"):
        parl.NystromPCG(rank=0)
