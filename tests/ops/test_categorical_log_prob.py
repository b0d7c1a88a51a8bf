"""Categorical log-probabilities in every backend: values, derivatives by all of torch's ways, and errors."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from parl_core.ops import available_backends, categorical_fisher, categorical_log_prob

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    if request.param not in available_backends():
        pytest.skip(f"backend {request.param} is unavailable")
    return request.param


@pytest.fixture
def inputs(device):
    generator = torch.Generator().manual_seed(0)
    logits, *tangents = torch.randn(4, 2, 3, generator=generator, dtype=F64).to(device)
    return logits, torch.tensor([1, 2], device=device), tangents


def by_torch(logits, actions):
    return F.log_softmax(logits, -1)[torch.arange(len(logits), device=logits.device), actions]


def fisher_by_torch(logits, tangent):
    """As the negative Hessian of any action's log-probability, differentiated by torch."""
    zeros = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    gradient = torch.func.grad(lambda x: by_torch(x, zeros).sum())
    return -cast(Any, torch.func.jvp(gradient, (logits,), (tangent,)))[1]


def same(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values(backend, dtype, device):
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for steps, vocabulary in ((0, 3), (3, 1), (63, 5), (2, 1000)):
        generator = torch.Generator().manual_seed(0)
        logits, tangent = torch.randn(2, steps, vocabulary, generator=generator, dtype=F64).to(device, dtype)
        actions = torch.randint(vocabulary, (steps,), generator=generator).to(device)
        expected = by_torch(logits.double(), actions).to(dtype)
        for index in (actions, actions.unsqueeze(1), actions.to(torch.int32)):
            out = categorical_log_prob(logits, index, backend=backend)
            torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        image = categorical_fisher(logits, tangent, backend=backend)
        expected = fisher_by_torch(logits.double(), tangent.double()).to(dtype)
        torch.testing.assert_close(image, expected, rtol=tolerance, atol=tolerance)


def test_gradcheck_twice(backend, device):
    logits = torch.tensor([[0.3, -1.0, 0.5]], dtype=F64, device=device, requires_grad=True)
    tangent = torch.tensor([[1.0, 0.2, -0.7]], dtype=F64, device=device, requires_grad=True)
    actions = torch.tensor([2], device=device)

    def log_prob(x):
        return categorical_log_prob(x, actions, backend=backend)

    def fisher(x, t):
        return categorical_fisher(x, t, backend=backend)

    assert gradcheck(log_prob, (logits,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(log_prob, (logits,), check_fwd_over_rev=True)
    assert gradcheck(fisher, (logits, tangent), check_forward_ad=True)


def test_derivatives_of_four_orders(backend, inputs):
    """Of a function of it, so that every order has a part in the cotangents too."""
    logits, actions, tangents = inputs

    def orders(log_prob):
        x = logits.clone().requires_grad_()
        found, current = [], log_prob(x).sin().sum()
        for direction in (*tangents, tangents[0]):
            (gradient,) = torch.autograd.grad(current, x, create_graph=True)
            found.append(gradient.detach())
            current = (gradient * direction).sum()
        return found

    ours = orders(lambda x: categorical_log_prob(x, actions, backend=backend))
    for out, expected in zip(ours, orders(lambda x: by_torch(x, actions)), strict=True):
        same(out, expected)


def test_derivatives_of_the_fisher_product(backend, inputs):
    logits, _, (tangent, u, v) = inputs

    def both(fisher):
        x, t = logits.clone().requires_grad_(), tangent.clone().requires_grad_()
        first = torch.autograd.grad((fisher(x, t) * u).sin().sum(), (x, t), create_graph=True)
        second = torch.autograd.grad((first[0] * v).sum() + (first[1] * u).sum(), (x, t))
        moved = torch.func.jvp(fisher, (logits, tangent), (u, v))[1]
        return [*first, *second, moved]

    for out, expected in zip(
        both(lambda x, t: categorical_fisher(x, t, backend=backend)), both(fisher_by_torch), strict=True
    ):
        same(out, expected)


def test_transformations_of_torch_func(backend, inputs):
    logits, actions, (u, _, _) = inputs
    jvp, grad, vmap = cast(Any, torch.func.jvp), torch.func.grad, torch.func.vmap

    def all_of(log_prob):
        def total(x):
            return log_prob(x, actions).sin().sum()

        def along(x):
            return jvp(lambda x: log_prob(x, actions), (x,), (u,))[1]

        return [
            along(logits),
            jvp(grad(total), (logits,), (u,))[1],  # forward over reverse
            grad(lambda x: along(x).sin().sum())(logits),  # reverse over forward
            torch.func.hessian(total)(logits),
            torch.func.jacrev(lambda x: log_prob(x, actions))(logits),
            vmap(lambda x: log_prob(x, actions), in_dims=1)(torch.stack([logits, u], 1)),
            vmap(grad(total))(torch.stack([logits, u])),
            vmap(lambda x, a: log_prob(x[None], a[None])[0])(logits, actions),
            vmap(lambda a: log_prob(logits, a))(torch.stack([actions, actions - 1])),
        ]

    ours = all_of(lambda x, a: categorical_log_prob(x, a, backend=backend))
    for out, expected in zip(ours, all_of(by_log_softmax), strict=True):
        same(out, expected)


def by_log_softmax(logits, actions):
    return F.log_softmax(logits, -1).gather(-1, actions[:, None]).squeeze(-1)


def test_what_is_along_a_tangent_moves_with_both(inputs):
    """Forward mode through a part that autograd reaches only where nothing but the weights is differentiated."""
    pytest.importorskip("triton")
    from parl_core.ops.categorical_autograd import along

    logits, actions, (tangent, u, v) = inputs
    moved = cast(Any, torch.func.jvp)(lambda x, t: along(x, None, actions, t, "triton"), (logits, tangent), (u, v))[1]
    steps = torch.arange(2, device=logits.device)
    taken = v[steps, actions] - (logits.softmax(-1) * v).sum(-1)
    same(moved, taken - (u * fisher_by_torch(logits, tangent)).sum(-1))


def test_batched_cotangents(backend, inputs):
    logits, actions, _ = inputs
    x = logits.clone().requires_grad_()
    cotangents = torch.eye(2, dtype=F64, device=x.device)
    (rows,) = torch.autograd.grad(
        categorical_log_prob(x, actions, backend=backend), x, cotangents, is_grads_batched=True
    )
    same(rows, torch.func.jacrev(lambda x: by_torch(x, actions))(logits))


def test_a_hessian_product_takes_one_kernel_which_finds_what_is_along_too(inputs, monkeypatch):
    """What autograd asks for when it differentiates the gradient is computed together."""
    pytest.importorskip("triton")
    from parl_core.kernels import triton_categorical
    from parl_core.ops import categorical_terms

    calls = []
    for op, name in ((categorical_terms.ALONG, "along"), (categorical_terms.FISHER, "fisher")):
        kernel = getattr(triton_categorical, name)
        monkeypatch.setitem(op._kernels, "triton", lambda *a, k=kernel, n=name: calls.append(n) or k(*a))
    logits, actions, (tangent, _, _) = inputs
    x, w = logits.clone().requires_grad_(), torch.ones(2, dtype=F64, device=logits.device, requires_grad=True)
    log_prob = categorical_log_prob(x, actions, backend="triton")
    (gradient,) = torch.autograd.grad(log_prob, x, w, create_graph=True)
    by_weights, by_logits = torch.autograd.grad(gradient, (w, x), tangent)
    assert calls == ["fisher"]
    same(by_weights, torch.func.jvp(lambda x: by_torch(x, actions), (logits,), (tangent,))[1])
    same(by_logits, -fisher_by_torch(logits, tangent))


def test_masked_tokens(backend, device):
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [-torch.inf, 2.0, -torch.inf]], dtype=F64, device=device)
    logits.requires_grad_()
    actions = torch.tensor([0, 1], device=device)
    log_prob = categorical_log_prob(logits, actions, backend=backend)
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits, create_graph=True)
    (image,) = torch.autograd.grad((gradient * torch.ones_like(gradient).cumsum(1)).sum(), logits)
    p = torch.tensor([1 / (1 + torch.e), 0.0, torch.e / (1 + torch.e)], dtype=F64, device=device)
    same(log_prob[0], p[0].log())
    same(log_prob[1], torch.zeros_like(log_prob[1]))
    same(gradient[0], torch.tensor([1.0, 0.0, 0.0], dtype=F64, device=device) - p)
    same(image[0], -2 * p[0] * p[2] * torch.tensor([-1.0, 0.0, 1.0], dtype=F64, device=device))
    assert not gradient[1].any() and not image[1].any()
    masked = categorical_log_prob(logits, torch.tensor([1, 0], device=device), backend=backend)
    assert masked.tolist() == [-torch.inf, -torch.inf]


