"""f-divergences from log-ratios: the value, the value with its gradient, and the product with the Hessian.

The floor reads the log-ratios, and the vector of a product, and writes the gradient or the product, at the speed of a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import Bar, Case, Lab, Run, Setup, by_backend
from benchmarks.harness import agrees_with, copy_floor
from parl_core.ops import f_divergence

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda r: r.exp() * r,
    "jensen_shannon": lambda r: 0.5 * (r.exp() * r - (1 + r.exp()) * (F.softplus(r) - math.log(2))),
    "squared_hellinger": lambda r: 0.5 * torch.expm1(0.5 * r) ** 2,
}
"""In log space; the others cost no more than these."""
COUNTS, LARGE, TINY = (100_000, 4_000_000, 100_000_000), 1 << 24, (300,)
RTOL = 3e-6  # of the largest entry of the gradient, and of the value
_TENSORS = {"value": 1, "value_and_gradient": 2, "second_order": 3}
"""Read or written."""


def cases(tiny: bool) -> list[Case]:
    """Every formula at the largest size, KL at all; and whole trajectories of 1 to some 500 steps."""
    counts = TINY if tiny else COUNTS
    found = []
    for what, tensors in _TENSORS.items():
        for kind in FORMULAS:
            for count in counts if kind == "kl" else counts[-1:]:
                found.append(_case(what, kind, count, False, tensors))
        found += [_case(what, "kl", count, True, tensors) for count in counts[-2:]]
    return found


def _case(what: str, kind: str, count: int, ragged: bool, tensors: int) -> Case:
    return Case(
        topic="divergence",
        name=f"{what} {kind} {'trajectories ' if ragged else ''}{count}",
        setup=partial(_setup, what, kind, count, ragged, tensors),
        tests=("divergence",),
        bars=(Bar(0.8, floor=True),) if count >= LARGE and not ragged else (),
        op="f_divergence, second order" if what == "second_order" else "f_divergence",
        size=count,
        first=(what, kind, count, ragged) == ("value_and_gradient", "kl", COUNTS[-1], False),
    )


def _setup(what: str, kind: str, count: int, ragged: bool, tensors: int, lab: Lab) -> Setup:
    generator = torch.Generator(lab.device).manual_seed(0)
    log_ratio, vector = (torch.randn(count, generator=generator, device=lab.device) for _ in range(2))
    offsets = None
    if ragged:
        log_ratio /= 7.0
        cuts = torch.randint(0, count + 1, (max(count // 50, 2),), generator=generator, device=lab.device).sort().values
        offsets = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), count)])
    sums = _sums(offsets, count, lab.device)

    def ours(backend: str) -> Run:
        return _COMPUTED[what](lambda r: f_divergence(r, kind, offsets, backend=backend), log_ratio, vector)

    def plain(r: Tensor) -> Tensor:
        return FORMULAS[kind](sums(r)).mean()

    expected = _COMPUTED[what](plain, log_ratio.double(), vector.double())()
    peers: dict[str, Callable[[], Run]] = {"torch": lambda: _COMPUTED[what](plain, log_ratio, vector)}
    if not ragged:
        peers["torch.compile"] = lambda: _compiled(what, plain, log_ratio, vector)
    return Setup(
        check=agrees_with(expected, 20 * RTOL if ragged else RTOL),
        ours=by_backend(ours),
        peers=peers,
        floor=copy_floor(tensors * log_ratio.nbytes, device=lab.device),
        cold=True,
    )


def _sums(offsets: Tensor | None, count: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The log-ratios of trajectories, by index_add, or those of steps."""
    if offsets is None:
        return lambda r: r
    number = len(offsets) - 1
    trajectory = torch.arange(number, device=device).repeat_interleave(offsets.diff(), output_size=count)
    return lambda r: r.new_zeros(number).index_add(0, trajectory, r)


def _value(function: Callable[[Tensor], Tensor], log_ratio: Tensor, vector: Tensor) -> Run:
    return lambda: function(log_ratio)


def _value_and_gradient(function: Callable[[Tensor], Tensor], log_ratio: Tensor, vector: Tensor) -> Run:
    leaf = log_ratio.clone().requires_grad_()

    def run() -> Any:
        value = function(leaf)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    return run


def _second_order(function: Callable[[Tensor], Tensor], log_ratio: Tensor, vector: Tensor) -> Run:
    """The Hessian times the vector; the gradient's graph is kept, as in a solver that needs many products."""
    leaf = log_ratio.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    return lambda: torch.autograd.grad(gradient, leaf, vector, retain_graph=True)[0]


_COMPUTED = {"value": _value, "value_and_gradient": _value_and_gradient, "second_order": _second_order}


def _compiled(what: str, function: Callable[[Tensor], Tensor], log_ratio: Tensor, vector: Tensor) -> Run:
    """All of it as one compiled function, outside autograd."""
    grad_and_value = torch.func.grad_and_value(function)

    def product(r: Tensor, v: Tensor) -> Tensor:
        return torch.func.jvp(torch.func.grad(function), (r,), (v,))[1]

    whole: Callable[..., Any] = {
        "value": lambda r, v: function(r),
        "value_and_gradient": lambda r, v: grad_and_value(r)[::-1],
        "second_order": product,
    }[what]
    compiled = torch.compile(whole, dynamic=False)
    return lambda: compiled(log_ratio, vector)
