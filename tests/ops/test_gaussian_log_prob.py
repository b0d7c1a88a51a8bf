"""Log-densities of Gaussians in every backend: values, derivatives by all of torch's ways, and errors."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import distributions as td
from torch.autograd import gradcheck, gradgradcheck

from parl_core.ops import available_backends, gaussian_log_prob

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    if request.param not in available_backends():
        pytest.skip(f"backend {request.param} is unavailable")
    return request.param


def example(steps, size, device, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean, log_std, noise = torch.randn(3, steps, size, generator=generator, dtype=F64)
    return (noise * 0.5).tanh().to(device, dtype), mean.to(device, dtype), (0.3 * log_std).to(device, dtype)


def by_torch(actions, mean, log_std, squash):
    """From torch.distributions, which torch differentiates."""
    normal = td.Normal(mean, log_std.exp(), validate_args=False)
    if not squash:
        return normal.log_prob(actions).sum(-1)
    return (normal.log_prob(torch.atanh(actions)) - torch.log1p(-(actions**2))).sum(-1)


def same(ours, expected, tolerance=1e-11):
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values(backend, dtype, squash, device):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-2}[dtype]
    for steps, size in ((0, 3), (3, 1), (129, 6), (2, 1030)):
        actions, mean, log_std = example(steps, size, device, dtype)
        expected = by_torch(actions.double(), mean.double(), log_std.double(), squash).to(dtype)
        out = gaussian_log_prob(actions, mean, log_std, squash=squash, backend=backend)
        assert out.dtype == dtype
        scale = float(expected.abs().max()) if steps else 1.0
        torch.testing.assert_close(out, expected, rtol=0, atol=tolerance * max(scale, 1.0))


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.integers(0, 300), size=st.integers(1, 20), squash=st.booleans(), seed=st.integers(0, 99))
def test_any_shape_with_gradient_and_hessian_product(device, steps, size, squash, seed):
    pytest.importorskip("triton")
    arguments = example(steps, size, device, seed=seed)

    def products(function):
        actions, mean, log_std = arguments[0], *(x.clone().requires_grad_() for x in arguments[1:])
        first = torch.autograd.grad(function(actions, mean, log_std).sin().sum(), (mean, log_std), create_graph=True)
        inner = (first[0] * arguments[2]).sum() + (first[1] * arguments[1]).sum()
        return [*first, *torch.autograd.grad(inner, (mean, log_std))]

    ours = products(lambda a, m, s: gaussian_log_prob(a, m, s, squash=squash, backend="triton"))
    for out, expected in zip(ours, products(lambda a, m, s: by_torch(a, m, s, squash)), strict=True):
        scale = float(expected.detach().abs().max()) if steps else 1.0
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-11 * max(scale, 1.0))


@pytest.mark.parametrize("squash", [False, True])
def test_gradcheck_twice_in_all_three(backend, squash, device):
    inputs = [x.requires_grad_() for x in example(1, 2, device)]

    def function(actions, mean, log_std):
        return gaussian_log_prob(actions, mean, log_std, squash=squash, backend=backend)

    assert gradcheck(function, inputs, check_forward_ad=True)
    inputs[0].requires_grad_(False)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("squash", [False, True])
def test_transformations_of_torch_func(backend, squash, device):
    actions, mean, log_std = example(2, 3, device)
    u, v = mean.cos(), log_std.sin()
    jvp, grad, vmap = cast(Any, torch.func.jvp), torch.func.grad, torch.func.vmap

    def all_of(log_prob):
        def total(mean, log_std):
            return log_prob(actions, mean, log_std).sin().sum()

        def along(mean, log_std):
            return jvp(lambda m, s: log_prob(actions, m, s), (mean, log_std), (u, v))[1]

        def hessian_product(mean, log_std):
            first = grad(lambda m, s: total(m, s), argnums=(0, 1))
            return jvp(first, (mean, log_std), (u, v))[1]

        return [
            along(mean, log_std),
            jvp(lambda m: log_prob(actions, m, log_std), (mean,), (u,))[1],
            jvp(lambda s: log_prob(actions, mean, s), (log_std,), (v,))[1],
            *hessian_product(mean, log_std),
            *grad(lambda m, s: along(m, s).sin().sum(), argnums=(0, 1))(mean, log_std),
            *grad(lambda m, s: sum(x.sum() for x in hessian_product(m, s)), argnums=(0, 1))(
                mean, log_std
            ),  # third order
            vmap(log_prob, in_dims=(None, 0, None))(actions, torch.stack([mean, u]), log_std),
            vmap(grad(lambda s: total(mean, s)), in_dims=1)(torch.stack([log_std, v], 1)),
            vmap(lambda a, m, s: log_prob(a, m, s))(actions, mean, log_std),  # a step each
        ]

    ours = all_of(lambda a, m, s: gaussian_log_prob(a, m, s, squash=squash, backend=backend))
    for out, expected in zip(ours, all_of(lambda a, m, s: by_torch(a, m, s, squash)), strict=True):
        same(out, expected)


def test_one_log_std_for_all_steps(backend, device):
    actions, mean, log_std = example(5, 3, device)
    shared = log_std[0].clone().requires_grad_()
    out = gaussian_log_prob(actions, mean, shared, squash=True, backend=backend)
    expected = by_torch(actions, mean, shared.expand_as(mean), True)
    same(out, expected)
    same(torch.autograd.grad(out.sin().sum(), shared)[0], torch.autograd.grad(expected.sin().sum(), shared)[0])


def test_rows_may_be_apart(backend, device):
    actions, mean, log_std = example(40, 3, device)
    both = torch.cat((mean, log_std), 1)
    out = gaussian_log_prob(actions.T.contiguous().T, *both.chunk(2, 1), backend=backend)
    same(out, by_torch(actions, mean, log_std, False))


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_squashed_actions_on_the_boundary_and_near_zero(backend, dtype, device):
    """On the boundary they are moved inside by one rounding unit; near zero atanh keeps its digits."""
    inside = 1.0 - torch.finfo(dtype).eps
    actions = torch.tensor([[1.0], [-1.0], [inside], [1e-6], [0.0]], dtype=dtype, device=device)
    mean, log_std = torch.zeros_like(actions), torch.full_like(actions, -14.0)
    out = gaussian_log_prob(actions, mean + 1e-6, log_std, squash=True, backend=backend).double().cpu()
    expected = []
    for a in actions.double().cpu().clamp(-inside, inside).flatten().tolist():
        z = (math.atanh(a) - float(mean.new_tensor(1e-6))) * math.exp(14.0)
        expected.append(-0.5 * z * z - 0.5 * math.log(2 * math.pi) + 14.0 - math.log1p(-a * a))
    torch.testing.assert_close(
        out, torch.tensor(expected, dtype=F64), rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-4
    )


def test_nan_stays_in_its_step(backend, device):
    for place in range(3):
        arguments = example(3, 2, device)
        arguments[place][1, 1] = torch.nan
        out = gaussian_log_prob(*arguments, squash=True, backend=backend)
        assert out.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("squash", [False, True])
def test_compiled(backend, squash, device):
    torch._dynamo.reset()
    actions, mean, log_std = example(3, 2, device)
    mean.requires_grad_(), log_std.requires_grad_()

    def function(mean, log_std):
        return gaussian_log_prob(actions, mean, log_std, squash=squash, backend=backend).square()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    out, expected = compiled(mean, log_std), function(mean, log_std)
    same(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out.sum(), (mean, log_std)),
        torch.autograd.grad(expected.sum(), (mean, log_std)),
        strict=True,
    ):
        same(ours, theirs)


def test_nodes_are_well_formed(device):
    actions, mean, log_std = example(3, 2, device)
    mean.requires_grad_(), log_std.requires_grad_()
    weights = torch.ones(3, dtype=F64, device=device, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    ops = torch.ops.parl_core
    torch.library.opcheck(ops.gaussian_log_prob.default, (actions, mean, log_std, True, None), test_utils=tests)
    arguments = (actions, mean, log_std, weights, True, None)
    torch.library.opcheck(ops.gaussian_log_prob_gradient.default, arguments, test_utils=tests)


@pytest.mark.parametrize("of_actions", [torch.float32, torch.bfloat16])
def test_mixed_dtypes_are_promoted_first(backend, of_actions, device):
    """As under autocast, whose means are of half precision; the boundary of squashed actions is that of single, too."""
    actions, mean, log_std = example(40, 3, device)
    actions = (8.0 * actions).clamp(-1.0, 1.0).to(of_actions)
    mean, log_std = mean.to(torch.bfloat16), log_std.float()
    out = gaussian_log_prob(actions, mean, log_std, squash=True, backend=backend)
    alike = gaussian_log_prob(actions.float(), mean.float(), log_std, squash=True, backend="reference")
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, alike, rtol=1e-5, atol=1e-4)


def test_bad_types():
    with pytest.raises(TypeError, match="mean must be a Tensor, got list"):
        gaussian_log_prob(torch.zeros(5, 2), cast(Any, [[0.0]]), torch.zeros(2))
    with pytest.raises(TypeError, match="actions must be of a floating-point dtype, got"):
        gaussian_log_prob(torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="log_std must be on the device of mean, cpu, got meta"):
        gaussian_log_prob(torch.zeros(5, 2), torch.zeros(5, 2), torch.zeros(2, device="meta"))


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"actions must have shape \(T, da\) = \(5, 2\), got \(5, 1\)"):
        gaussian_log_prob(torch.zeros(5, 1), torch.zeros(5, 2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"log_std must have shape \(T, da\) = \(5, 2\) or \(da,\), got \(5,\)"):
        gaussian_log_prob(torch.zeros(5, 2), torch.zeros(5, 2), torch.zeros(5))
