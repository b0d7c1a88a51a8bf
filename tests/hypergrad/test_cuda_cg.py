"""CG with CUDA kernels between the products against the loop in Python, both as they run where the host looks at nothing."""

from __future__ import annotations

import importlib.util
import math
import os
from unittest import mock

import pytest
import torch

import parl_core as parl
from parl_core.hypergrad.solvers import cuda_cg, drive, repeat
from parl_core.hypergrad.solvers.repeat import repeating
from parl_core.ops.accelerators import emulated
from tests.hypergrad.systems import F64, solved_unseen, spd, symmetric

F32 = torch.float32
Status = parl.Status
pytestmark = pytest.mark.usefixtures("poisoned_memory", "cuda_kernels")
DTYPES = pytest.mark.parametrize(
    ("dtype", "rtol", "tolerance"), [(F64, 1e-9, 1e-9), (F32, 1e-4, 1e-3)], ids=["float64", "float32"]
)


@pytest.fixture(autouse=True)
def unseen(monkeypatch):
    """Both run as where the host may look at nothing."""
    monkeypatch.setattr(drive, "reads_are_free", lambda device: False)
    with repeating(all_times):
        yield


def all_times(body, *, at_most, going):
    for _ in range(at_most):
        body()


def turns_and_steps(max_iterations):
    """As few turns as there can be of 16 iterations or fewer, and the iterations of each."""
    turns = math.ceil(max_iterations / 16)
    return turns, math.ceil(max_iterations / turns)


def both(operator, rhs, x0=None, *, max_iterations=200, operator_of_loop=None, **options):
    """The solution by the kernels, and that of the loop, which takes the true residual after as many iterations."""
    solver = parl.CG(max_iterations=max_iterations, **options)
    with parl.backend("cuda"):
        ours = solver(operator, rhs, x0)
    with parl.backend("reference"), mock.patch.object(drive, "CHECK_EVERY", turns_and_steps(max_iterations)[1]):
        return ours, solver(operator_of_loop or operator, rhs, x0)


def agree(ours, loop, head=6, tolerance=1e-9):
    """The same but for rounding, which moves the residuals of CG ever more: the first `head` of them are compared."""
    assert ours.status is loop.status
    assert abs(ours.iterations - loop.iterations) <= 1
    assert ours.residuals.shape == (ours.iterations + 1,)
    assert (ours.value.dtype, ours.residuals.dtype) == (loop.value.dtype, loop.residuals.dtype)
    assert (ours.damping, ours.negative_curvature) == (loop.damping, loop.negative_curvature)
    both_have = min(head, ours.iterations, loop.iterations)
    torch.testing.assert_close(
        ours.residuals[:both_have], loop.residuals[:both_have], rtol=tolerance, atol=0, equal_nan=True
    )


def diagonal_system(size, device, dtype=F64, condition=5.0):
    """v ↦ d v, and a right-hand side; of any size."""
    generator = torch.Generator().manual_seed(size)
    diagonal = 1.0 + (condition - 1.0) * torch.rand(size, generator=generator, dtype=F64)
    rhs = torch.randn(size, generator=generator, dtype=F64)
    return diagonal.to(device, dtype), rhs.to(device, dtype)


def emulation():
    """The module that draws the order of threads and blocks."""
    spec = importlib.util.spec_from_file_location("_emulated", os.environ["PARL_CUDA_EMULATED"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@DTYPES
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_against_the_loop_and_the_dense_solution(device, dtype, rtol, tolerance, warm):
    matrix, rhs = (tensor.to(device) for tensor in spd(20, 50.0, dtype=dtype))
    ours, loop = both(lambda v: matrix @ v, rhs, rhs / 3 if warm else None, rtol=rtol, max_iterations=50)
    agree(ours, loop, tolerance=tolerance)
    assert ours.status is Status.CONVERGED
    exact = torch.linalg.solve(matrix.double(), rhs.double())
    torch.testing.assert_close(ours.value.double(), exact, rtol=0, atol=10 * rtol * float(rhs.norm()))
    residual = (rhs - matrix @ ours.value).norm() / rhs.norm()
    assert float(ours.residuals[-1]) == pytest.approx(float(residual), rel=1e-2)


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 31, 33, 63, 1000, 4097, 8192, 8193, 9217])
def test_the_same_iterates_for_vectors_of_any_length(device, size, iterations):
    """In one block up to 8192, in many above; the first iterations, before rounding has grown."""
    diagonal, rhs = diagonal_system(size, device)
    ours, loop = both(lambda v: diagonal * v, rhs, rhs / 7, rtol=1e-14, max_iterations=iterations)
    torch.testing.assert_close(ours.value, loop.value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.residuals, loop.residuals, rtol=1e-12, atol=1e-13)
    agree(ours, loop, head=0)


