"""CG and MINRES against the best that the Krylov space holds, and on systems that break textbook codes."""

from __future__ import annotations

import math

import pytest
import torch

import parl_core as parl
from parl_core.hypergrad.solvers.system import rounding_allowance
from tests.hypergrad.systems import F64, krylov_basis, spd, symmetric


@pytest.mark.parametrize("steps", [1, 5, 10, 20])
def test_cg_reaches_the_krylov_optimum(steps):
    """After k steps CG minimises the A-norm of the error over span{b, Ab, …, A^{k−1} b}: solved densely as the oracle."""
    matrix, rhs = spd()
    space = krylov_basis(matrix, rhs, steps)
    optimum = space @ torch.linalg.solve(space.T @ matrix @ space, space.T @ rhs)
    solution = parl.CG(rtol=1e-15, max_iterations=steps)(lambda v: matrix @ v, rhs)
    # Rounding, of the matrix alone even, costs CG its orthogonality: 3e-5 remains at the last step, for any code.
    torch.testing.assert_close(solution.value, optimum, rtol=0, atol=1e-8 if steps <= 10 else 1e-4)
    assert solution.iterations == steps
    assert solution.residuals.shape == (steps + 1,)


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 15])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_minres_reaches_the_smallest_residual_of_the_krylov_space(steps, warm):
    matrix, rhs = symmetric(torch.cat([-torch.linspace(1, 3, 8), torch.linspace(1, 10, 12)]))
    start = torch.linspace(-0.1, 0.1, 20, dtype=F64) if warm else torch.zeros(20, dtype=F64)
    first = rhs - matrix @ start
    space = krylov_basis(matrix, first, steps)
    optimum = start + space @ torch.linalg.lstsq(matrix @ space, first[:, None]).solution[:, 0]
    solution = parl.MINRES(rtol=1e-15, max_iterations=steps)(lambda v: matrix @ v, rhs, start if warm else None)
    torch.testing.assert_close(solution.value, optimum, rtol=0, atol=1e-9)
    assert float(solution.residuals[-1]) == pytest.approx(float((rhs - matrix @ optimum).norm() / rhs.norm()), rel=1e-7)
    assert (solution.residuals.diff() <= 0).all()


