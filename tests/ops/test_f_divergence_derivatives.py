"""Derivatives of the estimates: under every transformation, against each other and against finite differences."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from parl_core.ops import f_divergence
from parl_core.ops.f_divergence_terms import jet
from tests.ops.f_divergences import (
    GENERATORS,
    MODES,
    NAMES,
    arguments,
    case_term,
    derivatives,
    expected_jet,
    log_ratios,
)


class TestDerivatives:
    """Under every transformation, against each other and against finite differences."""

    offsets = torch.tensor([0, 3, 3, 7, 12])

    @pytest.fixture
    def x(self):
        return log_ratios(12, seed=3, spread=0.4).requires_grad_()

    @pytest.fixture
    def weights(self):
        return torch.tensor([0.1, 0.5, 0.2, 0.7], dtype=torch.float64, requires_grad=True)

    @NAMES
    def test_finite_differences(self, name, x, weights):
        """Off policy: on it an estimate's gradient is not the derivative of its value, see the exact expectations."""
        if name == "total_variation":
            return
        for sampled_from in "qp":

            def estimate(x, weights, side=sampled_from):
                return f_divergence(x, offsets=self.offsets, weights=weights, sampled_from=side, **arguments(name))

            assert gradcheck(estimate, (x, weights), check_forward_ad=True)
            assert gradgradcheck(estimate, (x, weights))

    @NAMES
    def test_up_to_the_third_derivative(self, name):
        """Plain autograd, one after the other, of the pooled estimate."""
        for sampled_from, on_policy in MODES:
            x = log_ratios(6, seed=5).requires_grad_()
            expected = expected_jet(name, sampled_from, on_policy, x, count=3)
            found = f_divergence(x, sampled_from=sampled_from, on_policy=on_policy, **arguments(name))
            for part in expected[1:]:
                (gradient,) = torch.autograd.grad(found, x, create_graph=True, materialize_grads=True)
                torch.testing.assert_close(gradient, part / 6, rtol=1e-9, atol=1e-9)
                found = gradient.sum() + 0 * x.sum()

    @pytest.mark.parametrize("given", [None, offsets], ids=["pooled", "trajectories"])
    @pytest.mark.parametrize("on_policy", [False, True])
    def test_transforms_agree(self, given, on_policy, x):
        def estimate(x):
            return f_divergence(x, "jensen_shannon", given, on_policy=on_policy) * 3.0

        plain = estimate(x)
        (gradient,) = torch.autograd.grad(plain, x, create_graph=True)
        direction = log_ratios(12, seed=9)
        (product,) = torch.autograd.grad(gradient, x, direction)
        x = x.detach()
        close = {"rtol": 1e-12, "atol": 1e-14}
        found, pullback = torch.func.vjp(estimate, x)
        torch.testing.assert_close(found, plain.detach(), **close)
        torch.testing.assert_close(pullback(torch.ones_like(found))[0], gradient.detach(), **close)
        _, tangent = torch.func.jvp(estimate, (x,), (direction,))
        torch.testing.assert_close(tangent, gradient.detach() @ direction, **close)
        _, along = torch.func.jvp(torch.func.grad(estimate), (x,), (direction,))
        torch.testing.assert_close(along, product, **close)
        torch.testing.assert_close(torch.func.hessian(estimate)(x) @ direction, product, **close)
        with forward_ad.dual_level(), torch.no_grad():
            dual = estimate(forward_ad.make_dual(x, direction))
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent, **close)

    def test_vmap(self, x, weights):
        batch = log_ratios(24, seed=4, spread=0.3).reshape(12, 2)

        def estimate(x):
            return f_divergence(x, "alpha", self.offsets, alpha=1.5, weights=weights.detach())

        found = torch.func.vmap(estimate, in_dims=1)(batch)
        gradients = torch.func.vmap(torch.func.grad(estimate), in_dims=1)(batch)
        for i in range(2):
            row = batch[:, i].clone().requires_grad_()
            value = estimate(row)
            torch.testing.assert_close(found[i], value.detach())
            torch.testing.assert_close(gradients[i], torch.autograd.grad(value, row)[0])

    def test_a_batch_of_cotangents(self, x):
        value = f_divergence(x, "kl")
        (one,) = torch.autograd.grad(value, x, retain_graph=True)
        (both,) = torch.autograd.grad(value, x, torch.tensor([1.0, -2.0], dtype=x.dtype), is_grads_batched=True)
        torch.testing.assert_close(both, torch.stack([one, -2 * one]))

    @pytest.mark.parametrize("weighted", [True, False])
    @pytest.mark.parametrize("given", [None, offsets], ids=["pooled", "trajectories"])
    def test_compiled(self, given, weighted, x):
        torch._dynamo.reset()
        count = 12 if given is None else 4
        weights = torch.linspace(0.1, 1.0, count, dtype=torch.float64) if weighted else None

        def estimate(x):
            return f_divergence(2 * x, "squared_hellinger", given, weights=weights).square()

        compiled = torch.compile(estimate, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), estimate(x))
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(estimate(x), x)[0], rtol=1e-12, atol=1e-14
        )

    def test_the_gradient_of_the_forward_pass_carries_no_second_derivative(self, x):
        """Canary: a gradient saved in the forward pass would make the Hessian vanish silently."""
        (gradient,) = torch.autograd.grad(f_divergence(x, "chi_squared"), x, create_graph=True)
        assert gradient.requires_grad
        (second,) = torch.autograd.grad(gradient.sum(), x)
        t = x.detach().exp()
        torch.testing.assert_close(second, (4 * t * t - 2 * t) / 12)

    @pytest.mark.parametrize("scale", [1.0, -2.5])
    def test_a_graph_is_good_for_several_passes(self, x, scale):
        """And what a pass returns belongs to its caller, who may write into it."""
        value = scale * f_divergence(x, "kl", self.offsets)
        passes = [torch.autograd.grad(value, x, retain_graph=True)[0] for _ in range(3)]
        first = passes[0].clone()
        passes[0].zero_()
        again = torch.autograd.grad(value, x, retain_graph=True)[0]
        torch.testing.assert_close(first, again, rtol=1e-14, atol=0)
        torch.testing.assert_close(passes[1], again, rtol=1e-14, atol=0)
        torch.testing.assert_close(passes[2], again, rtol=1e-14, atol=0)
        value.backward()
        torch.testing.assert_close(x.grad, again, rtol=1e-14, atol=0)

    def test_self_normalized(self, x, weights):
        for sampled_from in "pq":

            def estimate(x, weights, side=sampled_from):
                return f_divergence(
                    x, "jeffreys", self.offsets, weights=weights, sampled_from=side, self_normalized=True
                )

            assert gradcheck(estimate, (x, weights))
            assert gradgradcheck(estimate, (x, weights))


