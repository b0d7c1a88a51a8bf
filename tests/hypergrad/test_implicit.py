"""implicit_gradient against closed forms and finite differences."""

from __future__ import annotations

import pytest
import torch

import parl_core as parl

F64 = torch.float64
EXACT = parl.CG(rtol=1e-13, max_iterations=200)


def quadratic(seed: int = 0):
    """g = ½ yᵀA y − yᵀB x, F = ½‖y − t‖² + cᵀx: y* = A⁻¹B x, dF/dx = c + BᵀA⁻¹(y* − t)."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(4, 4, generator=generator, dtype=F64)
    a = root @ root.T + torch.eye(4, dtype=F64)
    b = torch.randn(4, 3, generator=generator, dtype=F64)
    c, t = torch.randn(3, generator=generator, dtype=F64), torch.randn(4, generator=generator, dtype=F64)
    x = torch.randn(3, generator=generator, dtype=F64)

    def lower(up, low):
        y = torch.cat([low["head"].reshape(-1), low["tail"]])
        return 0.5 * y @ a @ y - y @ b @ up["x"]

    def upper(up, low):
        y = torch.cat([low["head"].reshape(-1), low["tail"]])
        return 0.5 * ((y - t) ** 2).sum() + c @ up["x"]

    return a, b, c, t, x, upper, lower


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_linear_quadratic_closed_form_with_damping_once(damping):
    a, b, c, t, x, upper, lower = quadratic()
    y = torch.linalg.solve(a, b @ x)
    params = {"head": y[:2].reshape(1, 2), "tail": y[2:]}
    result = parl.implicit_gradient(upper, lower, {"x": x}, params, solver=EXACT, damping=damping)
    damped = a + damping * torch.eye(4, dtype=F64)
    torch.testing.assert_close(result.direct, c)
    torch.testing.assert_close(result.implicit, b.T @ torch.linalg.solve(damped, y - t))
    torch.testing.assert_close(result.total, result.direct + result.implicit)
    assert result.solution.damping == damping


def test_scalar_problem_is_not_zero():
    """min_x (y* − 2)², y* = argmin ½(y − x²)²: dF/dx = 4x(x² − 2)."""
    x = torch.tensor(1.5, dtype=F64, requires_grad=True)
    result = parl.implicit_gradient(
        lambda up, low: (low["y"] - 2) ** 2,
        lambda up, low: 0.5 * (low["y"] - up["x"] ** 2) ** 2,
        {"x": x},
        {"y": (x**2).detach()},
    )
    torch.testing.assert_close(result.total, torch.tensor([4 * 1.5 * (1.5**2 - 2)], dtype=F64))
    result.backward()
    torch.testing.assert_close(x.grad, result.total.reshape(()))


def test_nonlinear_problem_against_finite_differences():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(30, 3, generator=generator, dtype=F64)
    targets = (torch.rand(30, generator=generator, dtype=F64) > 0.5).to(F64)
    held_out = torch.randn(20, 3, generator=generator, dtype=F64)
    x = torch.tensor([0.3, -0.2, 0.1], dtype=F64)

    def lower(up, low):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(features @ low["w"], targets)
        return loss + 0.5 * (up["log_l2"].exp() * low["w"] ** 2).sum()

    def upper(up, low):
        return torch.tanh(held_out @ low["w"]).mean() + 0.1 * (up["log_l2"] ** 2).sum()

    def solve(log_l2):
        w = torch.zeros(3, dtype=F64)
        for _ in range(50):
            gradient = torch.func.grad(lambda v: lower({"log_l2": log_l2}, {"w": v}))(w)
            hessian = torch.func.hessian(lambda v: lower({"log_l2": log_l2}, {"w": v}))(w)
            w = w - torch.linalg.solve(hessian, gradient)
        return w

    result = parl.implicit_gradient(upper, lower, {"log_l2": x}, {"w": solve(x)}, solver=EXACT)
    for i, unit in enumerate(torch.eye(3, dtype=F64) * 1e-5):
        high, low = x + unit, x - unit
        change = upper({"log_l2": high}, {"w": solve(high)}) - upper({"log_l2": low}, {"w": solve(low)})
        assert float(result.total[i]) == pytest.approx(float(change) / 2e-5, rel=1e-7)


def test_unused_and_zero_size_parameters_get_zeros():
    result = parl.implicit_gradient(
        lambda up, low: (low["y"] ** 2).sum(),
        lambda up, low: 0.5 * ((low["y"] - up["x"]) ** 2).sum() + 0.5 * (low["free"] ** 2).sum(),
        {
            "x": torch.ones(2, dtype=F64),
            "unused": torch.ones(3, dtype=F64),
            "empty": torch.zeros(0, dtype=F64),
        },
        {"y": torch.ones(2, dtype=F64), "free": torch.zeros(2, dtype=F64)},
    )
    torch.testing.assert_close(result.total, torch.tensor([2.0, 2.0, 0, 0, 0], dtype=F64))


def test_bad_parameters_and_losses_are_named():
    def one(up, low):
        return (up["x"] * low["y"]).sum()

    good = {"y": torch.ones(2)}
    with pytest.raises(TypeError, match="upper_params: 'x' must be a real floating-point"):
        parl.implicit_gradient(one, one, {"x": torch.ones(2, dtype=torch.cfloat)}, good)
    with pytest.raises(TypeError, match="upper_params: 'x'"):
        parl.implicit_gradient(one, one, {"x": torch.ones(2, dtype=torch.int64)}, good)
    with pytest.raises(TypeError, match="non-empty dict"):
        parl.implicit_gradient(one, one, {}, good)
    with pytest.raises(ValueError, match="upper_loss must return a scalar"):
        parl.implicit_gradient(lambda up, low: low["y"], one, {"x": torch.ones(2)}, good)
    with pytest.raises(parl.NonFiniteError, match="lower_loss"):
        parl.implicit_gradient(one, lambda up, low: one(up, low) / 0, {"x": torch.ones(2)}, good)
    with pytest.raises(ValueError, match="damping"):
        parl.implicit_gradient(one, one, {"x": torch.ones(2)}, good, damping=-1.0)


def test_a_solve_that_fails_warns():
    with pytest.warns(parl.HypergradientWarning, match="BREAKDOWN"):
        parl.implicit_gradient(
            lambda up, low: low["y"].sum(),
            lambda up, low: (low["y"] * up["x"]).sum(),
            {"x": torch.ones(2)},
            {"y": torch.ones(2)},
        )