def test_a_vector_that_blocks_go_over_more_than_once(device):
    """Longer than all threads of a launch together visit with four elements each."""
    diagonal, rhs = diagonal_system(528 * 1024 + 77, device, F32)
    ours, loop = both(lambda v: diagonal * v, rhs, rtol=1e-6, max_iterations=2)
    torch.testing.assert_close(ours.value, loop.value, rtol=1e-4, atol=1e-5)
    agree(ours, loop, head=2, tolerance=1e-5)


def test_no_element_at_all(device):
    empty = torch.empty(0, dtype=F64, device=device)
    ours, loop = both(lambda v: v, empty, max_iterations=3)
    agree(ours, loop)
    assert ours.status is Status.CONVERGED and ours.iterations == 0


@pytest.mark.parametrize("size", [300, 9000])
def test_results_are_the_same_bit_for_bit(device, size):
    """Whatever the order of blocks and threads."""
    diagonal, rhs = diagonal_system(size, device, F32, 30.0)
    found = []
    for seed in range(3):
        if emulated():
            emulation().seed(seed)
        found.append(both(lambda v: diagonal * v, rhs, rtol=1e-6, max_iterations=8)[0])
    for other in found[1:]:
        assert torch.equal(found[0].value, other.value) and torch.equal(found[0].residuals, other.residuals)


