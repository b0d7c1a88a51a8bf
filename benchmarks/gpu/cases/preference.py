"""The preference loss with its gradient, over pairs of segments: ragged and of one length."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import Bar, Case, Lab, Run, Setup, by_backend
from benchmarks.harness import agrees_with, copy_floor
from parl_core.ops import preference_loss

SIZES, TINY = ((256, 50), (65536, 50), (524288, 64)), ((3, 4),)
RTOL = 1e-5


def cases(tiny: bool) -> list[Case]:
    """Pairs × steps of a segment."""
    return [
        Case(
            topic="preference",
            name=f"loss_and_gradient {pairs}x{steps}",
            setup=partial(_setup, pairs, steps),
            tests=("preference", "configurations"),
            bars=(Bar(0.8, floor=True),) if pairs * steps >= 1 << 24 else (),
            op="preference_loss",
            size=pairs * steps,
        )
        for pairs, steps in (TINY if tiny else SIZES)
    ]


def _setup(pairs: int, steps: int, lab: Lab) -> Setup:
    generator = torch.Generator(lab.device).manual_seed(0)
    rewards = [0.1 * torch.randn(pairs * steps, generator=generator, device=lab.device) for _ in range(2)]
    labels = torch.rand(pairs, generator=generator, device=lab.device)
    offsets = torch.arange(pairs + 1, device=lab.device) * steps

    def own(backend: str) -> Run:
        def loss(first: Tensor, second: Tensor) -> Tensor:
            return preference_loss(first, second, labels, offsets, offsets, backend=backend).loss

        return _with_gradient(loss, rewards)

    def plain(first: Tensor, second: Tensor) -> Tensor:
        logits = second.view(pairs, -1).sum(1) - first.view(pairs, -1).sum(1)
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

    def compiled() -> Run:
        function = torch.compile(torch.func.grad_and_value(plain, argnums=(0, 1)), dynamic=False)

        def run() -> Any:
            gradients, value = function(*rewards)
            return value, *gradients

        return run

    return Setup(
        check=agrees_with(_with_gradient(plain, [r.double() for r in rewards])(), RTOL),
        ours=by_backend(own),
        peers={"torch": lambda: _with_gradient(plain, rewards), "torch.compile": compiled},
        floor=copy_floor(4 * rewards[0].nbytes, device=lab.device),
        cold=True,
    )


def _with_gradient(loss: Callable[[Tensor, Tensor], Tensor], rewards: list[Tensor]) -> Run:
    leaves = [r.clone().requires_grad_() for r in rewards]

    def run() -> Any:
        value = loss(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return run
