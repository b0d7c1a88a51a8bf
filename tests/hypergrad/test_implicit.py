"""implicit_gradient against closed forms, finite differences and derivatives taken through a re-solved lower level."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import parl_core as parl

F64 = torch.float64
EXACT = parl.CG(rtol=1e-13, max_iterations=200)
SOLVERS = {
    "CG": EXACT,
    "MINRES": parl.MINRES(rtol=1e-12),
    "Neumann": parl.Neumann(rtol=1e-12, max_iterations=5000),
    "NystromPCG": parl.NystromPCG(rank=2, rtol=1e-12),
    "Dense": parl.Dense(),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


@pytest.fixture(autouse=True)
def _no_kept_sketch():
    SOLVERS["NystromPCG"].reset()


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


@every_solver
@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_linear_quadratic_closed_form_with_damping_once(damping, solver):
    a, b, c, t, x, upper, lower = quadratic()
    y = torch.linalg.solve(a, b @ x)
    params = {"head": y[:2].reshape(1, 2), "tail": y[2:]}
    result = parl.implicit_gradient(upper, lower, {"x": x}, params, solver=solver, damping=damping)
    damped = a + damping * torch.eye(4, dtype=F64)
    torch.testing.assert_close(result.direct, c)
    torch.testing.assert_close(result.implicit, b.T @ torch.linalg.solve(damped, y - t))
    torch.testing.assert_close(result.total, result.direct + result.implicit)
    assert result.solution.status is parl.Status.CONVERGED
    assert result.solution.damping == damping


@every_solver
def test_scalar_problem_is_not_zero(solver):
    """min_x (y* − 2)², y* = argmin ½(y − x²)²: dF/dx = 4x(x² − 2)."""
    x = torch.tensor(1.5, dtype=F64, requires_grad=True)
    result = parl.implicit_gradient(
        lambda up, low: (low["y"] - 2) ** 2,
        lambda up, low: 0.5 * (low["y"] - up["x"] ** 2) ** 2,
        {"x": x},
        {"y": (x**2).detach()},
        solver=solver,
    )
    torch.testing.assert_close(result.total, torch.tensor([4 * 1.5 * (1.5**2 - 2)], dtype=F64))
    result.backward()
    torch.testing.assert_close(x.grad, result.total.reshape(()))


@pytest.mark.parametrize("shape", [(), (5,)], ids=["one λ", "a λ for each feature"])
def test_ridge_regression(shape):
    """w* = (XᵀX + diag(λ))⁻¹Xᵀy: dF/dλ_j = −w*_j [(XᵀX + diag(λ))⁻¹ ∂F/∂w]_j, summed over j for a common λ."""
    generator = torch.Generator().manual_seed(0)
    features, held_out = torch.randn(2, 20, 5, generator=generator, dtype=F64)
    targets, wanted = torch.randn(2, 20, generator=generator, dtype=F64)
    strength = 0.5 + torch.rand(shape, generator=generator, dtype=F64)
    system = features.T @ features + torch.diag(strength.expand(5))
    w = torch.linalg.solve(system, features.T @ targets)
    expected = -w * torch.linalg.solve(system, held_out.T @ (held_out @ w - wanted))
    result = parl.implicit_gradient(
        lambda up, low: 0.5 * ((held_out @ low["w"] - wanted) ** 2).sum(),
        lambda up, low: 0.5 * ((features @ low["w"] - targets) ** 2).sum() + 0.5 * (up["λ"] * low["w"] ** 2).sum(),
        {"λ": strength},
        {"w": w},
        solver=EXACT,
    )
    torch.testing.assert_close(result.direct, torch.zeros_like(result.direct))
    torch.testing.assert_close(result.total, expected if shape else expected.sum().reshape(1))


def test_stackelberg_duopoly():
    """Price a − q₁ − q₂, costs c₁, c₂. The follower answers q₂ = (a − q₁ − c₂)/2; the leader's profit then has slope
    (a + c₂ − 2c₁)/2 − q₁, so it settles at q₁ = (a + c₂ − 2c₁)/2."""
    a, c1, c2 = 10.0, 1.0, 2.0
    leader = torch.tensor(1.0, dtype=F64, requires_grad=True)
    optimizer = torch.optim.SGD([leader], lr=0.5)
    for _ in range(60):
        result = parl.implicit_gradient(
            lambda up, low: -up["q1"] * (a - up["q1"] - low["q2"] - c1),
            lambda up, low: -low["q2"] * (a - up["q1"] - low["q2"] - c2),
            {"q1": leader},
            {"q2": (a - leader.detach() - c2) / 2},
        )
        assert -result.total.item() == pytest.approx((a + c2 - 2 * c1) / 2 - leader.item())
        optimizer.zero_grad()
        result.backward()
        optimizer.step()
    assert leader.item() == pytest.approx((a + c2 - 2 * c1) / 2)


def logistic(seed: int = 1):
    """Regularisation strengths of a logistic regression, and the function that solves it by Newton's method."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(30, 3, generator=generator, dtype=F64)
    targets = (torch.rand(30, generator=generator, dtype=F64) > 0.5).to(F64)
    held_out = torch.randn(20, 3, generator=generator, dtype=F64)
    x = torch.tensor([0.3, -0.2, 0.1], dtype=F64)

    def lower(up, low):
        loss = F.binary_cross_entropy_with_logits(features @ low["w"], targets)
        return loss + 0.5 * (up["log_l2"].exp() * low["w"] ** 2).sum()

    def upper(up, low):
        return torch.tanh(held_out @ low["w"]).mean() + 0.1 * (up["log_l2"] ** 2).sum()

    def newton(log_l2, w, steps):
        for _ in range(steps):
            gradient = torch.func.grad(lambda v: lower({"log_l2": log_l2}, {"w": v}))(w)
            hessian = torch.func.hessian(lambda v: lower({"log_l2": log_l2}, {"w": v}))(w)
            w = w - torch.linalg.solve(hessian, gradient)
        return w

    return x, upper, lower, newton