def test_self_normalized_knows_no_factor():
    """Densities known up to a factor give the estimate that the normalised ones would, by hand."""
    x = log_ratios(50)
    t = x.exp()
    expected = {"q": GENERATORS["chi_squared"](t / t.mean()).mean()}
    u = (-x).exp()
    u = u / u.mean()
    expected["p"] = (GENERATORS["chi_squared"](1 / u) * u).mean()
    for side, value in expected.items():
        for shift in (0.0, 5.0):
            found = f_divergence(x + shift, "chi_squared", sampled_from=side, self_normalized=True)
            assert found.item() == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [None, TestDerivatives.offsets], ids=["pooled", "trajectories"])
@pytest.mark.parametrize("self_normalized", [False, True])
def test_half_precision_is_rounded_at_the_end(dtype, given, self_normalized):
    """Values and derivatives of both orders, whichever way they take: half a rounding unit off for the same numbers."""
    x = log_ratios(12, seed=3, spread=0.4).to(dtype)
    weights = torch.linspace(0.1, 0.7, 12 if given is None else 4).to(dtype)
    direction = log_ratios(12, seed=9).to(dtype)

    def derivatives(*tensors):
        x, weights, direction = tensors

        def estimate(x, weights=weights):
            return f_divergence(x, "jeffreys", given, weights=weights, self_normalized=self_normalized)

        followed, held = x.clone().requires_grad_(), weights.clone().requires_grad_()
        alone = estimate(followed)
        both = estimate(followed, held)
        (gradient,) = torch.autograd.grad(alone, followed, create_graph=True)
        return [
            alone.detach(),
            both.detach(),
            *torch.autograd.grad(both, (followed, held)),
            gradient.detach(),
            *torch.autograd.grad(gradient, followed, direction, create_graph=True),
            *torch.func.jvp(estimate, (x,), (direction,)),
        ]

    exact = derivatives(x.double(), weights.double(), direction.double())
    for found, expected in zip(derivatives(x, weights, direction), exact, strict=True):
        assert found.dtype == dtype
        unit = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(found.double(), expected, rtol=1.01 * unit, atol=1e-6)


def test_reference_and_kernel_have_one_source_of_derivatives():
    """`jet` is differentiable, so that its derivatives check its own first and second."""
    x = log_ratios(20, seed=8)
    for name in GENERATORS:
        for on_policy in (False, True):
            term = case_term(name, "p", on_policy)
            _, first, second = jet(term, x)
            found = derivatives(lambda r, term=term: jet(term, r)[0], x)
            torch.testing.assert_close(found[1], first, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(found[2], second, rtol=1e-9, atol=1e-9)