@pytest.mark.parametrize("solver", [parl.CG(), parl.MINRES(), parl.NystromPCG()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("size", [50, 200])
def test_float32_ends_well_at_the_rounding_of_the_operator(solver, size):
    """A power law under the automatic damping, κ = 1000: no float32 residual gets to the default rtol."""
    for seed in range(4):
        matrix, rhs = symmetric(torch.logspace(0, -6, size), seed=seed, dtype=torch.float32)
        damping = parl.automatic_damping(lambda v, matrix=matrix: matrix @ v, rhs)
        damped = matrix + damping * torch.eye(size)
        if isinstance(solver, parl.NystromPCG):
            solver.reset()
        solution = solver(lambda v, damped=damped: damped @ v, rhs)
        exact = torch.linalg.solve(damped.to(F64), rhs.to(F64))
        true = (rhs.to(F64) - damped.to(F64) @ solution.value.to(F64)).norm() / rhs.to(F64).norm()
        assert solution.status is parl.Status.CONVERGED
        assert 1e-5 < float(solution.residuals[-1]) <= 1e-4
        assert float(true) <= 1e-4
        assert float((solution.value.to(F64) - exact).norm() / exact.norm()) < 1e-4
        wide = solver(lambda v, damped=damped: damped.to(F64) @ v, rhs.to(F64))
        assert float(wide.residuals[-1]) <= 1e-5


@pytest.mark.parametrize("solver", [parl.CG(), parl.MINRES(), parl.NystromPCG()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("outside", [1.0, 1e-2, 2e-4])
def test_rounding_excuses_no_inconsistency(solver, outside):
    """A part of the right-hand side that no x reaches is no rounding, however far x runs along the null space."""
    values = torch.cat([torch.zeros(6), torch.logspace(-3, 0, 44)])
    for seed in range(10):
        matrix, rhs = symmetric(values, seed=seed, dtype=torch.float32)
        vectors = torch.linalg.eigh(matrix.to(F64))[1]
        inside, null = vectors[:, 6:] @ (vectors[:, 6:].T @ rhs.to(F64)), vectors[:, 0]
        rhs = (inside / inside.norm() + outside * null).to(torch.float32)
        if isinstance(solver, parl.NystromPCG):
            solver.reset()
        solution = solver(lambda v, matrix=matrix: matrix @ v, rhs)
        assert not solution.status.ok
        assert float(solution.residuals[-1]) > 1e-4


def test_the_allowance_for_rounding_is_bounded():
    def allowance(length, rtol):
        return float(rounding_allowance(torch.tensor([length]), torch.tensor(2.0), rtol))

    eps = torch.finfo(torch.float32).eps
    assert allowance(5.0, 1e-5) == pytest.approx(40 * eps)
    assert allowance(1e30, 1.0) == pytest.approx(4000 * eps)
    assert allowance(1e30, 1e-5) == pytest.approx(1e-4)
    assert math.isnan(allowance(float("nan"), 1e-5))
    wide = rounding_allowance(torch.tensor([1e30], dtype=F64), torch.tensor(2.0, dtype=F64), 1e-5)
    assert float(wide) < 1e-12


def test_minres_on_a_direction_of_curvature_zero():
    """The first Lanczos coefficient cancels: CG has no step to take there, MINRES goes on and solves it."""
    diagonal = torch.linspace(-1, 1, 50, dtype=F64)
    stopped = parl.CG()(lambda v: diagonal * v, torch.ones(50, dtype=F64))
    assert stopped.status is parl.Status.BREAKDOWN
    assert float(stopped.residuals[-1]) <= 1.0
    assert "MINRES" in stopped.status.message
    solution = parl.MINRES(rtol=1e-10)(lambda v: diagonal * v, torch.ones(50, dtype=F64))
    assert solution.status is parl.Status.CONVERGED
    torch.testing.assert_close(solution.value, 1 / diagonal, rtol=1e-7, atol=1e-9)
    assert solution.negative_curvature


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "eigenvalues",
    [
        torch.cat([torch.zeros(4), torch.linspace(1, 10, 16)]),
        torch.cat([torch.zeros(1), torch.logspace(-2, 1, 60)]),
        torch.cat([torch.zeros(4), -torch.logspace(-1, 1, 30), torch.logspace(-1, 1, 30)]),
    ],
    ids=["semi-definite", "nearly definite", "indefinite"],
)
def test_minres_on_a_system_without_solution_returns_the_pseudo_inverse_and_says_so(eigenvalues, dtype):
    matrix, rhs = symmetric(eigenvalues, dtype=dtype)
    solution = parl.MINRES(rtol=1e-8, max_iterations=1000)(lambda v: matrix @ v, rhs)
    assert solution.status is parl.Status.INCONSISTENT
    assert "damping" in solution.status.message
    exact = torch.linalg.pinv(matrix.to(F64), rtol=1e-6, hermitian=True) @ rhs.to(F64)
    smallest = (rhs.to(F64) - matrix.to(F64) @ exact).norm() / rhs.to(F64).norm()
    assert float(solution.residuals[-1]) == pytest.approx(float(smallest), rel=1e-3)
    assert float((solution.value.to(F64) - exact).norm() / exact.norm()) < (1e-6 if dtype is F64 else 0.02)
    assert solution.negative_curvature == bool((eigenvalues < 0).any())


@pytest.mark.parametrize("condition", [1e3, 1e6])
def test_minres_does_not_mistake_ill_conditioning_for_singularity(condition):
    matrix, rhs = spd(40, condition)
    solution = parl.MINRES(rtol=1e-7, max_iterations=2000)(lambda v: matrix @ v, rhs)
    assert solution.status is parl.Status.CONVERGED
    assert not solution.negative_curvature


@pytest.mark.parametrize("signs", ["definite", "indefinite"])
@pytest.mark.parametrize(
    ("dtype", "condition", "tolerance"),
    [
        (torch.float32, 4e3, 1e-3), (torch.float32, 1e4, 3e-3), (torch.float32, 1e5, 3e-2),
        (F64, 1e8, 1e-5), (F64, 1e10, 1e-3),
    ],
)  # fmt: skip
def test_minres_does_not_mistake_small_eigenvalues_for_zero(dtype, condition, tolerance, signs):
    """Below √eps·‖A‖, three apart from all others or one after the other: x is right, and as CG's is."""
    for seed in range(20):
        values = torch.ones(30, dtype=F64) if seed % 2 else torch.linspace(0.2, 1.0, 30, dtype=F64)
        values[-3:] = 1 / condition
        if seed % 4 == 3:
            values = torch.logspace(0, -math.log10(condition), 30, dtype=F64)
        if signs == "indefinite":
            values[::5] *= -1
        matrix, rhs = symmetric(values, seed=seed, dtype=dtype)
        exact = torch.linalg.solve(matrix.to(F64), rhs.to(F64))

        def error(solver, matrix=matrix, rhs=rhs, exact=exact):
            solution = solver(lambda v: matrix @ v, rhs)
            return solution.status, float((solution.value.to(F64) - exact).norm() / exact.norm())

        status, minres = error(parl.MINRES(max_iterations=2000))
        assert status in (parl.Status.CONVERGED, parl.Status.STAGNATED)
        assert minres < tolerance
        if signs == "definite":
            assert minres < max(10 * error(parl.CG(max_iterations=2000))[1], 0.1 * tolerance)


@pytest.mark.parametrize("solver", [parl.CG(max_iterations=100), parl.MINRES(max_iterations=100)], ids=["CG", "MINRES"])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_no_negative_curvature_is_invented_by_rounding(solver, condition):
    for seed in range(5):
        matrix, rhs = spd(100, condition, seed=seed, dtype=torch.float32)
        assert not solver(lambda v, matrix=matrix: matrix @ v, rhs).negative_curvature
        values = torch.cat([torch.zeros(20), torch.logspace(0, 2, 80)])
        matrix, rhs = symmetric(values, seed=seed, dtype=torch.float32)
        assert not solver(lambda v, matrix=matrix: matrix @ v, matrix @ rhs).negative_curvature


@pytest.mark.parametrize("solver", [parl.CG(rtol=1e-8), parl.MINRES(rtol=1e-8)], ids=["CG", "MINRES"])
@pytest.mark.parametrize("negative", [-1e-2, -1.0, -50.0])
def test_one_negative_eigenvalue_is_found(solver, negative):
    eigenvalues = torch.linspace(1, 100, 30, dtype=F64)
    eigenvalues[7] = negative
    matrix, rhs = symmetric(eigenvalues)
    assert solver(lambda v: matrix @ v, rhs).negative_curvature


def test_negative_curvature_is_remembered_when_the_method_starts_again():
    """In float32 at an unreachable tolerance: many restarts, the last of which may not meet the direction again."""
    eigenvalues = torch.linspace(1, 100, 30, dtype=F64)
    eigenvalues[7] = -1.0
    matrix, rhs = symmetric(eigenvalues, dtype=torch.float32)
    for solver in (parl.CG(rtol=1e-9), parl.MINRES(rtol=1e-9)):
        solution = solver(lambda v: matrix @ v, rhs)
        assert solution.status is parl.Status.STAGNATED
        assert solution.negative_curvature