def test_nonlinear_problem_against_finite_differences():
    x, upper, lower, newton = logistic()
    start = torch.zeros(3, dtype=F64)
    result = parl.implicit_gradient(upper, lower, {"log_l2": x}, {"w": newton(x, start, 50)}, solver=EXACT)
    for i, unit in enumerate(torch.eye(3, dtype=F64) * 1e-5):
        high, low = x + unit, x - unit
        change = upper({"log_l2": high}, {"w": newton(high, start, 50)}) - upper(
            {"log_l2": low}, {"w": newton(low, start, 50)}
        )
        assert float(result.total[i]) == pytest.approx(float(change) / 2e-5, rel=1e-7)


@every_solver
@pytest.mark.parametrize("seed", range(3))
def test_nonlinear_problem_against_unrolled_newton(solver, seed):
    x, upper, lower, newton = logistic(seed)
    start = torch.zeros(3, dtype=F64)
    expected = torch.func.grad(lambda v: upper({"log_l2": v}, {"w": newton(v, start, 12)}))(x)
    result = parl.implicit_gradient(upper, lower, {"log_l2": x}, {"w": newton(x, start, 12)}, solver=solver)
    torch.testing.assert_close(result.total, expected, rtol=1e-9, atol=1e-12)
    assert result.direct.norm() > 1e-3
    assert result.implicit.norm() > 1e-3


def test_a_warm_start_reaches_the_solver():
    a, b, _, _, x, upper, lower = quadratic()
    y = torch.linalg.solve(a, b @ x)
    params = {"head": y[:2], "tail": y[2:]}
    cold = parl.implicit_gradient(upper, lower, {"x": x}, params, solver=EXACT)
    warm = parl.implicit_gradient(upper, lower, {"x": x}, params, solver=EXACT, x0=cold.solution.value)
    assert cold.solution.iterations > 0
    assert warm.solution.iterations == 0
    torch.testing.assert_close(warm.total, cold.total)
    with pytest.raises(ValueError, match=r"x0 must .*\(4,\)"):
        parl.implicit_gradient(upper, lower, {"x": x}, params, x0=torch.zeros(3, dtype=F64))


def test_aux_comes_back_as_it_came():
    a, b, _, _, x, upper, lower = quadratic()
    y = torch.linalg.solve(a, b @ x)
    params, aux = {"head": y[:2], "tail": y[2:]}, {"margins": torch.ones(3)}
    plain = parl.implicit_gradient(upper, lower, {"x": x}, params)
    result = parl.implicit_gradient(lambda u, v: (upper(u, v), aux), lower, {"x": x}, params, has_aux=True)
    assert result.aux is aux
    assert plain.aux is None
    torch.testing.assert_close(result.total, plain.total)
    with pytest.raises(TypeError, match=r"upper_loss must return \(scalar, aux\).*got Tensor"):
        parl.implicit_gradient(upper, lower, {"x": x}, params, has_aux=True)
    with pytest.raises(ValueError, match="upper_loss must return a real scalar tensor, got tuple"):
        parl.implicit_gradient(lambda u, v: (upper(u, v), aux), lower, {"x": x}, params)


def test_the_losses_may_change_the_dicts_they_get():
    def lower(up, low):
        return 0.5 * (low.pop("y") - up.pop("x")) ** 2

    y = torch.tensor(3.0)
    result = parl.implicit_gradient(lambda up, low: low.pop("y") ** 2, lower, {"x": torch.tensor(3.0)}, {"y": y})
    torch.testing.assert_close(result.total, torch.tensor([6.0]))


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


