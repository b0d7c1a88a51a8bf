"""f-divergences from log-ratios: value and gradient in one go, float32.

The floor reads the log-ratios and writes the gradient at the speed of a copy. In the cache it can be beaten, and the
arithmetic decides; beyond it the traffic does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import against, copy_floor
from parl_core.ops import backend, f_divergence

SAMPLES = 1_000_000
ALPHA = 1.5
RTOL = 2e-6  # of the largest entry of the gradient, and of the value

# As one would write them down, in log space and without overflow of what is finite.
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda r: r.exp() * r,
    "jensen_shannon": lambda r: 0.5 * (r.exp() * r - (1 + r.exp()) * (F.softplus(r) - math.log(2))),
    "chi_squared": lambda r: torch.expm1(r) ** 2,
    "squared_hellinger": lambda r: 0.5 * torch.expm1(0.5 * r) ** 2,
    "total_variation": lambda r: 0.5 * torch.expm1(r).abs(),
    "alpha": lambda r: (torch.exp(ALPHA * r) - ALPHA * r.exp() - (1 - ALPHA)) / (ALPHA * (ALPHA - 1)),
}
KIND = pytest.mark.parametrize("kind", FORMULAS)


def log_ratios(count: int, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(count, generator=torch.Generator().manual_seed(0))


def value_and_gradient(function: Callable[[Tensor], Tensor], log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    value = function(log_ratio)
    return value.detach(), torch.autograd.grad(value, log_ratio)[0]


def expected(kind: str, log_ratio: Tensor, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    with backend("reference"):
        leaf = log_ratio.double().requires_grad_()
        return value_and_gradient(lambda r: ours(kind, r, offsets), leaf)


def ours(kind: str, log_ratio: Tensor, offsets: Tensor | None = None) -> Tensor:
    return f_divergence(log_ratio, kind, offsets, alpha=ALPHA if kind == "alpha" else None)


def own_run(kind: str, log_ratio: Tensor, offsets: Tensor | None = None) -> Callable[[], Any]:
    leaf = log_ratio.clone().requires_grad_()
    return lambda: value_and_gradient(lambda r: ours(kind, r, offsets), leaf)


def itself(log_ratio: Tensor) -> Tensor:
    return log_ratio


def eager(kind: str, log_ratio: Tensor, sums: Callable[[Tensor], Tensor] = itself) -> Callable[[], Any]:
    """`sums` makes the log-ratios of trajectories from those of steps."""
    leaf = log_ratio.clone().requires_grad_()
    return lambda: value_and_gradient(lambda r: FORMULAS[kind](sums(r)).mean(), leaf)


def compiled(kind: str, log_ratio: Tensor) -> Callable[[], Any]:
    """Forward pass and backward pass, each a kernel."""
    leaf = log_ratio.clone().requires_grad_()
    function = torch.compile(lambda r: FORMULAS[kind](r).mean(), dynamic=False)
    return lambda: value_and_gradient(function, leaf)


def compiled_in_one(kind: str, log_ratio: Tensor, sums: Callable[[Tensor], Tensor] = itself) -> Callable[[], Any]:
    """Value and gradient as one function, outside autograd."""
    function = torch.compile(torch.func.grad_and_value(lambda r: FORMULAS[kind](sums(r)).mean()), dynamic=False)
    return lambda: function(log_ratio)[::-1]


@KIND
def test_value_and_gradient(contest, kind):
    x = log_ratios(SAMPLES)
    contest(
        against(expected(kind, x), RTOL),
        ours={"parl-core": lambda: own_run(kind, x)},
        peers={
            "torch": lambda: eager(kind, x),
            "torch.compile": lambda: compiled(kind, x),
            "torch.compile of both in one": lambda: compiled_in_one(kind, x),
        },
        floor=copy_floor(8.0 * SAMPLES),
    )


@pytest.mark.parametrize("kind", ["kl", "squared_hellinger"])
def test_beyond_the_cache(contest, kind):
    count = 32 * SAMPLES
    x = log_ratios(count)
    contest(
        against(expected(kind, x), RTOL),
        ours={"parl-core": lambda: own_run(kind, x)},
        peers={"torch.compile of both in one": lambda: compiled_in_one(kind, x)},
        floor=copy_floor(8.0 * count),
    )


@KIND
def test_trajectories(contest, kind):
    """20 000 of lengths from 1 to about 600; in torch by index_add and a gather."""
    count = SAMPLES // 50
    x = log_ratios(SAMPLES, 1 / 7)
    cuts = torch.randperm(SAMPLES - 1, generator=torch.Generator().manual_seed(1))[: count - 1].sort().values + 1
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([SAMPLES])])

    def scattered() -> Callable[[], Any]:
        trajectory = torch.arange(count).repeat_interleave(offsets.diff())
        return eager(kind, x, lambda r: torch.zeros(count).index_add(0, trajectory, r))

    contest(
        against(expected(kind, x, offsets), 20 * RTOL),
        ours={"parl-core": lambda: own_run(kind, x, offsets)},
        peers={"torch": scattered},
        floor=copy_floor(8.0 * SAMPLES),
    )


@KIND
def test_equal_trajectories(contest, kind):
    """20 000 of 50 steps each, which torch sums as rows."""
    x = log_ratios(SAMPLES, 1 / 7)
    offsets = torch.arange(0, SAMPLES + 1, 50)

    def rows(r: Tensor) -> Tensor:
        return r.view(-1, 50).sum(1)

    contest(
        against(expected(kind, x, offsets), 20 * RTOL),
        ours={"parl-core": lambda: own_run(kind, x, offsets)},
        peers={
            "torch": lambda: eager(kind, x, rows),
            "torch.compile of both in one": lambda: compiled_in_one(kind, x, rows),
        },
        floor=copy_floor(8.0 * SAMPLES),
    )


@KIND
def test_second_order(contest, kind):
    """The Hessian, which is diagonal, times a vector; for the kernels by autograd twice."""
    x, v = log_ratios(SAMPLES), torch.randn(SAMPLES, generator=torch.Generator().manual_seed(2))

    def product(function: Callable[[Tensor], Tensor], at: Tensor, vector: Tensor) -> Tensor:
        leaf = at.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        return torch.autograd.grad(gradient, leaf, vector)[0]

    def in_torch(r: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda r: FORMULAS[kind](r).mean())
        return torch.func.jvp(gradient, (r,), (v,))[1]

    def estimate(r: Tensor) -> Tensor:
        return ours(kind, r)

    with backend("reference"):
        answer = product(estimate, x.double(), v.double())
    contest(
        against(answer, RTOL),
        ours={"parl-core": lambda: functools.partial(product, estimate, x, v)},
        peers={"torch.func": lambda: functools.partial(in_torch, x)},
        floor=copy_floor(12.0 * SAMPLES),
    )
