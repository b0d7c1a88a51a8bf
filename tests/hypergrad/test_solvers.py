"""Every solver against dense oracles, and each known way to get one wrong."""

from __future__ import annotations

import pytest
import torch

import parl_core as parl
from parl_core.hypergrad.solvers import drive
from tests.hypergrad.systems import F64, Counted, solved_unseen, spd, symmetric

SOLVERS = {
    "CG": lambda rtol, limit: parl.CG(rtol=rtol, max_iterations=limit),
    "MINRES": lambda rtol, limit: parl.MINRES(rtol=rtol, max_iterations=limit),
    "Neumann": lambda rtol, limit: parl.Neumann(rtol=rtol, max_iterations=15 * limit),
    "NystromPCG": lambda rtol, limit: parl.NystromPCG(rank=6, rtol=rtol, max_iterations=limit),
    "Woodbury": lambda rtol, limit: parl.Woodbury(rtol=rtol),
    "Dense": lambda rtol, limit: parl.Dense(rtol=rtol),
}
DIRECT = ("Woodbury", "Dense")
ITERATIVE = [name for name in SOLVERS if name not in DIRECT]
OPERATORS = {
    "well conditioned": torch.linspace(1.0, 10.0, 20, dtype=F64),
    "ill conditioned": torch.logspace(-3, 0, 20, dtype=F64),
    "few large": torch.cat([torch.logspace(2, 3, 4, dtype=F64), torch.linspace(1.0, 2.0, 16, dtype=F64)]),
    "singular": torch.cat([torch.zeros(4, dtype=F64), torch.linspace(1.0, 10.0, 16, dtype=F64)]),
    "indefinite": torch.cat([-torch.linspace(1.0, 5.0, 8, dtype=F64), torch.linspace(1.0, 10.0, 12, dtype=F64)]),
    "negative definite": -torch.linspace(1.0, 10.0, 20, dtype=F64),
}
TOLERANCES = {F64: 1e-10, torch.float32: 1e-4}


@pytest.fixture(params=SOLVERS)
def solver(request):
    return SOLVERS[request.param](1e-10, 200)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float64", "float32"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", SOLVERS)
def test_solves_or_says_that_it_did_not(name, kind, warm, dtype):
    eigenvalues, rtol = OPERATORS[kind], TOLERANCES[dtype]
    definite = bool((eigenvalues >= 0).all())
    matrix, rhs = symmetric(eigenvalues, dtype=dtype)
    exact_matrix = matrix.to(F64)
    inverse = torch.linalg.pinv(exact_matrix, rtol=1e-6, hermitian=True)
    if kind == "singular":  # consistent: rhs and start in the range of the matrix
        rhs = (exact_matrix @ inverse @ rhs.to(F64)).to(dtype)
    exact = inverse @ rhs.to(F64)
    x0 = (exact + 0.1 * (inverse @ torch.ones_like(exact))).to(dtype) if warm else None

    operator = Counted(matrix)
    solution = SOLVERS[name](rtol, 6000 if name == "Neumann" else 200)(operator, rhs, x0)
    value = solution.value.to(F64)
    true_residual = float((rhs.to(F64) - exact_matrix @ value).norm() / rhs.to(F64).norm())

    assert solution.value.dtype == solution.residuals.dtype == dtype
    assert solution.products == operator.products
    # Equal up to the rounding of b − A x in the solve's own dtype.
    assert float(solution.residuals[-1]) == pytest.approx(true_residual, rel=0.05, abs=1e3 * torch.finfo(dtype).eps)
    if definite or name != "Neumann":
        assert solution.status is parl.Status.CONVERGED
        smallest = float(eigenvalues.abs()[eigenvalues != 0].min())
        bound = 1.1 * max(float(solution.residuals[-1]), rtol) * float(rhs.norm()) / smallest
        assert float((value - exact).norm()) <= bound
    else:
        assert solution.status is parl.Status.DIVERGED
    assert solution.negative_curvature == (not definite)


def test_zero_right_hand_side(solver):
    matrix, rhs = spd()
    solution = solver(Counted(matrix), torch.zeros_like(rhs))
    assert solution.status is parl.Status.CONVERGED
    assert not solution.value.any()
    assert not solver(Counted(matrix), torch.zeros_like(rhs), rhs).value.any()


def test_a_solution_keeps_no_graph(solver):
    """Neither of rhs nor of x0, both of which came out of a backward pass."""
    matrix, rhs = spd()
    inputs = rhs.requires_grad_(), (0.1 * rhs).detach().requires_grad_()
    operator = Counted(matrix)
    solution = solver(operator, *inputs)
    tensors = [solution.value, solution.residuals, *operator.vectors]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert all(tensor.requires_grad for tensor in inputs)