@pytest.mark.parametrize("wrong", [3, -1])
def test_an_action_out_of_range_raises_on_the_cpu(wrong):
    with pytest.raises(IndexError, match=f"actions must be in 0 … V−1 with V = 3, got {wrong}"):
        categorical_log_prob(torch.zeros(2, 3), torch.tensor([1, wrong]), backend="reference")


def test_compiled(backend, inputs):
    torch._dynamo.reset()
    logits, actions, (tangent, _, _) = inputs
    x = logits.clone().requires_grad_()

    def function(x):
        log_prob = categorical_log_prob(x, actions, backend=backend).square()
        return log_prob + categorical_fisher(x, tangent, backend=backend).sum(-1).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    same(out, function(x))
    for ours, expected in zip(
        torch.autograd.grad(out.sum(), x), torch.autograd.grad(function(x).sum(), x), strict=True
    ):
        same(ours, expected)


def test_nodes_are_well_formed(inputs):
    logits, actions, (tangent, _, _) = inputs
    x, t = logits.clone().requires_grad_(), tangent.clone().requires_grad_()
    weights, logsumexp = tangent[:, 0].clone().requires_grad_(), torch.logsumexp(logits, -1)
    ops = torch.ops.parl_core
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.categorical_value.default, (x, actions, None), test_utils=tests)
    torch.library.opcheck(ops.categorical_gradient.default, (x, logsumexp, actions, weights, None), test_utils=tests)
    torch.library.opcheck(ops.categorical_along.default, (x, logsumexp, actions, t, None), test_utils=tests)
    torch.library.opcheck(ops.categorical_fisher.default, (x, logsumexp, actions, t, weights, None), test_utils=tests)