@pytest.mark.parametrize("iterations", [1, 5, 15, 16, 17, 20, 33])
def test_the_true_residual_is_taken_after_turns_of_one_length_and_at_the_end(device, iterations):
    matrix, rhs = (tensor.to(device) for tensor in spd(150, 1e7))
    ours, loop = both(lambda v: matrix @ v, rhs, rtol=1e-13, max_iterations=iterations)
    agree(ours, loop)
    assert (ours.status, ours.iterations) == (Status.MAX_ITERATIONS, iterations)
    turns, steps = turns_and_steps(iterations)
    assert iterations <= turns * steps < iterations + turns and steps <= 16
    assert ours.products == turns * (steps + 1)
    residual = (rhs - matrix @ ours.value).norm() / rhs.norm()
    assert float(ours.residuals[-1]) == pytest.approx(float(residual), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_tolerance_out_of_reach_ends_as_in_the_loop(device, seed):
    """The recurrence claims it, the true residual does not: restarts, until patience is at an end."""
    matrix, rhs = (tensor.to(device) for tensor in spd(20, 1e4, seed=seed))
    ours, loop = both(lambda v: matrix @ v, rhs, rtol=1e-19, max_iterations=1000)
    assert ours.status is loop.status is Status.STAGNATED
    assert 0.2 <= float(ours.residuals[-1] / loop.residuals[-1]) <= 5
    assert ours.residuals.isfinite().all()


@pytest.mark.parametrize("seed", range(3))
def test_float32_starts_again_where_the_recurrence_has_parted_from_the_truth(device, seed):
    matrix, rhs = (tensor.to(device) for tensor in spd(60, 3e3, seed=seed, dtype=F32))
    ours, loop = both(lambda v: matrix @ v, rhs, rtol=1e-6, max_iterations=500)
    assert ours.status is loop.status
    assert ours.status in (Status.CONVERGED, Status.STAGNATED)
    assert 0.2 <= float(ours.residuals[-1] / loop.residuals[-1]) <= 5
    assert ours.iterations > 50
    assert ours.residuals.isfinite().all()


@pytest.mark.parametrize("size", [60, 8200])
def test_a_drift_is_caught_at_the_next_look(device, size):
    """One product off by far: the recurrence goes on as if nothing had been, the true residual starts it again."""
    diagonal, rhs = diagonal_system(size, device, condition=300.0)

    def glitching():
        products = iter(range(1000))
        return lambda v: diagonal * v * (3.0 if next(products) == 5 else 1.0)

    ours, loop = both(glitching(), rhs, operator_of_loop=glitching(), rtol=1e-8, max_iterations=48)
    agree(ours, loop, head=24, tolerance=1e-6)
    assert float(ours.residuals[16]) > 2 * float(ours.residuals[15])
    assert float(ours.residuals[-1]) < 0.1 * float(ours.residuals[16])


@DTYPES
def test_indefinite(device, dtype, rtol, tolerance):
    eigenvalues = torch.cat([-torch.linspace(1.0, 5.0, 8, dtype=F64), torch.linspace(1.0, 10.0, 12, dtype=F64)])
    matrix, rhs = (tensor.to(device) for tensor in symmetric(eigenvalues, dtype=dtype))
    ours, loop = both(lambda v: matrix @ v, rhs, rtol=rtol, max_iterations=40)
    agree(ours, loop, head=4, tolerance=tolerance)
    assert ours.negative_curvature


@DTYPES
@pytest.mark.parametrize("size", [20, 8200])
def test_zero_right_hand_side_and_zero_operator(device, dtype, rtol, tolerance, size):
    diagonal, rhs = diagonal_system(size, device, dtype)
    for x0 in (None, torch.ones_like(rhs)):
        ours, loop = both(lambda v: diagonal * v, torch.zeros_like(rhs), x0, rtol=rtol, max_iterations=3)
        agree(ours, loop)
        assert ours.status is Status.CONVERGED and not ours.value.any() and ours.iterations == 0
    for x0 in (None, rhs / 2):
        ours, loop = both(lambda v: 0.0 * v, rhs, x0, rtol=rtol, max_iterations=3)
        agree(ours, loop)
        assert (ours.status, ours.iterations) == (Status.BREAKDOWN, 0)
        torch.testing.assert_close(ours.value, loop.value)


def test_a_breakdown_later_keeps_the_last_good_iterate(device):
    """A null space that the right-hand side is partly in: the recurrence runs into it."""
    broken = 0
    for seed in range(4):
        eigenvalues = torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0], dtype=F64)
        matrix, rhs = (tensor.to(device) for tensor in symmetric(eigenvalues, seed))
        ours, loop = both(lambda v, matrix=matrix: matrix @ v, rhs, rtol=1e-10, max_iterations=60)
        assert ours.status is loop.status and not ours.status.ok
        assert ours.value.isfinite().all()
        broken += ours.status is Status.BREAKDOWN
        residual = (rhs - matrix @ ours.value).norm() / rhs.norm()
        assert float(ours.residuals[-1]) == pytest.approx(float(residual), rel=1e-3)
    assert broken


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [20, 8200])
@DTYPES
def test_a_nan_stays_a_nan_and_is_named(device, dtype, rtol, tolerance, size, bad):
    diagonal, rhs = diagonal_system(size, device, dtype)
    spoilt = rhs.clone()
    spoilt[3] = bad
    for expected, (d, b, x0) in [
        (Status.NON_FINITE_RHS, (diagonal, spoilt, None)),
        (Status.NON_FINITE_START, (diagonal, rhs, spoilt)),
        (Status.NON_FINITE_OPERATOR, (spoilt, rhs, None)),
        (Status.NON_FINITE_OPERATOR, (spoilt, rhs, rhs)),
    ]:
        ours, loop = both(lambda v, d=d: d * v, b, x0, rtol=rtol, max_iterations=3)
        agree(ours, loop, tolerance=tolerance)
        assert ours.status is expected
        assert ours.value.isnan().all() and not ours.residuals[-1].isfinite()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_right_hand_sides_of_any_size(device, scale):
    diagonal, rhs = diagonal_system(30, device, F32)
    ours, loop = both(lambda v: diagonal * v, scale * rhs, rtol=1e-4, max_iterations=20)
    agree(ours, loop, head=5, tolerance=1e-3)
    torch.testing.assert_close(ours.value / scale, rhs / diagonal, rtol=1e-3, atol=1e-3)


