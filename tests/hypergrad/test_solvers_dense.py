"""The dense oracle: it has the matrix, so it can tell what is wrong with it."""

from __future__ import annotations

import pytest
import torch

import parl_core as parl
from tests.hypergrad.systems import F64, Counted, spd, symmetric


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_an_operator_that_is_not_symmetric_is_named(dtype):
    matrix = torch.tensor([[1.0, 5.0], [0.0, 1.0]], dtype=dtype)
    solution = parl.Dense()(Counted(matrix), torch.ones(2, dtype=dtype))
    assert solution.status is parl.Status.NOT_SYMMETRIC
    assert not solution.status.ok
    assert "dropout" in solution.status.message
    # Of the symmetric part [[1, 2.5], [2.5, 1]] x is (2, 2) / 7, and the residual is that of the operator itself.
    torch.testing.assert_close(solution.value, torch.full((2,), 2 / 7, dtype=dtype))
    assert float(solution.residuals[-1]) == pytest.approx(0.5**0.5 * 50**0.5 / 7, rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 20])
def test_an_operator_that_is_another_at_each_product_is_named(size):
    """Every second product is a percent larger; with a single parameter only the last product can show it."""
    matrix, rhs = spd(size, 5.0)
    operator = Counted(matrix)
    solution = parl.Dense()(lambda v: operator(v) * (1.0 + 0.01 * (operator.products % 2)), rhs)
    assert solution.status is parl.Status.NOT_SYMMETRIC


def test_dropout_is_named():
    matrix, rhs = spd(20, 5.0)
    generator = torch.Generator().manual_seed(0)

    def dropped(vector):
        return matrix @ (vector * (torch.rand(20, generator=generator, dtype=F64) > 0.1) / 0.9)

    solution = parl.Dense()(dropped, rhs)
    assert solution.status is parl.Status.NOT_SYMMETRIC


@pytest.mark.parametrize(("dtype", "condition"), [(F64, 1e10), (torch.float32, 1e3)], ids=["float64", "float32"])
def test_what_the_dtype_can_solve_is_called_solved(dtype, condition):
    for seed in range(10):
        matrix, rhs = spd(60, condition, seed=seed, dtype=dtype)
        noise = 4.0 * torch.finfo(dtype).eps * torch.randn(60, 60, generator=torch.Generator().manual_seed(seed))
        matrix = matrix * (1.0 + noise.to(dtype))  # asymmetric by rounding
        operator = Counted(matrix)
        solution = parl.Dense()(operator, torch.stack([rhs, 2 * rhs.flip(0)]))
        assert solution.status is parl.Status.CONVERGED
        assert solution.products == operator.products == 60 + 2


def test_a_residual_above_rtol_is_not_called_solved():
    """In float32 at κ = 1e6 no x has a residual within rtol, and at rtol = 1 hardly any has not."""
    matrix, rhs = symmetric(torch.logspace(0, -5.9, 60, dtype=F64), dtype=torch.float32)
    solution = parl.Dense()(Counted(matrix), rhs)
    assert float(solution.residuals[-1]) > 1e-4
    assert solution.status in (parl.Status.STAGNATED, parl.Status.INCONSISTENT)
    assert parl.Dense(rtol=1.0)(Counted(matrix), rhs).status is parl.Status.CONVERGED
    assert parl.Dense()(Counted(matrix.to(F64)), rhs.to(F64)).status is parl.Status.CONVERGED
    inconsistent = parl.Dense()(Counted(torch.diag(torch.tensor([1.0, 0.0]))), torch.tensor([1.0, 1e-3]))
    assert inconsistent.status is parl.Status.INCONSISTENT
    assert float(inconsistent.residuals[-1]) == pytest.approx(1e-3, rel=1e-3)