@pytest.mark.parametrize(
    ("logits", "actions", "error", "message"),
    [
        (
            torch.zeros(2, 3, dtype=torch.int64),
            torch.zeros(2, dtype=torch.int64),
            TypeError,
            "logits must be of a float",
        ),
        (
            torch.zeros(3),
            torch.zeros(3, dtype=torch.int64),
            ValueError,
            r"logits must be of shape \(T, V\), got \(3,\)",
        ),
        (torch.zeros(2, 3), torch.zeros(2), TypeError, "actions must be integers, got torch.float32"),
        (torch.zeros(2, 3), [0, 1], TypeError, "actions must be a Tensor, got list"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), ValueError, r"with T = 2, got \(3,\)"),
        (
            torch.zeros(2, 3),
            torch.zeros(2, dtype=torch.int64, device="meta"),
            ValueError,
            "must be on the device of logits",
        ),
    ],
)
def test_bad_arguments(logits, actions, error, message):
    with pytest.raises(error, match=message):
        categorical_log_prob(logits, actions)


def test_bad_tangents():
    with pytest.raises(TypeError, match=r"tangent must have the dtype of logits, torch\.float32, got torch\.float64"):
        categorical_fisher(torch.zeros(2, 3), torch.zeros(2, 3, dtype=F64))
    with pytest.raises(ValueError, match=r"tangent must have the shape of logits, \(2, 3\), got \(2, 1\)"):
        categorical_fisher(torch.zeros(2, 3), torch.zeros(2, 1))
