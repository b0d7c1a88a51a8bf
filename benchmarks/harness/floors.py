"""What no implementation can go below on this machine: the arithmetic at the best rate of a matrix product, or the traffic
at the speed of a copy. Both are raced along with the contestants, so that they see the machine in the same state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .clock import seconds_per_call

_COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Far beyond any cache: half of it is read, half written."""


@dataclass(frozen=True)
class Floor:
    """`scale` times the duration of `run`."""

    run: Callable[[], Any]
    scale: float
    name: str


def gemm_floor(
    flops: float,
    rows: int,
    width: int,
    *,
    device: torch.device | str = "cpu",
    timer: Callable[[Callable[[], Any]], float] = seconds_per_call,
) -> Floor:
    """The time of `flops` at the best rate of float32 products of (rows, width) with (width, width).

    The best of the layouts that forward, backward and weight gradients need, as `timer` finds it.
    """
    generator = torch.Generator(device).manual_seed(0)
    tall, other = (torch.randn(rows, width, generator=generator, device=device) for _ in range(2))
    square = torch.randn(width, width, generator=generator, device=device)
    tall_out, square_out = torch.empty_like(tall), torch.empty_like(square)
    layouts: list[Callable[[], Any]] = [
        lambda: torch.mm(tall, square, out=tall_out),
        lambda: torch.mm(tall, square.t(), out=tall_out),
        lambda: torch.mm(tall.t(), other, out=square_out),
    ]
    best = min(layouts, key=lambda run: min(timer(run) for _ in range(5)))
    return Floor(best, flops / (2.0 * rows * width * width), f"{flops:.3g} flops in products {rows}×{width}×{width}")


def copy_floor(num_bytes: float, *, device: torch.device | str = "cpu") -> Floor:
    """The time of `num_bytes` read and written, together, at the speed of a copy of large arrays."""
    copied = _COPIED_BYTES[torch.device(device).type]
    source = torch.zeros(copied // 8, device=device).fill_(1.0)  # written, hence pages of its own
    target = torch.empty_like(source).fill_(0.0)
    return Floor(lambda: target.copy_(source), num_bytes / copied, f"{num_bytes:.3g} bytes copied")