def test_scalar_problem(solver):
    solution = solver(Counted(torch.tensor([[4.0]], dtype=F64)), torch.tensor([2.0], dtype=F64))
    torch.testing.assert_close(solution.value, torch.tensor([0.5], dtype=F64))


def test_no_parameters(solver):
    solution = solver(Counted(torch.zeros(0, 0)), torch.zeros(0))
    assert (solution.status, solution.value.shape) == (parl.Status.CONVERGED, (0,))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_stays_a_nan_and_is_named(solver, bad):
    matrix, rhs = spd()
    bad_rhs = rhs.clone()
    bad_rhs[3] = bad
    solution = solver(Counted(matrix), bad_rhs)
    assert solution.status is parl.Status.NON_FINITE_RHS
    assert solution.value.isnan().all()
    assert solution.residuals[-1].isnan()
    solution = solver(Counted(torch.full_like(matrix, bad)), rhs)
    assert solution.status is parl.Status.NON_FINITE_OPERATOR
    assert solution.value.isnan().all()


@pytest.mark.parametrize("name", ITERATIVE)
def test_a_nan_in_the_start_or_in_a_later_product_is_named(name):
    matrix, rhs = spd()
    x0 = torch.zeros_like(rhs)
    x0[0] = float("nan")
    solution = SOLVERS[name](1e-10, 200)(Counted(matrix), rhs, x0)
    assert solution.status is parl.Status.NON_FINITE_START
    assert solution.value.isnan().all()

    good = Counted(matrix)
    after = 14  # beyond the products that step size or sketch take
    solution = SOLVERS[name](1e-12, 200)(lambda v: good(v) * (float("nan") if good.products > after else 1.0), rhs)
    assert solution.status is parl.Status.NON_FINITE_OPERATOR
    assert solution.value.isnan().all()
    assert good.products <= after + 2  # it ended at the NaN


def test_an_inconsistent_system_is_not_called_solved(solver):
    solution = solver(Counted(torch.zeros(3, 3, dtype=F64)), torch.ones(3, dtype=F64))
    assert not solution.status.ok
    assert float(solution.residuals[-1]) == pytest.approx(1.0)
    assert torch.isfinite(solution.value).all()


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e19, 1e30])
def test_the_scale_of_the_right_hand_side_does_not_matter(solver, size):
    diagonal = torch.tensor([1.0, 2.0, 3.0])
    if not isinstance(solver, parl.Dense):
        solver.__init__(rtol=1e-5)
    solution = solver(Counted(torch.diag(diagonal)), torch.full((3,), size))
    assert solution.status is parl.Status.CONVERGED
    torch.testing.assert_close(solution.value / size, 1 / diagonal, rtol=3e-5, atol=0)


@pytest.mark.parametrize("name", ITERATIVE)
def test_a_warm_start_at_the_solution_takes_no_iteration(name):
    matrix, rhs = spd()
    exact = torch.linalg.solve(matrix, rhs)
    make = SOLVERS[name]
    solution = make(1e-8, 200)(lambda v: matrix @ v, rhs, exact)
    assert (solution.iterations, solution.status) == (0, parl.Status.CONVERGED)
    torch.testing.assert_close(solution.value, exact)
    nearby = make(1e-8, 200)(lambda v: matrix @ v, rhs, exact + 1e-6)
    assert nearby.iterations < make(1e-8, 200)(lambda v: matrix @ v, rhs).iterations
    torch.testing.assert_close(nearby.value, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("name", "before"), [("CG", 0), ("MINRES", 0), ("Neumann", 10), ("NystromPCG", 6)])
def test_no_product_is_spent_on_zero(name, before):
    """Three iterations take three products and, but for Neumann, whose residual is the true one, one to confirm."""
    matrix, rhs = spd(condition=1e4)
    operator = Counted(matrix)
    solver = parl.Neumann(rtol=1e-10, max_iterations=3) if name == "Neumann" else SOLVERS[name](1e-10, 3)
    solution = solver(operator, rhs)
    assert solution.status is parl.Status.MAX_ITERATIONS
    assert solution.iterations == 3
    assert solution.residuals.shape == (4,)
    assert solution.products == operator.products == before + 3 + (name != "Neumann")
    assert all(vector.any() for vector in operator.vectors)


@pytest.mark.parametrize("name", SOLVERS)
def test_damping_is_read_from_the_operator_and_added_once(name):
    matrix, rhs = symmetric(torch.cat([torch.zeros(10), torch.logspace(0, 1, 10)]))
    operator = Counted(matrix, damping=0.3)
    solution = SOLVERS[name](1e-10, 200)(operator, rhs)
    once = torch.linalg.solve(matrix + 0.3 * torch.eye(20, dtype=F64), rhs)
    torch.testing.assert_close(solution.value, once, rtol=1e-8, atol=1e-9)
    assert solution.damping == 0.3