@every_solver
def test_a_lower_level_without_a_single_number(solver):
    result = parl.implicit_gradient(
        lambda up, low: up["x"] ** 2 + low["y"].sum(),
        lambda up, low: (low["y"] ** 2).sum() * up["x"],
        {"x": torch.tensor(3.0)},
        {"y": torch.zeros(0, 3)},
        solver=solver,
    )
    assert result.total.tolist() == [6.0]


@every_solver
def test_levels_that_do_not_touch_each_other_have_no_implicit_term(solver):
    x, y = torch.ones(2, dtype=F64), torch.ones(3, dtype=F64)

    def separate(up, low):
        return (low["y"] ** 2).sum() + (up["x"] ** 2).sum()

    apart = parl.implicit_gradient(separate, separate, {"x": x}, {"y": y}, solver=solver)
    assert apart.implicit.tolist() == [0, 0]
    assert apart.direct.tolist() == [2, 2]
    assert apart.solution.value.tolist() == pytest.approx([1, 1, 1])  # the solve was no less needed than known

    def joint(up, low):
        return ((low["y"].sum() - up["x"]) ** 2).sum() + (low["y"] ** 2).sum()

    upper_only = parl.implicit_gradient(lambda up, low: (up["x"] ** 2).sum(), joint, {"x": x}, {"y": y}, solver=solver)
    assert upper_only.implicit.tolist() == [0, 0]
    assert upper_only.solution.status is parl.Status.CONVERGED
    lower_only = parl.implicit_gradient(lambda up, low: (low["y"] ** 2).sum(), joint, {"x": x}, {"y": y}, solver=solver)
    assert lower_only.direct.tolist() == [0, 0]
    constant = parl.implicit_gradient(lambda up, low: torch.ones(()), joint, {"x": x}, {"y": y}, solver=solver)
    assert constant.total.tolist() == [0, 0]


@every_solver
@pytest.mark.parametrize("linear", [True, False], ids=["linear in y", "without y"])
def test_a_lower_level_without_curvature_warns(solver, linear):
    with pytest.warns(parl.HypergradientWarning, match="the linear solve ended with"):
        result = parl.implicit_gradient(
            lambda up, low: low["y"].sum(),
            lambda up, low: ((low["y"] if linear else 1.0) * up["x"]).sum(),
            {"x": torch.ones(2)},
            {"y": torch.ones(2)},
            solver=solver,
        )
    assert not result.solution.status.ok


@pytest.mark.filterwarnings("ignore::parl_core.HypergradientWarning")  # more than the one looked for
@every_solver
def test_a_nan_stays_one_and_is_named(solver):
    x, y = {"x": torch.ones(2)}, {"y": torch.zeros(2)}

    def quadratic_lower(up, low):
        return ((low["y"] - up["x"]) ** 2).sum()

    with pytest.warns(parl.HypergradientWarning) as record:
        result = parl.implicit_gradient(lambda u, v: (v["y"] ** 2).sum().sqrt(), quadratic_lower, x, y, solver=solver)
    assert result.solution.status is parl.Status.NON_FINITE_RHS
    assert result.implicit.isnan().all()
    assert any("the implicit term holds a NaN" in str(w.message) for w in record)

    with pytest.warns(parl.HypergradientWarning, match="NON_FINITE_OPERATOR"):  # |y|^1.5 has no curvature at 0
        result = parl.implicit_gradient(
            lambda u, v: v["y"].sum(), lambda u, v: (v["y"].abs() ** 1.5).sum() * u["x"].sum(), x, y, solver=solver
        )
    assert result.implicit.isnan().all()

    with pytest.warns(parl.HypergradientWarning, match="the direct term holds a NaN"):
        result = parl.implicit_gradient(
            lambda u, v: (u["x"] - 1).abs().sum().sqrt() + v["y"].sum(), quadratic_lower, x, y, solver=solver
        )
    assert result.total.isnan().all()
    assert result.implicit.isfinite().all()


