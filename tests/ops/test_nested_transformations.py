"""Every op under two transformations of torch.func at once, forward mode among them, against reverse mode alone."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import pytest
import torch

from parl_core import ops
from parl_core.ops import available_backends

F64 = torch.float64
SIZE = 12
LENGTHS = (2, 0, 1, 3)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
jvp = cast(Any, torch.func.jvp)


def offsets(x, *, of=LENGTHS):
    return torch.tensor([0, *of], device=x.device).cumsum(0)


def constants(x, *shape, seed=1):
    size = torch.Size(shape).numel()
    return (seed + torch.arange(size, dtype=F64, device=x.device)).sin().reshape(shape)


def ensemble(x):
    weights = [x[:8].reshape(2, 2, 2), x[6:10].reshape(2, 2, 1)]
    return ops.ensemble_rewards(x[:6].reshape(3, 2), weights, [x[:4].reshape(2, 1, 2), x[4:6].reshape(2, 1, 1)])


def preference(x):
    labels = x[6:10].sigmoid()
    return ops.preference_loss(x[:6], x[4:12], labels, offsets(x), offsets(x, of=(3, 1, 2, 2)), reduction="none").loss


def gaussian(x, *, squash=False, follow_actions=False):
    actions = (x[6:12] if follow_actions else constants(x, 6)).tanh().reshape(3, 2)
    return ops.gaussian_log_prob(actions, x[:6].reshape(3, 2), x[4:10].reshape(3, 2), squash=squash)


# Of a vector of twelve numbers.
OPS = {
    "discounted_returns": lambda x: ops.discounted_returns(x[:6] * x[6:], 0.9, offsets(x)),
    "discounted_returns, rows": lambda x: ops.discounted_returns(x.reshape(2, 6).exp(), 0.9),
    "discounted_returns, of the inputs": lambda x: ops.discounted_returns(x, 0.9),
    "prefix_sum": lambda x: ops.prefix_sum(x[:6] * x[6:], offsets(x)),
    "linear_recurrence": lambda x: ops.linear_recurrence(x[:6], x[6:], offsets(x)),
    "linear_recurrence, reversed": lambda x: ops.linear_recurrence(x[:6], x[6:], offsets(x), reverse=True),
    "gae": lambda x: ops.gae(x[:6] * x[1:7], x[6:], 0.9, 0.8, offsets(x), bootstrap=x[:4]),
    "td_lambda": lambda x: ops.td_lambda(x[:6] * x[1:7], x[6:], 0.9, 0.8, offsets(x), bootstrap=x[:4]),
    "vtrace, targets": lambda x: ops.vtrace(x[:6], x[3:9], x[6:], 0.9, offsets(x), bootstrap=x[:4]).targets,
    "vtrace, advantages": lambda x: ops.vtrace(x[:6], x[3:9], x[6:], 0.9, offsets(x), bootstrap=x[:4]).advantages,
    "f_divergence": lambda x: ops.f_divergence(x, "jeffreys"),
    "f_divergence, weighted": lambda x: ops.f_divergence(x[:6], "kl", offsets(x), weights=x[6:10].exp()),
    "f_divergence, normalised": lambda x: ops.f_divergence(x[:6], "kl", offsets(x), self_normalized=True),
    "f_divergence_bound": lambda x: ops.f_divergence_bound(x[:7], x[7:], "kl"),
    "categorical_f_divergence": lambda x: ops.categorical_f_divergence(x[:6].view(2, 3), x[6:].view(2, 3), "kl"),
    "gaussian_f_divergence": lambda x: ops.gaussian_f_divergence(x[:8].view(2, 4), 0.5 * x[4:].view(2, 4), "kl"),
    "categorical_log_prob": lambda x: ops.categorical_log_prob(x.view(4, 3), torch.arange(4, device=x.device) % 3),
    "categorical_fisher": lambda x: ops.categorical_fisher(x[:6].view(2, 3), x[6:].view(2, 3)),
    "gaussian_log_prob": gaussian,
    "gaussian_log_prob, squashed": lambda x: gaussian(x, squash=True),
    "gaussian_log_prob, in its actions": lambda x: gaussian(x, squash=True, follow_actions=True),
    "preference_loss": preference,
    "ensemble_rewards": ensemble,
}


@pytest.fixture(params=["reference", "numba", "cpp", "triton", "cuda"])
def x(request, device):
    """A vector where the backend computes, which is in force; of ops that lack it, their own best."""
    if request.param not in available_backends():
        pytest.skip(f"backend {request.param} is unavailable")
    device = device if request.param in ("triton", "cuda") else torch.device("cpu")
    with ops.backend(request.param):
        yield torch.linspace(-0.9, 0.7, SIZE, dtype=F64, device=device)


def weighted(name, x):
    """The op's results times constants: what is pulled back through them has no tangent, and is a tensor without memory."""
    results = OPS[name](x)
    return (results * constants(results, *results.shape)).sum()


def curved(name, x):
    return OPS[name](x).sin()


def same(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def hessian(name, x):
    """By reverse mode alone."""
    return torch.autograd.functional.hessian(lambda x: weighted(name, x), x)


@pytest.mark.parametrize("name", OPS)
def test_reverse_over_forward(name, x):
    expected, direction = hessian(name, x), constants(x, SIZE, seed=2)
    same(torch.func.grad(lambda x: jvp(lambda x: weighted(name, x), (x,), (direction,))[1])(x), expected @ direction)
    same(torch.func.jacrev(torch.func.jacfwd(lambda x: weighted(name, x)))(x), expected)


@pytest.mark.parametrize("name", OPS)
def test_forward_over_forward(name, x):
    expected, first, second = hessian(name, x), constants(x, SIZE, seed=2), constants(x, SIZE, seed=3)

    def along(x):
        return jvp(lambda x: weighted(name, x), (x,), (first,))[1]

    same(jvp(along, (x,), (second,))[1], second @ expected @ first)
    same(torch.func.jacfwd(torch.func.jacfwd(lambda x: weighted(name, x)))(x), expected)


@pytest.mark.parametrize("name", OPS)
def test_forward_three_times(name, x):
    direction = constants(x, SIZE, seed=2)

    def along(x):
        return curved(name, x).sum()

    for _ in range(3):
        along = partial(lambda function, x: jvp(function, (x,), (direction,))[1], along)
    differentiated = x.clone().requires_grad_()
    expected = curved(name, differentiated).sum()
    for _ in range(3):
        expected = torch.autograd.grad(expected, differentiated, create_graph=True)[0] @ direction
    same(along(x), expected.detach())


@pytest.mark.parametrize("head", ["categorical", "gaussian"])
def test_an_empty_batch_has_steps(head, x):
    """Of a batch of none, too, values and gradients have the shape of a batch."""
    logits, actions = x.reshape(2, 3, 2)[:0], torch.zeros(3, dtype=torch.int64, device=x.device)

    def log_prob(logits):
        if head == "categorical":
            return ops.categorical_log_prob(logits, actions)
        return ops.gaussian_log_prob(x[:6].reshape(3, 2), logits, logits)

    assert torch.func.vmap(log_prob)(logits).shape == (0, 3)
    assert torch.func.vmap(torch.func.grad(lambda logits: log_prob(logits).sum()))(logits).shape == (0, 3, 2)