def test_a_residual_that_is_rounding_ends_the_solve_whatever_the_patience(device, monkeypatch):
    for module in (drive, cuda_cg):
        monkeypatch.setattr(module, "PATIENCE", 10**6)
    matrix, rhs = (tensor.to(device) for tensor in spd(60, 300.0, dtype=F32))
    ours, loop = both(lambda v: matrix @ v, rhs, rtol=1e-6, max_iterations=320)
    assert ours.status is loop.status is Status.CONVERGED
    assert 1e-6 < float(ours.residuals[-1]) <= 1e-5
    assert max(ours.iterations, loop.iterations) < 160


def test_what_is_given_is_not_written_to_and_may_be_of_any_layout(device):
    diagonal, rhs = diagonal_system(30, device)
    strided = torch.stack([rhs, rhs], dim=1)[:, 0].requires_grad_()
    before, x0 = strided.detach().clone(), rhs / 3
    x0_before = x0.clone()
    ours, loop = both(lambda v: (diagonal * v).expand(2, -1).T[:, 0], strided, x0, max_iterations=30)
    agree(ours, loop)
    assert not ours.value.requires_grad
    assert torch.equal(strided, before) and torch.equal(x0, x0_before)


def test_the_products_may_be_the_vectors_themselves(device):
    """The identity returns its argument, which the next iteration writes to."""
    rhs = diagonal_system(30, device)[1]
    ours, loop = both(lambda v: v, rhs, rhs / 3, max_iterations=5)
    agree(ours, loop, head=1)
    torch.testing.assert_close(ours.value, rhs)


def test_nothing_is_read_before_the_outcome(device):
    matrix, rhs = (tensor.to(device) for tensor in spd(20, 50.0))
    with parl.backend("cuda"):
        solution = solved_unseen(parl.CG(max_iterations=60), lambda v: matrix @ v, rhs, rhs / 3)
    assert solution.status is Status.CONVERGED


@pytest.mark.parametrize("condition", [1.5, 30.0, 1e12])
def test_where_the_host_may_look_it_leaves_early(device, condition):
    matrix, rhs = (tensor.to(device) for tensor in spd(20, condition))
    whole, _ = both(lambda v: matrix @ v, rhs, rtol=1e-8, max_iterations=150)
    with repeating(repeat._repeat_now):
        early, _ = both(lambda v: matrix @ v, rhs, rtol=1e-8, max_iterations=150)
    assert (early.status, early.iterations) == (whole.status, whole.iterations)
    assert torch.equal(early.value, whole.value) and torch.equal(early.residuals, whole.residuals)
    assert whole.products == 10 * (15 + 1)
    assert early.products == (16 * -(-early.iterations // 15) if condition < 1e3 else whole.products)


def test_who_is_left_to_the_loop(device):
    diagonal, rhs = diagonal_system(10, device)
    with parl.backend("cuda"):
        block = parl.CG(max_iterations=30)(lambda v: diagonal * v, torch.stack([rhs, -rhs]))
        single = parl.CG(max_iterations=30)(lambda v: diagonal * v, rhs)
    torch.testing.assert_close(block.value[0], single.value)
    if emulated():
        assert "cuda" not in parl.CG(max_iterations=30)(lambda v: diagonal * v, rhs).status.message
        with parl.backend("cuda"), pytest.raises(parl.ops.BackendError, match="float16"):
            parl.CG()(lambda v: v, rhs.half())
