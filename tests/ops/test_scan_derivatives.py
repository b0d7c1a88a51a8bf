"""Derivatives of discounted returns and prefix sums against closed forms: they are linear."""

from typing import Any, cast

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from parl_core.ops import discounted_returns, prefix_sum
from tests.ops.ragged import offsets_of, random_values
from tests.ops.test_scan import loop


def matrix(lengths, discount):
    """The dense matrix of discounted_returns: upper triangular blocks."""
    n = sum(lengths)
    columns = [loop(e, lengths, discount, True) for e in torch.eye(n, dtype=torch.float64)]
    return torch.stack(columns, dim=1) if n else torch.zeros(0, 0, dtype=torch.float64)


def test_derivatives_over_rows(backend):
    values = random_values(3, 5).requires_grad_()
    assert gradcheck(lambda v: discounted_returns(v, 0.8, backend=backend), (values,), check_forward_ad=True)
    assert gradgradcheck(lambda v: prefix_sum(v, backend=backend).sin(), (values,))
    batch = random_values(2, 3, 5)
    mapped = torch.func.vmap(lambda v: discounted_returns(v, 0.8, backend=backend), in_dims=1)(batch)
    for k in range(3):
        expected = discounted_returns(batch[:, k], 0.8, backend=backend)
        torch.testing.assert_close(mapped[k], expected, rtol=1e-12, atol=1e-12)


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
    op = torch.ops.parl_core.recurrence.default
    torch.library.opcheck(op, (values, None, 0.9, offsets, True, None))
