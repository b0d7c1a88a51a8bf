"""The linear recurrence against a plain loop, in every kernel; its derivatives by finite differences."""

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from parl_core.ops import discounted_returns, linear_recurrence
from tests.ops.ragged import LENGTHS, cpu_backends, doubles, offsets_of, pieces, random_values

SHORT = [4, 0, 1, 6]


def loop(values, coefficients, lengths, reverse):
    """The definition, step by step, in Python floats."""
    out = []
    for x, c in pieces(lengths, values, coefficients):
        y = list(x)
        if reverse:
            for h in reversed(range(len(x) - 1)):
                y[h] = x[h] + c[h] * y[h + 1]
        else:
            for h in range(1, len(x)):
                y[h] = x[h] + c[h - 1] * y[h - 1]
        out += y
    return doubles(out)


@pytest.mark.parametrize(
    ("reverse", "expected"),
    [(False, [1.0, 2 + 10 * 1, 4 + 100 * 12, 5.0, 6 + 3 * 5]), (True, [1 + 10 * 402.0, 2 + 100 * 4.0, 4.0, 23.0, 6.0])],
)
def test_by_hand(kernel, reverse, expected):
    values, coefficients = torch.tensor([1.0, 2.0, 4.0, 5.0, 6.0]), torch.tensor([10.0, 100.0, 7.0, 3.0, 8.0])
    out = linear_recurrence(values, coefficients, torch.tensor([0, 3, 5]), reverse=reverse, backend=kernel)
    assert out.tolist() == expected


# float32: coefficients of size 1 let errors of 6e-8 grow no faster than the values, of which a thousand are summed.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_every_kernel_is_the_loop(kernel, lengths, reverse, dtype, tolerance):
    num = sum(lengths)
    values, coefficients = random_values(num, dtype=dtype), random_values(num, dtype=dtype, seed=1).tanh()
    out = linear_recurrence(values, coefficients, offsets_of(lengths), reverse=reverse, backend=kernel)
    assert out.dtype == dtype
    expected = loop(values, coefficients, lengths, reverse)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=6), reverse=st.booleans(), seed=st.integers(0, 2**31 - 1))
def test_any_lengths(lengths, reverse, seed):
    values, coefficients = random_values(2, sum(lengths), seed=seed).unbind(0)
    coefficients = coefficients.tanh()
    expected = loop(values, coefficients, lengths, reverse)
    for name in cpu_backends():
        out = linear_recurrence(values, coefficients, offsets_of(lengths), reverse=reverse, backend=name)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (5, 3), (2, 70)])
def test_rows_are_trajectories(kernel, shape, reverse):
    values, coefficients = random_values(2, *shape).unbind(0)
    coefficients = coefficients.tanh()
    out = linear_recurrence(values, coefficients, reverse=reverse, backend=kernel)
    expected = loop(values.reshape(-1), coefficients.reshape(-1), [shape[1]] * shape[0], reverse).reshape(shape)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("coefficient", [1e30, 1e-30])