def test_bad_parameters_and_losses_are_named():
    def one(up, low):
        return (up["x"] * low["y"]).sum()

    good, x = {"y": torch.ones(2)}, {"x": torch.ones(2)}
    with pytest.raises(TypeError, match="upper_params: 'x' must be a real floating-point"):
        parl.implicit_gradient(one, one, {"x": torch.ones(2, dtype=torch.cfloat)}, good)
    with pytest.raises(TypeError, match="lower_params: 'y'"):
        parl.implicit_gradient(one, one, x, {"y": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(TypeError, match=r"non-empty dict of tensors or an nn\.Module, got an empty one"):
        parl.implicit_gradient(one, one, {}, good)
    with pytest.raises(TypeError, match=r"lower_params must be .*, got generator"):
        parl.implicit_gradient(one, one, x, torch.nn.Linear(1, 1).named_parameters())
    with pytest.raises(TypeError, match=r"lower_params\['y'\] must be a tensor, got float"):
        parl.implicit_gradient(one, one, x, {"y": 1.0})
    with pytest.raises(
        ValueError, match=r"upper_loss must return a real scalar tensor, got torch\.float32 of shape \(2,"
    ):
        parl.implicit_gradient(lambda up, low: low["y"], one, x, good)
    with pytest.raises(ValueError, match=r"lower_loss must return a real scalar tensor, got torch\.complex64"):
        parl.implicit_gradient(one, lambda up, low: one(up, low) * 1j, x, good)
    with pytest.raises(parl.NonFiniteError, match="lower_loss"):
        parl.implicit_gradient(one, lambda up, low: one(up, low) / 0, x, good)
    with pytest.raises(ValueError, match="damping"):
        parl.implicit_gradient(one, one, x, good, damping=-1.0)
    with pytest.raises(TypeError, match="solver must be an instance"):
        parl.implicit_gradient(one, one, x, good, solver=parl.CG)


SPECTRUM = torch.logspace(-1, 1, 6, dtype=F64)
SLOPE = torch.linspace(1, 2, 6, dtype=F64)


def diagonal(spectrum=SPECTRUM, **options):
    """min_y ½ yᵀQy − xᵀy, F = cᵀy: dF/dx = Q⁻¹c, and (Q + δ)⁻¹c with damping."""
    x = torch.ones(6, dtype=F64)
    return parl.implicit_gradient(
        lambda up, low: SLOPE @ low["y"],
        lambda up, low: 0.5 * (spectrum * low["y"] ** 2).sum() - up["x"] @ low["y"],
        {"x": x},
        {"y": x / spectrum},
        **(dict(solver=parl.CG(rtol=1e-12)) | options),
    )


def test_automatic_damping_is_reported_with_its_price():
    result = diagonal(damping="auto")
    damping = result.solution.damping
    assert damping == pytest.approx(parl.hypergrad.automatic_damping(lambda v: SPECTRUM * v, SLOPE), rel=1e-9)
    assert damping > 0
    torch.testing.assert_close(result.total, SLOPE / (SPECTRUM + damping))
    exact, priced = SLOPE / SPECTRUM, result.error.damping_bias
    torch.testing.assert_close(priced, SLOPE / (SPECTRUM + damping) - exact, rtol=0.15, atol=1e-3)
    with pytest.raises(ValueError, match="'auto'"):
        diagonal(damping="some")


@every_solver
def test_a_damping_that_was_given_is_priced_on_request(solver):
    """To first order: −δ (Q + δ)⁻²c of a true −δ/Q (Q + δ)⁻¹c, from a solve to 1%."""
    for damping in (1e-3, 0.5):
        damped = SPECTRUM + damping
        plain = diagonal(damping=damping, solver=solver)
        assert plain.error is None
        result = diagonal(damping=damping, solver=solver, estimate_error=True)
        torch.testing.assert_close(result.total, plain.total, rtol=0, atol=0)
        assert result.error.stderr is None and result.error.lower_bias is None
        off = (result.error.damping_bias + damping * SLOPE / damped**2).norm() / (damping * SLOPE / damped**2).norm()
        assert off < 0.1
    assert result.error.damping_bias.norm() > 0.6 * result.total.norm()  # "too large" cannot be overlooked
    assert "effect of the damping" in result.summary()


def test_no_damping_is_priced_at_nothing():
    assert not diagonal(estimate_error=True).error.damping_bias.any()


@pytest.mark.parametrize("damping", ["auto", 0.0])
def test_a_saddle_of_the_lower_loss_is_told(damping):
    """The automatic damping makes the system definite, which must not hide that lower_params is no minimum."""
    saddle = SPECTRUM * torch.tensor([1, 1, 1, 1, -1, 1], dtype=F64)
    with pytest.warns(parl.hypergrad.HypergradientWarning, match="lower_params is not at a local minimum"):
        result = diagonal(saddle, damping=damping)
    assert result.solution.negative_curvature
    if damping == "auto":
        assert result.solution.damping > -float(saddle.min())
        torch.testing.assert_close(result.total, SLOPE / (saddle + result.solution.damping))
    assert not diagonal(damping=damping).solution.negative_curvature


def test_backward_reaches_what_a_parameter_was_computed_from():
    start = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    result = parl.implicit_gradient(
        lambda up, low: (low["y"] ** 2).sum(),
        lambda up, low: ((low["y"] - up["x"]) ** 2).sum(),
        {"x": 3.0 * start},
        {"y": 3.0 * start.detach()},
    )
    result.backward()
    torch.testing.assert_close(start.grad, 2 * 9 * start.detach())