@pytest.mark.parametrize("name", ["CG", "MINRES", "NystromPCG"])
def test_the_reported_residual_is_the_true_one(name):
    matrix, rhs = spd(200, 1e3, dtype=torch.float32)
    solution = SOLVERS[name](1e-4, 2000)(lambda v: matrix @ v, rhs)
    true = (rhs - matrix @ solution.value).norm() / rhs.norm()
    assert solution.status is parl.Status.CONVERGED
    assert float(solution.residuals[-1]) <= 1e-4
    assert float(true) == pytest.approx(float(solution.residuals[-1]), rel=0.05)


@pytest.mark.parametrize("name", ["CG", "MINRES", "NystromPCG"])
@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_an_unreachable_tolerance_is_reported_not_claimed(name, condition):
    matrix, rhs = spd(100, condition, dtype=torch.float32)
    solution = SOLVERS[name](1e-7, 5000)(lambda v: matrix @ v, rhs)
    assert solution.status is parl.Status.STAGNATED
    assert "float64" in solution.status.message
    assert float(solution.residuals[-1]) < 1e-7 * condition
    assert solution.iterations < 1000


@pytest.mark.parametrize("name", ["CG", "MINRES"])
def test_checking_the_residual_disturbs_nothing_where_nothing_drifts(name, monkeypatch):
    matrix, rhs = spd(300, 1e3)
    checked = SOLVERS[name](1e-8, 600)(lambda v: matrix @ v, rhs)
    monkeypatch.setattr(drive, "CHECK_EVERY", 10**9)
    unchecked = SOLVERS[name](1e-8, 600)(lambda v: matrix @ v, rhs)
    assert checked.status is unchecked.status is parl.Status.CONVERGED
    assert checked.iterations == unchecked.iterations > 100
    assert torch.equal(checked.value, unchecked.value)
    assert checked.products == unchecked.products + (checked.iterations - 1) // 50


@pytest.mark.parametrize("name", ["CG", "MINRES"])
def test_a_drift_is_caught_long_before_the_end(name, monkeypatch):
    """One product off by far: the recurrence goes on as if nothing had been, the true residual says otherwise."""
    matrix, rhs = spd(300, 1e3)

    def solve(glitch_at):
        operator = Counted(matrix)
        return SOLVERS[name](1e-8, 2000)(lambda v: operator(v) * (3.0 if operator.products == glitch_at else 1.0), rhs)

    clean, caught = solve(None), solve(45)
    monkeypatch.setattr(drive, "CHECK_EVERY", 10**9)
    late = solve(45)
    assert clean.status is caught.status is parl.Status.CONVERGED
    assert float(caught.residuals[50]) > 1.2 * float(late.residuals[50])
    assert caught.iterations <= clean.iterations + 120 < late.iterations  # caught at the first check or the second


@pytest.mark.parametrize("kind", ["well conditioned", "singular", "indefinite"])
@pytest.mark.parametrize("name", ITERATIVE)
def test_away_from_the_cpu_the_host_waits_only_at_the_end(name, kind, monkeypatch):
    """The device loop, run on the CPU: the same result, and nothing is read before it."""
    matrix, rhs = symmetric(OPERATORS[kind])
    for limit in (60, 160):
        monkeypatch.setattr(drive, "reads_are_free", lambda device: True)
        on_cpu = SOLVERS[name](1e-9, limit)(lambda v: matrix @ v, rhs)
        monkeypatch.setattr(drive, "reads_are_free", lambda device: False)
        elsewhere = solved_unseen(SOLVERS[name](1e-9, limit), lambda v: matrix @ v, rhs)
        assert elsewhere.status is on_cpu.status
        assert elsewhere.iterations == on_cpu.iterations
        assert elsewhere.negative_curvature == on_cpu.negative_curvature
        assert elsewhere.residuals.shape == on_cpu.residuals.shape
        torch.testing.assert_close(elsewhere.value, on_cpu.value, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_bad_arguments_are_named(name):
    solver = SOLVERS[name](1e-5, 10)
    with pytest.raises(ValueError, match="rhs"):
        solver(lambda v: v, torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match="rhs"):
        solver(lambda v: v, torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="x0"):
        solver(lambda v: v, torch.ones(2), torch.ones(3))
    if name != "Woodbury":
        with pytest.raises(ValueError, match="operator"):
            solver(lambda v: v[:1], torch.ones(2))
    with pytest.raises(ValueError, match="rtol"):
        SOLVERS[name](0.0, 10)
    if name not in DIRECT:
        with pytest.raises(ValueError, match="max_iterations"):
            SOLVERS[name](1e-5, 0)
