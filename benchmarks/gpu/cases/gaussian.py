"""Log-densities of a Gaussian policy head, log standard deviations of every step: value, VJP, JVP and HVP, float32.

The floor reads actions, means, log standard deviations and tangents, and writes gradients or products, once each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.case import Case, Lab, Run, Setup, by_backend
from benchmarks.harness import agrees_with, copy_floor
from parl_core.ops import gaussian_log_prob

SIZES, TINY, ACT_DIM = (1 << 21,), (40,), 6
RTOL = 1e-5
_OPS = {"value": "", "vjp": ", gradient", "jvp": ", along a tangent", "hvp": ", second order"}
_LARGE_TENSORS = {"value": 3, "vjp": 5, "jvp": 5, "hvp": 7}
"""Of (T, da), read or written."""


def cases(tiny: bool) -> list[Case]:
    """One for each op."""
    return [
        Case(
            topic="gaussian",
            name=f"{what} {steps}x{ACT_DIM}",
            setup=partial(_setup, what, steps),
            tests=("gaussian",),
            op="gaussian_log_prob" + _OPS[what],
            size=steps * ACT_DIM,
        )
        for what in _OPS
        for steps in (TINY if tiny else SIZES)
    ]


def _setup(what: str, steps: int, lab: Lab) -> Setup:
    generator = torch.Generator(lab.device).manual_seed(0)
    data = [torch.randn(steps, ACT_DIM, generator=generator, device=lab.device) for _ in range(5)]
    data[2] *= 0.1
    weights = torch.randn(steps, generator=generator, device=lab.device)
    expected = _computed(_plain, what, [part.double() for part in data], weights.double())()
    return Setup(
        check=agrees_with(expected, RTOL),
        ours=by_backend(lambda backend: _computed(partial(gaussian_log_prob, backend=backend), what, data, weights)),
        peers={"torch": lambda: _computed(_plain, what, data, weights)},
        floor=copy_floor(_LARGE_TENSORS[what] * data[0].nbytes, device=lab.device),
        cold=True,
    )


def _plain(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    standard = (actions - mean) * torch.exp(-log_std)
    return -(0.5 * standard * standard + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def _computed(function: Callable[..., Tensor], what: str, data: list[Tensor], weights: Tensor) -> Run:
    """In mean and log standard deviation; a product's graphs are kept."""
    actions, mean, log_std, *tangents = data
    function = partial(function, actions)
    if what == "value":
        return lambda: function(mean, log_std)
    if what == "jvp":
        return lambda: torch.func.jvp(function, (mean, log_std), tuple(tangents))[1]
    leaves = [part.clone().requires_grad_() for part in (mean, log_std)]
    values = function(*leaves)
    if what == "vjp":
        return lambda: torch.autograd.grad(values, leaves, weights, retain_graph=True)
    gradients = torch.autograd.grad(values, leaves, weights, create_graph=True)
    return lambda: torch.autograd.grad(gradients, leaves, tangents, retain_graph=True)
