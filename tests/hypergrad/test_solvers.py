"""Solvers against dense oracles, and each known way to get them wrong."""

from __future__ import annotations

import pytest
import torch

import parl_core as parl

F64 = torch.float64


def spd(size: int = 20, condition: float = 100.0, seed: int = 0, dtype: torch.dtype = F64):
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64))
    matrix = basis @ torch.diag(torch.logspace(0, torch.tensor(condition).log10().item(), size, dtype=F64)) @ basis.T
    return matrix.to(dtype), torch.randn(size, generator=generator, dtype=F64).to(dtype)


@pytest.mark.parametrize("steps", [1, 5, 10, 20])
def test_cg_reaches_the_krylov_optimum(steps):
    """After k steps CG minimises the A-norm of the error over span{b, Ab, …, A^{k−1} b}: solved densely as the oracle."""
    matrix, rhs = spd()
    krylov = [rhs / rhs.norm()]
    for _ in range(steps - 1):
        krylov.append(matrix @ krylov[-1])
        krylov[-1] /= krylov[-1].norm()
        basis, _ = torch.linalg.qr(torch.stack(krylov, 1))
        krylov = list(basis.T)
    space = torch.linalg.qr(torch.stack(krylov, 1))[0]
    optimum = space @ torch.linalg.solve(space.T @ matrix @ space, space.T @ rhs)
    solution = parl.CG(rtol=1e-15, max_iterations=steps)(lambda v: matrix @ v, rhs)
    # Rounding, of the matrix alone even, costs CG its orthogonality: 3e-5 remains at the last step, for any code.
    torch.testing.assert_close(solution.value, optimum, rtol=0, atol=1e-8 if steps <= 10 else 1e-4)
    assert solution.iterations == steps
    assert solution.residuals.shape == (steps + 1,)


def test_the_reported_residual_is_the_true_one():
    matrix, rhs = spd(200, 1e3, dtype=torch.float32)
    solution = parl.CG(rtol=1e-4, max_iterations=2000)(lambda v: matrix @ v, rhs)
    true = (rhs - matrix @ solution.value).norm() / rhs.norm()
    assert solution.status is parl.Status.CONVERGED
    assert float(solution.residuals[-1]) <= 1e-4
    assert float(true) == pytest.approx(float(solution.residuals[-1]), rel=0.05)


def test_an_unreachable_tolerance_is_reported_not_claimed():
    matrix, rhs = spd(100, 1e4, dtype=torch.float32)
    solution = parl.CG(rtol=1e-6, max_iterations=5000)(lambda v: matrix @ v, rhs)
    assert solution.status is parl.Status.STAGNATED
    assert "float64" in solution.status.message
    assert torch.isfinite(solution.value).all()


def test_too_few_iterations_are_reported():
    matrix, rhs = spd(condition=1e4)
    solution = parl.CG(rtol=1e-10, max_iterations=3)(lambda v: matrix @ v, rhs)
    assert solution.status is parl.Status.MAX_ITERATIONS
    assert solution.products == 4  # three steps and one true residual, none spent on A·0


def test_warm_start_at_the_solution_takes_no_iteration():
    matrix, rhs = spd()
    exact = torch.linalg.solve(matrix, rhs)
    solution = parl.CG(rtol=1e-8)(lambda v: matrix @ v, rhs, exact)
    assert (solution.iterations, solution.status) == (0, parl.Status.CONVERGED)
    torch.testing.assert_close(solution.value, exact)
    nearby = parl.CG(rtol=1e-8)(lambda v: matrix @ v, rhs, exact + 1e-6)
    assert nearby.iterations < parl.CG(rtol=1e-8)(lambda v: matrix @ v, rhs).iterations
    torch.testing.assert_close(nearby.value, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", [parl.CG(rtol=1e-10), parl.Dense()], ids=["CG", "Dense"])
class TestEverySolver:
    def test_solves(self, solver):
        matrix, rhs = spd()
        solution = solver(lambda v: matrix @ v, rhs)
        torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, rhs), rtol=1e-8, atol=1e-9)
        assert solution.status is parl.Status.CONVERGED
        assert not solution.negative_curvature
        assert solution.damping == 0.0

    def test_zero_right_hand_side(self, solver):
        matrix, rhs = spd()
        solution = solver(lambda v: matrix @ v, torch.zeros_like(rhs))
        assert solution.status is parl.Status.CONVERGED
        assert not solution.value.any()

    def test_scalar_problem(self, solver):
        solution = solver(lambda v: 4.0 * v, torch.tensor([2.0], dtype=F64))
        torch.testing.assert_close(solution.value, torch.tensor([0.5], dtype=F64))

    def test_consistent_singular_system_gets_the_minimum_norm_solution(self, solver):
        matrix, rhs = spd()
        values, vectors = torch.linalg.eigh(matrix)
        values[:4] = 0.0
        matrix = vectors @ torch.diag(values) @ vectors.T
        rhs = matrix @ rhs
        solution = solver(lambda v: matrix @ v, rhs)
        assert solution.status is parl.Status.CONVERGED
        torch.testing.assert_close(solution.value, torch.linalg.pinv(matrix, rtol=1e-10) @ rhs, rtol=1e-7, atol=1e-9)

    def test_a_nan_stays_a_nan_and_is_named(self, solver):
        matrix, rhs = spd()
        bad_rhs = rhs.clone()
        bad_rhs[3] = float("nan")
        solution = solver(lambda v: matrix @ v, bad_rhs)
        assert solution.status is parl.Status.NON_FINITE_RHS
        assert solution.value.isnan().all()
        assert solution.residuals[-1].isnan()
        solution = solver(lambda v: torch.full_like(v, float("nan")), rhs)
        assert solution.status is parl.Status.NON_FINITE_OPERATOR
        assert solution.value.isnan().all()

    def test_negative_curvature_is_reported(self, solver):
        matrix, rhs = spd()
        values, vectors = torch.linalg.eigh(matrix)
        values[0] = -5.0
        matrix = vectors @ torch.diag(values) @ vectors.T
        assert solver(lambda v: matrix @ v, rhs).negative_curvature

    def test_inconsistent_singular_system_is_not_called_solved(self, solver):
        solution = solver(lambda v: torch.zeros_like(v), torch.ones(3, dtype=F64))
        assert solution.status is parl.Status.BREAKDOWN


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e19, 1e30])
def test_the_scale_of_the_right_hand_side_does_not_matter(size):
    diagonal = torch.tensor([1.0, 2.0, 3.0])
    solution = parl.CG(rtol=1e-5)(lambda v: diagonal * v, torch.full((3,), size))
    assert solution.status is parl.Status.CONVERGED
    torch.testing.assert_close(solution.value / size, 1 / diagonal, rtol=1e-5, atol=0)


def test_a_direction_of_curvature_zero_up_to_rounding_is_a_breakdown():
    diagonal = torch.linspace(-1, 1, 50, dtype=F64)  # pᵀAp of the first direction is a sum that cancels
    solution = parl.CG()(lambda v: diagonal * v, torch.ones(50, dtype=F64))
    assert solution.status is parl.Status.BREAKDOWN
    assert float(solution.residuals[-1]) <= 1.0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="rhs"):
        parl.CG()(lambda v: v, torch.ones(2, 2))
    with pytest.raises(ValueError, match="x0"):
        parl.CG()(lambda v: v, torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="operator"):
        parl.CG()(lambda v: v[:1], torch.ones(2))
    with pytest.raises(ValueError, match="rtol"):
        parl.CG(rtol=0.0)
    with pytest.raises(ValueError, match="max_iterations"):
        parl.CG(max_iterations=0)
