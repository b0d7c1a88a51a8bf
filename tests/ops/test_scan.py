"""The scan against a plain double loop, for every backend, and its derivatives against closed forms."""

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from parl_core.ops import available_backends, discounted_returns, prefix_sum
from parl_core.ops.registry import BackendError

LENGTHS = {
    "one": [5],
    "ragged": [3, 1, 7, 2],
    "empty_among": [0, 4, 0, 0, 3, 0],
    "single_steps": [1, 1, 1, 1],
    "odd": [63, 1000, 1, 63],
    "no_steps": [0, 0],
    "no_trajectories": [],
}


@pytest.fixture(params=["reference", "numba", "cpp"])
def backend(request):
    if request.param not in available_backends():
        pytest.skip(f"backend {request.param} is unavailable")
    return request.param


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def random_values(num_steps, dtype=torch.float64, seed=0):
    return torch.randn(num_steps, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def loop(values: Tensor, lengths: list[int], discount: float, reverse: bool) -> Tensor:
    """The definition, term by term, in Python floats: y_h = Σ_k discount^|k−h| x_k over one side of h."""
    out, start = [], 0
    for length in lengths:
        x = values[start : start + length].tolist()
        for h in range(length):
            side = range(h, length) if reverse else range(h + 1)
            out.append(sum(discount ** abs(k - h) * x[k] for k in side))
        start += length
    return torch.tensor(out, dtype=torch.float64)


def matrix(lengths, discount):
    """The dense matrix of discounted_returns: upper triangular blocks."""
    n = sum(lengths)
    columns = [loop(e, lengths, discount, True) for e in torch.eye(n, dtype=torch.float64)]
    return torch.stack(columns, dim=1) if n else torch.zeros(0, 0, dtype=torch.float64)


def test_returns_by_hand(backend):
    rewards = torch.tensor([1.0, 2.0, 4.0, 10.0])
    offsets = torch.tensor([0, 3, 3, 4])
    expected = torch.tensor([1 + 1 + 1.0, 2 + 2.0, 4.0, 10.0])
    assert torch.equal(discounted_returns(rewards, 0.5, offsets, backend=backend), expected)


def test_prefix_sum_by_hand(backend):
    values = torch.tensor([1.0, 2.0, 4.0, 10.0, 5.0])
    offsets = torch.tensor([0, 3, 5])
    expected = torch.tensor([1.0, 3.0, 7.0, 10.0, 15.0])
    assert torch.equal(prefix_sum(values, offsets, backend=backend), expected)


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_discount_at_its_bounds(backend, discount):
    rewards = torch.tensor([1.0, 2.0, 3.0])
    expected = rewards if discount == 0.0 else torch.tensor([6.0, 5.0, 3.0])
    assert torch.equal(discounted_returns(rewards, discount, backend=backend), expected)


# float32: about 1000 additions, each with a relative error of 6e-8 of a sum of order 30.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-5)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_every_backend_is_the_loop(backend, lengths, dtype, tolerance):
    values, offsets = random_values(sum(lengths), dtype), offsets_of(lengths)
    for scanned, expected in [
        (discounted_returns(values, 0.97, offsets, backend=backend), loop(values, lengths, 0.97, True)),
        (prefix_sum(values, offsets, backend=backend), loop(values, lengths, 1.0, False)),
    ]:
        assert scanned.dtype == dtype
        torch.testing.assert_close(scanned.double(), expected, rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(lengths=st.lists(st.integers(0, 9), max_size=9), discount=st.floats(0, 1), seed=st.integers(0, 2**31 - 1))
def test_any_lengths(lengths, discount, seed):
    values, offsets = random_values(sum(lengths), seed=seed), offsets_of(lengths)
    expected = loop(values, lengths, discount, True)
    for name in available_backends():
        scanned = discounted_returns(values, discount, offsets, backend=name)
        torch.testing.assert_close(scanned, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    values = torch.full((2000,), 1.0, dtype=dtype)
    assert prefix_sum(values)[-1] == torch.tensor(2000.0).to(dtype)


def test_no_offsets_is_one_trajectory(backend):
    values = random_values(63)
    whole = torch.tensor([0, 63])
    assert torch.equal(prefix_sum(values, backend=backend), prefix_sum(values, whole, backend=backend))
    assert prefix_sum(values[:0], backend=backend).shape == (0,)


def test_strided_values_and_offsets(backend):
    values = random_values(24)[::2]
    offsets = torch.tensor([0, -1, 5, -1, 12])[::2]
    scanned = discounted_returns(values, 0.9, offsets, backend=backend)
    torch.testing.assert_close(scanned, loop(values, [5, 7], 0.9, True), rtol=1e-12, atol=1e-12)


def test_nan_stays_in_its_trajectory(backend):
    values = torch.tensor([1.0, float("nan"), 1.0, 2.0, 3.0])
    scanned = discounted_returns(values, 0.5, torch.tensor([0, 3, 5]), backend=backend)
    assert scanned.isnan().tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [[3, 0, 63, 1], [0, 7, 9] * 16500], ids=["serial", "threaded"])
@pytest.mark.parametrize("name", ["numba", "cpp"])
def test_kernels_write_every_element(name, lengths, reverse, dtype):
    if name not in available_backends():
        pytest.skip(f"backend {name} is unavailable")
    values, offsets = random_values(sum(lengths), dtype), offsets_of(lengths)
    out = torch.full_like(values, float("nan"))
    if name == "cpp":
        native = pytest.importorskip("parl_core._native")
        native.scan(values, offsets, out, 0.9, reverse, 2)
    else:
        kernels = pytest.importorskip("parl_core.kernels.numba_scan")
        kernels.scan(values.numpy(), offsets.numpy(), out.numpy(), 0.9, reverse, 2)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    expected = loop(values, lengths, 0.9, reverse)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


class TestDerivatives:
    lengths = (4, 0, 1, 6)
    discount = 0.8

    @pytest.fixture
    def offsets(self):
        return offsets_of(self.lengths)

    @pytest.fixture
    def values(self):
        return random_values(11).requires_grad_()

    def returns(self, backend, offsets):
        return lambda values: discounted_returns(values, self.discount, offsets, backend=backend)

    @property
    def matrix(self):
        return matrix(self.lengths, self.discount)

    @pytest.mark.parametrize("op", ["returns", "prefix_sum"])
    def test_gradcheck_twice(self, backend, values, offsets, op):
        def scan(values):
            if op == "returns":
                return self.returns(backend, offsets)(values)
            return prefix_sum(values, offsets, backend=backend)

        assert gradcheck(scan, (values,), check_forward_ad=True)
        # The scan is linear: its own second derivative is zero, so check that of a curved function of it.
        assert gradgradcheck(lambda v: scan(v).sin(), (values,), check_fwd_over_rev=True)

    def test_gradient_is_the_transpose(self, backend, values, offsets):
        weights = random_values(11, seed=1)
        (gradient,) = torch.autograd.grad(self.returns(backend, offsets)(values) @ weights, values)
        torch.testing.assert_close(gradient, self.matrix.T @ weights, rtol=1e-12, atol=1e-12)

    def test_second_order_is_right(self, backend, values, offsets):
        """Canary: the Hessian of Σ y³ with y = A x is 6 Aᵀ diag(y) A, neither absent nor truncated."""
        scan, dense = self.returns(backend, offsets), self.matrix
        expected = 6 * dense.T @ torch.diag(dense @ values.detach()) @ dense
        for hessian in (
            torch.autograd.functional.hessian(lambda v: (scan(v) ** 3).sum(), values),
            torch.func.hessian(lambda v: (scan(v) ** 3).sum())(values.detach()),
            torch.func.jacrev(torch.func.jacrev(lambda v: (scan(v) ** 3).sum()))(values.detach()),
        ):
            torch.testing.assert_close(hessian, expected, rtol=1e-10, atol=1e-10)

    def test_third_order(self, backend, values, offsets):
        """The directional third derivative of Σ y³ along d is 6 Σ (A d)³."""
        scan, direction = self.returns(backend, offsets), random_values(11, seed=2)

        def along(function):
            return lambda v: torch.func.grad(function)(v) @ direction

        third = along(along(along(lambda v: (scan(v) ** 3).sum())))(values.detach())
        expected = 6 * ((self.matrix @ direction) ** 3).sum()
        torch.testing.assert_close(third, expected, rtol=1e-10, atol=1e-10)

    def test_jvp_and_vjp(self, backend, values, offsets):
        scan, tangent = self.returns(backend, offsets), random_values(11, seed=3)
        primal, forward = cast(Any, torch.func.jvp(scan, (values.detach(),), (tangent,)))
        _, pullback = cast(Any, torch.func.vjp(scan, values.detach()))
        torch.testing.assert_close(primal, self.matrix @ values.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(forward, self.matrix @ tangent, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pullback(tangent)[0], self.matrix.T @ tangent, rtol=1e-12, atol=1e-12)

    def test_dual_numbers_without_reverse_mode(self, backend, values, offsets):
        """Where only a tangent is carried, it is not lost to the short cut for undifferentiated calls."""
        tangent = random_values(11, seed=4)
        with forward_ad.dual_level(), torch.no_grad():
            out = self.returns(backend, offsets)(forward_ad.make_dual(values.detach(), tangent))
            forward = forward_ad.unpack_dual(out).tangent
        torch.testing.assert_close(forward, self.matrix @ tangent, rtol=1e-12, atol=1e-12)

    def test_offsets_passed_through_a_transform(self, backend, values, offsets):
        def loss(values, offsets):
            return discounted_returns(values, self.discount, offsets, backend=backend).sum()

        gradient = torch.func.grad(loss)(values.detach(), offsets)
        torch.testing.assert_close(gradient, self.matrix.T.sum(1), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("given", [True, False], ids=["offsets", "no_offsets"])
    def test_vmap_nested_and_along_any_dimension(self, backend, offsets, given):
        batch = random_values(2 * 11 * 3).reshape(2, 11, 3)
        scan = self.returns(backend, offsets if given else None)
        mapped = torch.func.vmap(torch.func.vmap(scan, in_dims=1, out_dims=1))(batch)
        for i in range(2):
            for j in range(3):
                expected = scan(batch[i, :, j])
                torch.testing.assert_close(mapped[i, :, j], expected, rtol=1e-12, atol=1e-12)

    def test_per_sample_gradients(self, backend, offsets):
        batch = random_values(22).reshape(2, 11)
        scan = self.returns(backend, offsets)
        gradients = torch.func.vmap(torch.func.grad(lambda v: (scan(v) ** 3).sum()))(batch)
        expected = 3 * (batch @ self.matrix.T) ** 2 @ self.matrix
        torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-10)

    def test_vmap_over_offsets_is_refused(self, backend, values, offsets):
        with pytest.raises(ValueError, match="offsets must be the same for all of a vmap"):
            torch.func.vmap(lambda v, o: prefix_sum(v, o, backend=backend))(
                torch.stack([values, values]), torch.stack([offsets, offsets])
            )

    def test_compiled_forward_and_backward(self, backend, values, offsets):
        torch._dynamo.reset()
        scan = self.returns(backend, offsets)
        compiled = torch.compile(lambda v: scan(2 * v).square(), fullgraph=True, backend="aot_eager")
        dense = self.matrix
        out = compiled(values)
        torch.testing.assert_close(out, (2 * dense @ values).square(), rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad(out.sum(), values)
        expected = 8 * dense.T @ (dense @ values)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given", [True, False], ids=["offsets", "no_offsets"])
def test_custom_op_is_well_formed(given):
    values = random_values(5).requires_grad_()
    offsets = torch.tensor([0, 2, 5]) if given else None
    torch.library.opcheck(torch.ops.parl_core.scan.default, (values, offsets, 0.9, True, None))


FOUR = torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: prefix_sum(cast(Any, [1.0])), TypeError, "values must be a Tensor, got list"),
        (lambda: prefix_sum(torch.arange(4)), TypeError, "values must be of a floating-point dtype"),
        (lambda: prefix_sum(FOUR.reshape(2, 2)), ValueError, r"values must be of shape \(T,\), got \(2, 2\)"),
        (lambda: discounted_returns(FOUR[None], 0.9), ValueError, r"rewards must be of shape \(T,\)"),
        (lambda: discounted_returns(FOUR, 1.1), ValueError, r"discount must lie in \[0, 1\], got 1.1"),
        (lambda: discounted_returns(FOUR, float("nan")), ValueError, "discount must lie in"),
        (
            lambda: discounted_returns(FOUR, cast(Any, torch.tensor(0.9))),
            TypeError,
            "discount must be a number",
        ),
        (
            lambda: prefix_sum(FOUR, cast(Any, [0, 4])),
            TypeError,
            "offsets must be a Tensor or None, got list",
        ),
        (lambda: prefix_sum(FOUR, torch.tensor([0, 4]).int()), TypeError, "offsets must be of dtype"),
        (lambda: prefix_sum(FOUR, torch.tensor([[0, 4]])), ValueError, r"offsets must be of shape \(N\+1,\)"),
        (
            lambda: prefix_sum(FOUR, torch.tensor([]).long()),
            ValueError,
            r"offsets must be of shape \(N\+1,\)",
        ),
        (lambda: prefix_sum(FOUR, torch.tensor([1, 4])), ValueError, "offsets must start at 0, got 1"),
        (lambda: prefix_sum(FOUR, torch.tensor([0, 3])), ValueError, "end at the number of steps, 4, got 3"),
        (lambda: prefix_sum(FOUR, torch.tensor([0])), ValueError, "end at the number of steps, 4, got 0"),
        (
            lambda: prefix_sum(FOUR, torch.tensor([0, 3, 2, 4])),
            ValueError,
            r"must not decrease, got offsets\[2\] = 2 after offsets\[1\] = 3",
        ),
        (
            lambda: prefix_sum(FOUR, torch.tensor([0, 4], device="meta")),
            ValueError,
            "offsets must be on the device of values, cpu, got meta",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["numba", "cpp"])
def test_unsupported_dtype_falls_back_only_by_itself(name):
    if name not in available_backends():
        pytest.skip(f"backend {name} is unavailable")
    halves = torch.ones(3, dtype=torch.bfloat16)
    assert prefix_sum(halves).tolist() == [1, 2, 3]
    with pytest.raises(BackendError, match=f"'{name}' cannot be used: it computes in .*, not in torch.bf"):
        prefix_sum(halves, backend=name)


def test_native_module_checks_its_tensors():
    native = pytest.importorskip("parl_core._native")
    values, offsets = torch.ones(4), torch.tensor([0, 4])

    def scan(values=values, offsets=offsets, out=None):
        native.scan(values, offsets, torch.empty(4) if out is None else out, 0.9, False, 1)

    with pytest.raises(TypeError, match="values must be of dtype float32, float64 or int64, got torch"):
        scan(values=values.half())
    with pytest.raises(TypeError, match="values must be float32 or float64, got int64"):
        scan(values=values.long())
    with pytest.raises(TypeError, match="values must be on the CPU, got a tensor on meta"):
        scan(values=values.to("meta"))
    with pytest.raises(ValueError, match="values must have one dimension, got 2"):
        scan(values=values[None])
    with pytest.raises(ValueError, match="values must be contiguous"):
        scan(values=torch.ones(8)[::2])
    with pytest.raises(TypeError, match="offsets must be int64"):
        scan(offsets=offsets.double())
    with pytest.raises(ValueError, match="offsets must have at least one element"):
        scan(offsets=offsets[:0])
    with pytest.raises(TypeError, match="out must have the dtype of values"):
        scan(out=torch.empty(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="out must have as many elements as values, 4, got 3"):
        scan(out=torch.empty(3))
    with pytest.raises(AttributeError):
        scan(values=[1.0])