def test_products_of_coefficients_may_leave_the_range(kernel, coefficient, reverse):
    """The values go 1, 1e30, 0, … or 1, 1e-30, 0, …: only where links are multiplied first there is an overflow."""
    values = torch.zeros(40)
    coefficients = torch.full((40,), coefficient)
    at = 30 if reverse else 10
    values[at], values[at - 2 if reverse else at + 2] = 1.0, 5.0
    coefficients[at - 2 if reverse else at + 1] = 0.0
    coefficients[at - 3 if reverse else at + 2] = 0.0
    out = linear_recurrence(values, coefficients, reverse=reverse, backend=kernel)
    expected = torch.zeros(40)
    step = -1 if reverse else 1
    expected[at], expected[at + step], expected[at + 2 * step] = 1.0, coefficient, 5.0
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [[3, 2], [40, 40]])
def test_the_last_coefficient_is_not_used(kernel, lengths, reverse):
    values, coefficients = torch.ones(sum(lengths)), torch.full((sum(lengths),), 0.5)
    offsets = offsets_of(lengths)
    expected = linear_recurrence(values, coefficients, offsets, reverse=reverse, backend=kernel)
    coefficients[offsets[1:] - 1] = float("nan")
    assert torch.equal(linear_recurrence(values, coefficients, offsets, reverse=reverse, backend=kernel), expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_nan_stays_in_its_trajectory(kernel, reverse):
    for place in (0, 1):
        inputs = [torch.ones(110), torch.full((110,), 0.5)]
        inputs[place][50] = float("nan")
        out = linear_recurrence(*inputs, torch.tensor([0, 40, 75, 110]), reverse=reverse, backend=kernel)
        step = torch.arange(110)
        reached = (step >= 50 + place) & (step < 75) if not reverse else (step >= 40) & (step <= 50)
        assert torch.equal(out.isnan(), reached)


def test_equal_coefficients_are_a_discount(backend):
    values, offsets = random_values(11), offsets_of(SHORT)
    out = linear_recurrence(values, torch.full_like(values, 0.8), offsets, reverse=True, backend=backend)
    torch.testing.assert_close(out, discounted_returns(values, 0.8, offsets), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given", [True, False], ids=["offsets", "rows"])
@pytest.mark.parametrize("reverse", [False, True])
class TestDerivatives:
    def inputs(self, given):
        shape, offsets = ((11,), offsets_of(SHORT)) if given else ((3, 4), None)
        return [random_values(*shape, seed=seed).requires_grad_() for seed in (0, 1)], offsets

    def recurrence(self, offsets, reverse, backend):
        return lambda x, c: linear_recurrence(x, c, offsets, reverse=reverse, backend=backend)

    def test_gradcheck_twice(self, backend, reverse, given):
        inputs, offsets = self.inputs(given)
        function = self.recurrence(offsets, reverse, backend)
        assert gradcheck(function, inputs, check_forward_ad=True)
        assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)

    def test_only_one_is_differentiated(self, reverse, given):
        inputs, offsets = self.inputs(given)
        function = self.recurrence(offsets, reverse, None)
        both = torch.autograd.grad(function(*inputs).sin().sum(), inputs)
        for k in (0, 1):
            alone = [x if j == k else x.detach() for j, x in enumerate(inputs)]
            (gradient,) = torch.autograd.grad(function(*alone).sin().sum(), alone[k])
            torch.testing.assert_close(gradient, both[k], rtol=1e-12, atol=1e-12)

    def test_third_order_against_the_reference_made_of_torch(self, reverse, given):
        """∂³ along a direction, by the op and by a loop that torch differentiates itself."""
        inputs, offsets = self.inputs(given)
        lengths = SHORT if given else [4, 4, 4]

        def plain(x, c):
            out = []
            pairs = zip(x.reshape(-1).split(lengths), c.reshape(-1).split(lengths), strict=True)
            for xs, cs in pairs:
                order = range(len(xs))[::-1] if reverse else range(len(xs))
                carry: Any = 0.0
                y = {}
                for h in order:
                    link = cs[h] if reverse else (cs[h - 1] if h else 0.0)
                    carry = y[h] = xs[h] + link * carry
                out += [y[h] for h in range(len(xs))]
            return torch.stack(out)

        def third(function):
            def along(f):
                return lambda x, c: sum(g.sum() for g in torch.func.grad(f, argnums=(0, 1))(x, c))

            return along(along(along(lambda x, c: function(x, c).sin().sum())))(*(x.detach() for x in inputs))

        expected = third(plain)
        torch.testing.assert_close(third(self.recurrence(offsets, reverse, None)), expected, rtol=1e-9, atol=1e-9)

    def test_vmap_over_either_and_both(self, backend, reverse, given):
        (x, c), offsets = self.inputs(given)
        function = self.recurrence(offsets, reverse, backend)
        xs, cs = torch.stack([x, 2 * x, -x], -1).detach(), torch.stack([c, -c, c / 2]).detach()
        both = torch.func.vmap(function, in_dims=(-1, 0))(xs, cs)
        of_x, of_c = torch.func.vmap(function, in_dims=(-1, None))(xs, c), torch.func.vmap(function, (None, 0))(x, cs)
        for k in range(3):
            for mapped, expected in (
                (both, function(xs[..., k], cs[k])),
                (of_x, function(xs[..., k], c)),
                (of_c, function(x, cs[k])),
            ):
                torch.testing.assert_close(mapped[k], expected, rtol=1e-12, atol=1e-12)

    def test_jvp_of_either_and_both(self, backend, reverse, given):
        (x, c), offsets = self.inputs(given)
        function = self.recurrence(offsets, reverse, backend)
        primals, tangents = (x.detach(), c.detach()), (torch.ones_like(c), x.detach().cos())
        _, both = cast(Any, torch.func.jvp(function, primals, tangents))
        _, of_x = cast(Any, torch.func.jvp(lambda x: function(x, c.detach()), primals[:1], tangents[:1]))
        with forward_ad.dual_level(), torch.no_grad():
            out = function(primals[0], forward_ad.make_dual(primals[1], tangents[1]))
            of_c = forward_ad.unpack_dual(out).tangent
        epsilon = 1e-6
        ahead = function(*(p + epsilon * t for p, t in zip(primals, tangents, strict=True)))
        behind = function(*(p - epsilon * t for p, t in zip(primals, tangents, strict=True)))
        torch.testing.assert_close(both, (ahead - behind) / (2 * epsilon), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(of_x + of_c, both, rtol=1e-12, atol=1e-12)

    def test_compiled_forward_and_backward(self, reverse, given):
        torch._dynamo.reset()
        inputs, offsets = self.inputs(given)
        function = self.recurrence(offsets, reverse, None)
        compiled = torch.compile(lambda x, c: function(x, c.sin()).square(), fullgraph=True, backend="aot_eager")
        expected = function(inputs[0], inputs[1].sin()).square()
        out = compiled(*inputs)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(
            torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

    def test_custom_op_is_well_formed(self, reverse, given):
        (x, c), offsets = self.inputs(given)
        torch.library.opcheck(torch.ops.parl_core.recurrence.default, (x, c, 0.0, offsets, reverse, None))


FOUR = torch.zeros(4)


@pytest.mark.parametrize(
    ("coefficients", "error", "message"),
    [
        (0.5, TypeError, "coefficients must be a Tensor, got float"),
        (FOUR.double(), TypeError, "coefficients must have the dtype of values, torch.float32, got torch.float64"),
        (FOUR[:3], ValueError, r"coefficients must have the shape of values, \(4,\), got \(3,\)"),
        (FOUR.to("meta"), ValueError, "coefficients must be on the device of values, cpu, got meta"),
    ],
)
def test_bad_arguments(coefficients, error, message):
    with pytest.raises(error, match=message):
        linear_recurrence(FOUR, coefficients)


def test_native_kernel_checks_its_tensors():
    native = pytest.importorskip("parl_core._native")
    with pytest.raises(TypeError, match="coefficients must have the dtype of values"):
        native.linear_recurrence(FOUR, FOUR.double(), None, torch.empty(4), False, 1)
    with pytest.raises(ValueError, match="coefficients must have as many elements as values, 4, got 3"):
        native.linear_recurrence(FOUR, FOUR[:3], None, torch.empty(4), False, 1)
    with pytest.raises(ValueError, match="coefficients must be contiguous"):
        native.linear_recurrence(FOUR, torch.zeros(8)[::2], None, torch.empty(4), False, 1)
    with pytest.raises(ValueError, match="out must have as many elements"):
        native.linear_recurrence(FOUR, FOUR, None, torch.empty(5), False, 1)
