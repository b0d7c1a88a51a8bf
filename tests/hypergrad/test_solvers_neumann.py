"""The Neumann series: its closed form, its step size and its divergence."""

from __future__ import annotations

import pytest
import torch

import parl_core as parl
from tests.hypergrad.systems import F64, Counted, spd, symmetric


@pytest.mark.parametrize("terms", [1, 2, 7, 40])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_the_error_is_that_of_the_truncated_series(terms, warm):
    matrix, rhs = symmetric(torch.linspace(0.1, 1.9, 20, dtype=F64))
    step_size = 0.8
    contraction = torch.eye(20, dtype=F64) - step_size * matrix
    exact = torch.linalg.solve(matrix, rhs)
    x0 = torch.linspace(-1, 1, 20, dtype=F64) if warm else None
    start = torch.zeros(20, dtype=F64) if x0 is None else x0
    solution = parl.Neumann(step_size=step_size, rtol=1e-15, max_iterations=terms)(lambda v: matrix @ v, rhs, x0)
    error = torch.linalg.matrix_power(contraction, terms) @ (start - exact)
    torch.testing.assert_close(solution.value - exact, error, rtol=1e-10, atol=1e-12)
    if not warm:
        series = step_size * sum(torch.linalg.matrix_power(contraction, k) @ rhs for k in range(terms))
        torch.testing.assert_close(solution.value, series, rtol=1e-12, atol=1e-13)


def test_its_residuals_are_true_ones_and_cost_nothing_extra():
    matrix, rhs = spd()
    operator = Counted(matrix)
    solution = parl.Neumann(step_size=0.01, max_iterations=30)(operator, rhs)
    assert solution.products == operator.products == solution.iterations == 30
    partial = parl.Neumann(step_size=0.01, max_iterations=12)(operator, rhs)
    true = (rhs - matrix @ partial.value).norm() / rhs.norm()
    torch.testing.assert_close(solution.residuals[12], true, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_automatic_step_size_converges_at_every_scale(scale):
    for seed in range(10):
        matrix, rhs = symmetric(scale * torch.linspace(0.5, 1.0, 200, dtype=F64), seed=seed)
        operator = Counted(matrix)
        solution = parl.Neumann(rtol=1e-8)(operator, rhs)
        assert solution.status is parl.Status.CONVERGED
        assert solution.products == operator.products == solution.iterations + 10


def test_the_same_call_gives_the_same_answer():
    matrix, rhs = spd()
    torch.manual_seed(0)
    first = parl.Neumann(max_iterations=20)(lambda v: matrix @ v, rhs).value
    torch.manual_seed(1)
    assert torch.equal(first, parl.Neumann(max_iterations=20)(lambda v: matrix @ v, rhs).value)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_too_large_a_step_size_diverges_at_once_and_says_so(dtype):
    matrix, rhs = spd(dtype=dtype)
    solution = parl.Neumann(step_size=0.021, max_iterations=10_000)(lambda v: matrix @ v, rhs)  # 2.1 / λ_max
    assert solution.status is parl.Status.DIVERGED
    assert "step_size" in solution.status.message
    assert solution.iterations < 100
    assert torch.isfinite(solution.value).all()
    assert not solution.negative_curvature


def test_a_negative_eigenvalue_diverges_and_is_told_from_a_large_step():
    values = torch.linspace(1, 10, 20, dtype=F64)
    values[3] = -0.1
    matrix, rhs = symmetric(values)
    solution = parl.Neumann(max_iterations=10_000)(lambda v: matrix @ v, rhs)
    assert solution.status is parl.Status.DIVERGED
    assert solution.negative_curvature


def test_rounding_at_the_floor_is_not_called_divergence():
    matrix, rhs = spd(50, 10.0, dtype=torch.float32)
    solution = parl.Neumann(rtol=1e-12, max_iterations=2000)(lambda v: matrix @ v, rhs)
    assert solution.status is parl.Status.MAX_ITERATIONS
    assert not solution.negative_curvature


@pytest.mark.parametrize("step_size", [0.0, -1.0, float("nan"), float("inf")])
def test_a_step_size_that_cannot_work_is_refused(step_size):
    with pytest.raises(ValueError, match="step_size"):
        parl.Neumann(step_size=step_size)


def test_no_negative_curvature_is_invented_while_the_iterate_grows_along_the_null_space():
    matrix, rhs = symmetric(torch.cat([torch.zeros(4), torch.linspace(1, 10, 16)]))
    solution = parl.Neumann(rtol=1e-9, max_iterations=3000)(lambda v: matrix @ v, rhs)
    assert solution.status is parl.Status.MAX_ITERATIONS
    assert not solution.negative_curvature
