"""The exact solve in the space of the rows, against dense oracles in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import parl_core as parl
from tests.hypergrad.systems import F64


class LowRank:
    """v ↦ Rᵀ (c ⊙ R v) + damping·v, counting its products."""

    def __init__(self, rows, weights, damping=0.0):
        self.rows, self.weights, self.damping = rows, weights, damping
        self.products = 0

    def __call__(self, vector):
        self.products += 1
        return self.rows.T @ (self.weights * (self.rows @ vector)) + self.damping * vector

    def outer_products(self):
        return parl.OuterProducts(self.rows, self.weights, cost=7.0)

    @property
    def matrix(self):
        rows = self.rows.to(F64)
        return rows.T @ (self.weights.to(F64)[:, None] * rows) + self.damping * torch.eye(rows.shape[1], dtype=F64)


def random(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


SHAPES = [(0, 5), (1, 5), (6, 40), (40, 40), (90, 12), (12, 1)]


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("signs", ["positive", "negative", "mixed"])
@pytest.mark.parametrize(("number", "size"), SHAPES)
def test_it_is_exact_for_every_shape_and_sign(number, size, signs, dtype):
    weights = random(number, seed=1, dtype=dtype)
    if signs != "mixed":
        weights = weights.abs() * (1 if signs == "positive" else -1)
    operator = LowRank(random(number, size, dtype=dtype), weights, damping=0.3)
    rhs = random(3, size, seed=2, dtype=dtype)
    solution = parl.Woodbury(rtol=1e-10 if dtype is F64 else 1e-4)(operator, rhs)
    exact = torch.linalg.solve(operator.matrix, rhs.to(F64).T).T
    assert solution.status is parl.Status.CONVERGED
    assert solution.value.dtype == dtype
    tolerance = 1e-9 if dtype is F64 else 2e-3
    assert float((solution.value.to(F64) - exact).norm() / exact.norm()) < tolerance
    assert solution.negative_curvature == bool((torch.linalg.eigvalsh(operator.matrix) < 0).any())
    assert solution.products == operator.products == 3 * (1 + solution.iterations)


@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.5])
def test_rows_that_are_zero_or_there_twice_do_no_harm(damping):
    rows = random(5, 30)
    rows = torch.cat([rows, rows[:3], torch.zeros(2, 30, dtype=F64), 2 * rows[1:2]])
    operator = LowRank(rows, torch.linspace(0.5, 2.0, 11, dtype=F64), damping)
    rhs = rows.T @ random(11, seed=3)  # consistent without damping too
    solution = parl.Woodbury(rtol=1e-9)(operator, rhs)
    exact = torch.linalg.pinv(operator.matrix, rtol=1e-12, hermitian=True) @ rhs
    assert solution.status is parl.Status.CONVERGED
    torch.testing.assert_close(solution.value, exact, rtol=1e-7, atol=1e-7)
    assert not solution.negative_curvature


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("number", "size"), [(6, 40), (60, 40)])
def test_without_damping_it_is_the_pseudo_inverse_and_says_what_is_inconsistent(number, size, dtype):
    rows = random(6, size, dtype=dtype).repeat(number // 6, 1)
    operator = LowRank(rows, torch.ones(number, dtype=dtype))
    rhs = torch.stack([rows[:6].T @ random(6, seed=1, dtype=dtype), random(size, seed=2, dtype=dtype)])
    pseudo_inverse = torch.linalg.pinv(operator.matrix, rtol=1e-6, hermitian=True)
    exact = rhs.to(F64) @ pseudo_inverse
    consistent = parl.Woodbury()(operator, rhs[0])
    assert consistent.status is parl.Status.CONVERGED
    both = parl.Woodbury()(operator, rhs)
    assert both.status is parl.Status.INCONSISTENT
    tolerance = 1e-9 if dtype is F64 else 1e-4
    assert float((both.value.to(F64) - exact).norm(dim=-1).max() / exact.norm()) < tolerance
    smallest = (rhs[1].to(F64) - operator.matrix @ exact[1]).norm() / rhs[1].to(F64).norm()
    assert float(both.residuals[-1, 1]) == pytest.approx(float(smallest), rel=1e-3)
    assert both.iterations == 0  # nothing to refine


@pytest.mark.parametrize("damping", [1e-4, 1e-8, 1e-12, 1e-30])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_a_tiny_damping_does_not_blow_up_the_rounding_of_a_consistent_right_hand_side(damping, dtype):
    rows = torch.logspace(-1, 1, 8, dtype=F64)[:, None].to(dtype) * random(8, 50, dtype=dtype)
    operator = LowRank(rows, torch.ones(8, dtype=dtype), damping)
    rhs = rows.T @ random(8, seed=1, dtype=dtype)
    solution = parl.Woodbury()(operator, rhs)
    limit = torch.linalg.pinv(LowRank(rows, torch.ones(8)).matrix, rtol=1e-9, hermitian=True) @ rhs.to(F64)
    assert solution.status is parl.Status.CONVERGED
    # Off the limit of no damping by damping / (smallest eigenvalue of 0.3), and by rounding × condition 3e4.
    bound = damping / 0.1 + 3e5 * torch.finfo(dtype).eps
    assert float((solution.value.to(F64) - limit).norm() / limit.norm()) < bound


def test_a_damping_too_small_for_the_dtype_is_not_called_solved():
    operator = LowRank(random(8, 50, dtype=torch.float32), torch.ones(8), damping=1e-9)
    solution = parl.Woodbury()(operator, random(50, seed=1, dtype=torch.float32))
    assert solution.status is parl.Status.STAGNATED
    assert float(solution.residuals[-1]) > 1e-5
    wide = LowRank(operator.rows.double(), operator.weights.double(), damping=1e-9)
    assert parl.Woodbury()(wide, random(50, seed=1)).status is parl.Status.CONVERGED


def test_rows_a_little_off_are_made_up_for_by_refinement():
    """The operator is not quite what its rows say: every step with the same factors gains a constant factor."""
    operator = LowRank(random(10, 60), torch.ones(10, dtype=F64), damping=1.0)
    rows = operator.rows + 1e-3 * random(10, 60, seed=1)
    operator.outer_products = lambda: parl.OuterProducts(rows, operator.weights, cost=0.0)
    rhs = random(60, seed=2)
    solution = parl.Woodbury(rtol=1e-5)(operator, rhs)
    assert solution.status is parl.Status.CONVERGED
    assert 1 <= solution.iterations <= 2
    assert solution.residuals.shape == (solution.iterations + 1,)
    assert (solution.residuals.diff() < 0).all()
    assert solution.products == operator.products == 1 + solution.iterations
    true = (rhs - operator.matrix @ solution.value).norm() / rhs.norm()
    assert float(solution.residuals[-1]) == pytest.approx(float(true), rel=1e-6)


def test_rows_of_another_operator_are_found_out():
    operator = LowRank(random(10, 60), torch.ones(10, dtype=F64), damping=1.0)
    operator.outer_products = lambda: parl.OuterProducts(random(10, 60, seed=9), 1e-3 * operator.weights, cost=0.0)
    rhs = random(60, seed=2)
    solution = parl.Woodbury()(operator, rhs)
    assert solution.status is parl.Status.STAGNATED
    true = (rhs - operator.matrix @ solution.value).norm() / rhs.norm()
    assert float(solution.residuals[-1]) == pytest.approx(float(true), rel=1e-6)
    assert (solution.residuals.diff() <= 0).all()  # a refinement that makes it worse is not taken


def test_negative_curvature_is_the_inertia():
    """One direction of −2 under dampings on either side of it, the right-hand side orthogonal to it."""
    rows = torch.eye(6, dtype=F64)[:3]
    rhs = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=F64)
    for damping, negative in [(0.0, True), (1.9, True), (2.1, False)]:
        operator = LowRank(rows, torch.tensor([-2.0, 1.0, 3.0], dtype=F64), damping)
        assert parl.Woodbury()(operator, rhs).negative_curvature == negative


def test_an_eigenvalue_that_the_damping_cancels_is_singular():
    operator = LowRank(torch.eye(6, dtype=F64)[:2], torch.tensor([-2.0, 1.0], dtype=F64), damping=2.0)
    solution = parl.Woodbury()(operator, torch.ones(6, dtype=F64))
    assert solution.status is parl.Status.INCONSISTENT
    torch.testing.assert_close(solution.value, torch.tensor([0.0, 1 / 3, 0.5, 0.5, 0.5, 0.5], dtype=F64))
    assert not solution.negative_curvature


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    number=st.integers(0, 12),
    size=st.integers(1, 12),
    damping=st.sampled_from([0.0, 1e-6, 1e-2, 3.0]),
    rank=st.integers(0, 12),
    seed=st.integers(0, 10**6),
)
def test_it_agrees_with_the_dense_oracle(number, size, damping, rank, seed):
    rows = random(number, rank, seed=seed) @ random(rank, size, seed=seed + 1)
    operator = LowRank(rows, random(number, seed=seed + 2), damping)
    spectrum = torch.linalg.eigvalsh(operator.matrix).abs()
    if bool(((spectrum > 1e-13 * spectrum.max()) & (spectrum < 1e-7 * spectrum.max())).any()):
        return  # whether such an eigenvalue counts is for rounding to decide
    rhs = operator.matrix @ random(size, seed=seed + 3)
    woodbury, dense = parl.Woodbury(rtol=1e-6)(operator, rhs), parl.Dense()(operator, rhs)
    assert woodbury.status is parl.Status.CONVERGED
    torch.testing.assert_close(woodbury.value, dense.value, rtol=1e-5, atol=1e-5 * float(1 + dense.value.norm()))
    assert woodbury.negative_curvature == dense.negative_curvature


def test_a_nan_in_the_rows_or_in_the_product_is_named():
    operator = LowRank(random(3, 10), torch.ones(3, dtype=F64), damping=1.0)
    rhs = random(2, 10, seed=1)
    for name in ("rows", "weights"):
        broken = LowRank(operator.rows.clone(), operator.weights.clone(), 1.0)
        getattr(broken, name).view(-1)[2] = float("nan")
        solution = parl.Woodbury()(broken, rhs)
        assert solution.status is parl.Status.NON_FINITE_OPERATOR
        assert solution.value.isnan().all()
        assert solution.residuals.shape == (1, 2)
    rows, weights = operator.rows, operator.weights

    class Lies:
        damping = 1.0

        def outer_products(self):
            return parl.OuterProducts(rows, weights, cost=0.0)

        def __call__(self, vector):
            return vector * float("nan")

    assert parl.Woodbury()(Lies(), rhs).status is parl.Status.NON_FINITE_OPERATOR


def test_the_cost_is_that_of_the_rows_and_of_the_products():
    operator = LowRank(random(3, 10), torch.ones(3, dtype=F64), damping=1.0)
    rhs = random(4, 10, seed=1)
    assert parl.Woodbury()(operator, rhs).cost is None
    operator.cost = 2.0
    assert parl.Woodbury()(operator, rhs).cost == 7.0 + 4 * 2.0


def test_an_operator_without_rows_is_refused_with_what_to_use_instead():
    with pytest.raises(TypeError, match=r"Fisher\(scores='trajectories'\).*CG and NystromPCG"):
        parl.Woodbury()(lambda v: v, torch.ones(3))


@pytest.mark.parametrize(
    ("rows", "weights", "named"),
    [
        (torch.ones(2, 4), torch.ones(2), "rows"),
        (torch.ones(3), torch.ones(1), "rows"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2), "rows"),
        (torch.ones(2, 3), torch.ones(3), "weights"),
        (torch.ones(2, 3), torch.ones(2, 1), "weights"),
    ],
)
def test_outer_products_of_the_wrong_form_are_named(rows, weights, named):
    with pytest.raises(ValueError, match=named):
        parl.Woodbury()(LowRank(rows, weights), torch.ones(3))


def test_rows_far_below_the_damping_do_not_spoil_the_others():
    """Their eigenvectors are mostly rounding, which must not be divided by the damping."""
    rows = torch.logspace(-7.5, 0, 12, dtype=F64)[:, None] * random(12, 50)
    operator = LowRank(rows, torch.ones(12, dtype=F64), damping=1e-4)
    assert parl.Woodbury(rtol=1e-11)(operator, random(50, seed=1)).status is parl.Status.CONVERGED


def test_an_eigenvalue_below_rounding_counts_where_the_damping_does():
    rows = torch.eye(4)[:2]
    operator = LowRank(rows, torch.tensor([1.0, 1e-8]), damping=1e-8)
    solution = parl.Woodbury()(operator, torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert solution.status is parl.Status.CONVERGED
    torch.testing.assert_close(solution.value, torch.tensor([0.0, 5e7, 0.0, 0.0]), rtol=1e-6, atol=1e-3)


def test_float32_ends_well_at_the_rounding_of_the_operator():
    """κ = 1000, as the automatic damping makes it: no float32 x has a residual within the default rtol."""
    for seed in range(5):
        rows = random(50, 200, seed=seed, dtype=torch.float32)
        operator = LowRank(rows, torch.ones(50), damping=1e-3 * float(torch.linalg.matrix_norm(rows, 2)) ** 2)
        rhs = random(200, seed=seed + 9, dtype=torch.float32)
        solution = parl.Woodbury()(operator, rhs)
        exact = torch.linalg.solve(operator.matrix, rhs.to(F64))
        assert solution.status is parl.Status.CONVERGED
        assert 1e-5 < float(solution.residuals[-1]) <= 1e-4
        assert float((solution.value.to(F64) - exact).norm() / exact.norm()) < 1e-6
