"""CG in compiled code against the loop in Python on the same operators, and who is given to it at all."""

from __future__ import annotations

import itertools
import signal

import pytest
import torch

import parl_core as parl
from parl_core.hypergrad.linearize import Linearization
from parl_core.hypergrad.solvers import Damped, drive, native_cg
from parl_core.hypergrad.solvers.native_cg import native_operator
from parl_core.models.policies import GaussianPolicy

native = pytest.importorskip("parl_core._native")
F64, F32 = torch.float64, torch.float32
WELL = parl.Fisher(1.0, damping=20.0)  # a condition of some ten
LENGTHS = (30, 0, 7, 1, 25)
Status = parl.Status


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def linear(dtype=F64, hidden=(9, 7), lengths=LENGTHS, obs_dim=3, act_dim=2) -> Linearization:
    torch.manual_seed(0)
    policy = GaussianPolicy(obs_dim, act_dim, hidden, log_std="state").to(dtype)
    total = sum(lengths)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    actions = torch.randn(total, act_dim, dtype=dtype)
    return parl.linearize(policy, parl.Trajectories(torch.randn(total, obs_dim, dtype=dtype), actions, offsets))


def operator_of(linearization, curvature, seed=1, reward_scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(linearization.trajectories.num_steps, generator=generator, dtype=F64)
    return curvature.operator(linearization, reward_scale * rewards.to(linearization.log_prob), 0.9)


def random_like(operator, dtype, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(operator.size, generator=generator, dtype=F64).to(dtype)


def both(operator, rhs, x0=None, **options):
    """The solution in compiled code, and that of the loop."""
    assert native_operator(operator, rhs) is not None
    ours = parl.CG(**options)(operator, rhs, x0)
    with parl.backend("reference"):
        assert native_operator(operator, rhs) is None
        return ours, parl.CG(**options)(operator, rhs, x0)


def agree(ours, loop, head=10, tolerance=1e-9):
    """The same but for rounding, which moves the residuals of CG ever more: the first `head` of them are compared."""
    assert ours.status is loop.status
    assert abs(ours.iterations - loop.iterations) <= 1
    assert ours.residuals.shape == (ours.iterations + 1,)
    assert (ours.value.dtype, ours.residuals.dtype) == (loop.value.dtype, loop.residuals.dtype)
    assert (ours.damping, ours.negative_curvature) == (loop.damping, loop.negative_curvature)
    if ours.iterations == loop.iterations:
        assert (ours.products, ours.cost) == (loop.products, loop.cost)
    both_have = min(head, ours.iterations, loop.iterations)
    torch.testing.assert_close(
        ours.residuals[:both_have], loop.residuals[:both_have], rtol=tolerance, atol=0, equal_nan=True
    )


DTYPES = pytest.mark.parametrize(
    ("dtype", "rtol", "tolerance"), [(F64, 1e-9, 1e-9), (F32, 1e-4, 1e-3)], ids=["float64", "float32"]
)


@DTYPES
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_well_conditioned(isa, dtype, rtol, tolerance, warm):
    """Against the loop, and against the dense solution."""
    operator = operator_of(linear(dtype), WELL)
    rhs = random_like(operator, dtype)
    x0 = rhs / 3 if warm else None
    ours, loop = both(operator, rhs, x0, rtol=rtol)
    agree(ours, loop, head=6, tolerance=tolerance)
    assert ours.status is Status.CONVERGED
    assert ours.products == ours.iterations + 1 + warm
    matrix = torch.stack([operator(row) for row in torch.eye(operator.size, dtype=dtype)]).to(F64)
    residual = (rhs.to(F64) - matrix @ ours.value.to(F64)).norm() / rhs.to(F64).norm()
    assert float(residual) <= 1.01 * rtol
    assert float(ours.residuals[-1]) == pytest.approx(float(residual), rel=1e-2)
    assert float(ours.residuals[0]) == pytest.approx(float((rhs - operator(x0)).norm() / rhs.norm()) if warm else 1.0)
    torch.testing.assert_close(
        ours.value.to(F64), torch.linalg.solve(matrix, rhs.to(F64)), rtol=0, atol=10 * rtol * float(rhs.norm())
    )


@DTYPES
@pytest.mark.parametrize("hidden", [(), (1,), (16,), (33, 5)], ids=str)
def test_any_number_of_parameters(isa, dtype, rtol, tolerance, hidden):
    linearization = linear(dtype, hidden, (5, 9), obs_dim=1, act_dim=1)
    operator = operator_of(linearization, WELL)
    ours, loop = both(operator, random_like(operator, dtype), rtol=rtol)
    agree(ours, loop, head=4, tolerance=tolerance)
    assert ours.status is Status.CONVERGED


def test_more_than_one_thread_has_work(isa, threads):
    """P of some 73 000; the second solve is the first one bit for bit."""
    linearization = linear(F64, (256, 256), (4, 4), obs_dim=24, act_dim=6)
    operator = operator_of(linearization, WELL)
    assert operator.size > 2**16
    rhs = random_like(operator, F64)
    ours, loop = both(operator, rhs, rhs / 5, rtol=1e-5)
    agree(ours, loop)
    torch.testing.assert_close(ours.value, loop.value, rtol=1e-4, atol=1e-4)
    again = parl.CG(rtol=1e-5)(operator, rhs, rhs / 5)
    assert torch.equal(ours.value, again.value) and torch.equal(ours.residuals, again.residuals)


@pytest.mark.parametrize("damping", [0.3, 0.03])
@pytest.mark.parametrize("rtol", [1e-5, 1e-7])
def test_float32_starts_again_where_the_recurrence_has_parted_from_the_truth(isa, damping, rtol):
    operator = operator_of(linear(F32), parl.Fisher(1.0, damping=damping))
    for seed in range(3):
        ours, loop = both(operator, random_like(operator, F32, seed), rtol=rtol, max_iterations=3000)
        assert ours.status is loop.status
        assert ours.status in (Status.CONVERGED, Status.STAGNATED)
        assert abs(ours.iterations - loop.iterations) <= 0.3 * loop.iterations
        assert ours.products >= ours.iterations + ours.iterations // 50
        assert 0.2 <= float(ours.residuals[-1] / loop.residuals[-1]) <= 5 or float(ours.residuals[-1]) <= rtol


@pytest.mark.parametrize("seed", range(4))
def test_a_tolerance_out_of_reach_ends_as_in_the_loop(isa, seed):
    """The recurrence claims it, the true residual does not: restarts, until patience is at an end."""
    operator = operator_of(linear(F64), parl.Fisher(1.0, damping=1e-4))
    ours, loop = both(operator, random_like(operator, F64, seed), rtol=1e-19, max_iterations=3000)
    assert ours.status is loop.status is Status.STAGNATED
    assert 0.3 <= float(ours.residuals[-1] / loop.residuals[-1]) <= 3
    assert ours.products > ours.iterations + 3


@pytest.mark.parametrize("iterations", [1, 2, 49, 50, 51, 100, 101])
def test_the_true_residual_is_taken_every_50_iterations_and_at_the_end(iterations):
    operator = operator_of(linear(F64, (30, 20)), parl.Fisher(1.0, damping=1e-6))
    ours, loop = both(operator, random_like(operator, F64), rtol=1e-13, max_iterations=iterations)
    agree(ours, loop)
    assert ours.status is Status.MAX_ITERATIONS
    assert ours.iterations == iterations
    assert ours.products == iterations + -(-iterations // 50)


@DTYPES
def test_indefinite(isa, dtype, rtol, tolerance):
    operator = operator_of(linear(dtype), parl.LogProbHessian())
    ours, loop = both(operator, random_like(operator, dtype), rtol=rtol, max_iterations=40)
    agree(ours, loop, head=6, tolerance=tolerance)
    assert ours.negative_curvature


def test_every_curvature_with_a_native_operator():
    linearization = linear()
    for curvature in (
        parl.ScoreHessian(damping=0.3),
        parl.ScoreHessian(baseline="mean", temperature=0.2, damping=30.0),
        parl.LogProbHessian(temperature=0.5, damping=20.0),
        parl.Fisher(0.5, damping=1e-2),
    ):
        operator = operator_of(linearization, curvature)
        agree(*both(operator, random_like(operator, F64), max_iterations=30), head=5)


def test_damping_is_that_of_the_operator_and_of_what_is_around_it():
    operator = operator_of(linear(), parl.Fisher(1.0, damping=0.2))
    damped = Damped(Damped(operator, 0.3), 0.5)
    assert native_operator(damped, random_like(operator, F64)).damping == 1.0
    ours, loop = both(damped, random_like(operator, F64), rtol=1e-10)
    agree(ours, loop)
    assert ours.damping == 1.0
    torch.testing.assert_close(ours.value, loop.value)
    assert not hasattr(Damped(lambda v: v, 0.1), "native")


@DTYPES
def test_zero_right_hand_side_and_zero_operator(dtype, rtol, tolerance):
    operator = operator_of(linear(dtype), WELL)
    zeros = torch.zeros(operator.size, dtype=dtype)
    for x0 in (None, torch.ones_like(zeros)):
        ours, loop = both(operator, zeros, x0, rtol=rtol)
        agree(ours, loop)
        assert ours.status is Status.CONVERGED and not ours.value.any() and ours.iterations == 0
    nothing = operator_of(linear(dtype), parl.LogProbHessian(), reward_scale=0.0)
    for x0 in (None, random_like(operator, dtype)):
        ours, loop = both(nothing, random_like(operator, dtype), x0, rtol=rtol)
        agree(ours, loop)
        assert ours.status is Status.BREAKDOWN
        assert (ours.iterations, ours.products) == (0, 2 + (x0 is not None))
        torch.testing.assert_close(ours.value, loop.value)


def test_a_breakdown_later_keeps_the_last_good_iterate():
    """A null space that the right-hand side is partly in: the recurrence runs into it."""
    linearization = linear(F64, (4,), (3,))
    operator = operator_of(linearization, parl.Fisher(1.0))
    broken = 0
    for seed in range(6):
        ours, loop = both(operator, random_like(operator, F64, seed), rtol=1e-10)
        assert ours.status is loop.status
        assert not ours.status.ok
        assert abs(ours.iterations - loop.iterations) <= 2
        assert ours.value.isfinite().all()
        broken += ours.status is Status.BREAKDOWN
        residual = torch.linalg.vector_norm(random_like(operator, F64, seed) - operator(ours.value))
        assert float(ours.residuals[-1]) == pytest.approx(
            float(residual / random_like(operator, F64, seed).norm()), rel=1e-3
        )
    assert broken


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@DTYPES
def test_a_nan_stays_a_nan_and_is_named(isa, dtype, rtol, tolerance, bad):
    operator = operator_of(linear(dtype), WELL)
    rhs = random_like(operator, dtype)
    spoilt = rhs.clone()
    spoilt[3] = bad
    for expected, arguments in [
        (Status.NON_FINITE_RHS, (operator, spoilt)),
        (Status.NON_FINITE_RHS, (operator, spoilt, rhs)),
        (Status.NON_FINITE_START, (operator, rhs, spoilt)),
        (Status.NON_FINITE_OPERATOR, (operator_of(linear(dtype), parl.LogProbHessian(), reward_scale=bad), rhs)),
        (Status.NON_FINITE_OPERATOR, (operator_of(linear(dtype), parl.LogProbHessian(), reward_scale=bad), rhs, rhs)),
    ]:
        ours, loop = both(*arguments, rtol=rtol)
        agree(ours, loop, tolerance=tolerance)
        assert ours.status is expected
        assert ours.value.isnan().all()
        assert ours.residuals[-1].isnan()


@pytest.mark.parametrize(
    ("scale", "used"), [(1e30, False), (1e10, False), (10.0, True)], ids=["overflow", "hopeless", "far"]
)
def test_a_hopeless_start_is_not_used(scale, used):
    operator = operator_of(linear(F32), WELL)
    rhs = random_like(operator, F32)
    ours, loop = both(operator, rhs, scale * rhs, rtol=1e-4)
    assert ours.status is loop.status is Status.CONVERGED
    torch.testing.assert_close(ours.residuals[:5], loop.residuals[:5], rtol=1e-3, atol=0)
    assert (float(ours.residuals[0]) == pytest.approx(1.0)) == (not used)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_right_hand_sides_of_any_size(scale):
    operator = operator_of(linear(F32), WELL)
    rhs = random_like(operator, F32)
    ours, loop = both(operator, scale * rhs, rtol=1e-4)
    agree(ours, loop, head=5, tolerance=1e-3)
    torch.testing.assert_close(ours.value / scale, parl.CG(rtol=1e-4)(operator, rhs).value, rtol=1e-3, atol=1e-3)


def test_what_is_given_is_not_written_to():
    operator = operator_of(linear(), WELL)
    rhs = random_like(operator, F64)
    x0, rhs_before = rhs / 3, rhs.clone()
    x0_before = x0.clone()
    parl.CG()(operator, rhs, x0)
    parl.CG()(operator, rhs)
    assert torch.equal(rhs, rhs_before) and torch.equal(x0, x0_before)


def test_layouts_and_graphs():
    operator = operator_of(linear(), WELL)
    strided = torch.randn(operator.size, 2, dtype=F64)[:, 0].requires_grad_()
    ours, loop = both(operator, strided, strided / 3)
    agree(ours, loop)
    assert not ours.value.requires_grad
    with torch.inference_mode():
        assert torch.equal(parl.CG()(operator, strided, strided / 3).value, ours.value)


def test_pcg_without_a_preconditioner_is_cg():
    operator = operator_of(linear(), parl.ScoreHessian(damping=30.0))
    assert operator.preconditioner() is None
    rhs = random_like(operator, F64)
    assert torch.equal(parl.PCG()(operator, rhs).value, parl.CG()(operator, rhs).value)


def test_who_is_left_to_the_loop():
    linearization = linear()
    operator = operator_of(linearization, WELL)
    rhs = random_like(operator, F64)
    assert native_operator(operator, rhs) is not None
    assert native_operator(operator, torch.stack([rhs, rhs])) is None
    assert native_operator(operator, rhs.float()) is None
    assert native_operator(operator, rhs[1:]) is None
    assert native_operator(operator, torch.empty_like(rhs, device="meta")) is None
    assert native_operator(lambda v: v, rhs) is None
    assert native_operator(operator_of(linearization, parl.Fisher(1.0, scores="steps")), rhs) is None
    with parl.backend("cpp"):
        assert native_operator(operator, rhs) is not None
    with parl.backend("reference"):
        assert native_operator(operator, rhs) is None
        plain = parl.linearize(linearization.policy.module.double(), linearization.trajectories)
    assert native_operator(operator_of(plain, WELL), rhs) is None
    block = parl.CG(rtol=1e-10)(operator, torch.stack([rhs, -rhs]))
    torch.testing.assert_close(block.value[0], parl.CG(rtol=1e-10)(operator, rhs).value)


def test_the_constants_are_those_of_the_loop(monkeypatch):
    for module in (drive, native_cg):
        monkeypatch.setattr(module, "CHECK_EVERY", 7)
        monkeypatch.setattr(module, "PATIENCE", 1)
    operator = operator_of(linear(F64, (30, 20)), parl.Fisher(1.0, damping=1e-6))
    ours, loop = both(operator, random_like(operator, F64), rtol=1e-13, max_iterations=29)
    agree(ours, loop)
    assert ours.products == 29 + 5


def test_a_residual_that_is_rounding_ends_the_solve_whatever_the_patience(monkeypatch):
    for module in (drive, native_cg):
        monkeypatch.setattr(module, "PATIENCE", 10**6)
    operator = operator_of(linear(F32), parl.Fisher(1.0, damping=0.3))
    above = 0
    for seed in range(3):
        ours, loop = both(operator, random_like(operator, F32, seed), rtol=2e-6, max_iterations=5000)
        assert ours.status is loop.status is Status.CONVERGED
        assert float(ours.residuals[-1]) <= 2e-5
        assert max(ours.iterations, loop.iterations) < 1000
        above += float(ours.residuals[-1]) > 2e-6
    assert above


class Interrupted(Exception):
    pass


def test_signals_are_heard_in_the_middle_of_a_solve():
    """By a handler that itself takes a product with the operator, which is whole afterwards."""
    operator = operator_of(linear(F64, (256, 256), (500, 500), obs_dim=24, act_dim=6), parl.Fisher(1.0, damping=1e-9))
    rhs = random_like(operator, F64)
    expected = operator(rhs)

    def interrupt(*_):
        assert torch.equal(operator(rhs), expected)
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Interrupted):
            parl.CG(rtol=1e-300, max_iterations=100_000)(operator, rhs)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert torch.equal(operator(rhs), expected)


def test_native_module_checks_its_arguments():
    operator = operator_of(linear(), parl.Fisher(1.0)).native()
    vector = torch.ones(operator.size, dtype=F64)

    def solve(**changes):
        arguments = {
            "operator": operator.curvature,
            "damping": 0.5,
            "rhs": vector / vector.norm(),
            "residual": vector / vector.norm(),
            "x": torch.zeros_like(vector),
            "rtol": 1e-3,
            "max_iterations": 10,
            "check_every": 50,
            "patience": 3,
            "num_threads": 1,
        }
        return native.conjugate_gradients(**{**arguments, **changes})

    solve()
    for error, name, changes in [
        (TypeError, "operator", {"operator": None}),
        (ValueError, "rhs", {"rhs": vector[1:]}),
        (TypeError, "rhs", {"rhs": vector.float()}),
        (TypeError, "rhs", {"rhs": vector.to("meta")}),
        (ValueError, "residual", {"residual": vector[None]}),
        (ValueError, "x", {"x": torch.zeros(2 * operator.size, dtype=F64)[::2]}),
        (ValueError, "x must not share memory with rhs", {"x": vector, "rhs": vector}),
        (ValueError, "x must not share memory with residual", {"x": vector, "residual": vector}),
        (ValueError, "rtol", {"rtol": float("nan")}),
        (ValueError, "max_iterations", {"max_iterations": 0}),
        (ValueError, "check_every", {"check_every": 0}),
        (ValueError, "patience", {"patience": 0}),
        (ValueError, "num_threads", {"num_threads": 0}),
    ]:
        with pytest.raises(error, match=name):
            solve(**changes)
