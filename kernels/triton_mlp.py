"""What lies between the matrix products of a multi-layer perceptron's linearization, in Triton: one kernel between two.

With φ the activation and z its argument, the value a = φ(z), and of directions ż and cotangents g of a, ġ of ȧ:

    activate     a = φ(z)
    push         ȧ = φ′(z) ż, and φ″(z) ż in place of ż
    pull         δ = φ′(z) g in place of g, and δ̇ = φ′(z) ġ + φ″(z) ż g in place of ġ

The derivatives follow from a for tanh and ReLU, and from z for SiLU: that one is `kept`. All tensors are contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import LAUNCH, accumulator, program
from .triton_math import tanh

_BLOCK = 1024  # elements of 128 threads: two loads of 16 bytes each


def activate(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """a, and what is to be kept of the layer."""
    a = torch.empty_like(z) if activation == "silu" else z
    _launch(_activate_kernel, activation, z, a)
    return a, z


def push(kept: Tensor, tangent: Tensor, activation: str, *, bends: bool) -> Tensor:
    """ȧ from ż, which with `bends` becomes φ″(z) ż, and otherwise ȧ itself."""
    out = torch.empty_like(tangent) if bends else tangent
    _launch(_push_kernel, activation, kept, tangent, out, tangent if bends else None)
    return out


def pull(kept: Tensor, cotangent: Tensor | None, moved: Tensor | None, bent: Tensor | None, activation: str) -> None:
    """δ in place of g = `cotangent`, and δ̇ in place of ġ = `moved`; either may be missing; of both, `bent` is φ″(z) ż."""
    _launch(_pull_kernel, activation, kept, cotangent, moved, bent)


def _launch(kernel: Any, activation: str, first: Tensor, *rest: Tensor | None) -> None:
    count = first.numel()
    if count:
        with torch.cuda.device_of(first):
            grid = (triton.cdiv(count, _BLOCK),)
            kernel[grid](first, *rest, count, KIND=activation, BLOCK=_BLOCK, num_warps=4, **LAUNCH)


@triton.jit
def _activate_kernel(z, a, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    place = program() * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(z + place, mask=place < count, other=0.0).to(accumulator(z.dtype.element_ty))
    if KIND == "tanh":
        value = tanh(x)
    elif KIND == "relu":
        value = tl.where(x < 0.0, 0.0, x)
    else:
        value = x / (1.0 + tl.exp(-x))
    tl.store(a + place, value, mask=place < count)


@triton.jit
def _push_kernel(kept, tangent, out, bent, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    place = program() * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    x = tl.load(kept + place, mask=mask, other=0.0).to(accumulator(kept.dtype.element_ty))
    dot = tl.load(tangent + place, mask=mask, other=0.0).to(x.dtype)
    slope, bend = _derivatives(x, KIND)
    tl.store(out + place, slope * dot, mask=mask)
    if bent is not None:
        tl.store(bent + place, bend * dot, mask=mask)


@triton.jit
def _pull_kernel(kept, cotangent, moved, bent, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    place = program() * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    x = tl.load(kept + place, mask=mask, other=0.0).to(accumulator(kept.dtype.element_ty))
    slope, _ = _derivatives(x, KIND)
    if moved is not None:
        delta = slope * tl.load(moved + place, mask=mask, other=0.0).to(x.dtype)
    if cotangent is not None:
        g = tl.load(cotangent + place, mask=mask, other=0.0).to(x.dtype)
        if moved is not None:
            delta += g * tl.load(bent + place, mask=mask, other=0.0).to(x.dtype)
        tl.store(cotangent + place, slope * g, mask=mask)
    if moved is not None:
        tl.store(moved + place, delta, mask=mask)


@triton.jit
def _derivatives(x, KIND: tl.constexpr):
    """φ′ and φ″, from a or z."""
    if KIND == "tanh":
        slope = 1.0 - x * x
        bend = -2.0 * x * slope
    elif KIND == "relu":
        slope = tl.where(x > 0.0, 1.0, 0.0).to(x.dtype)
        bend = tl.zeros_like(x)
    else:
        s = 1.0 / (1.0 + tl.exp(-x))
        slope = s * (1.0 + x * (1.0 - s))
        bend = s * (1.0 - s) * (2.0 + x * (1.0 - 2.0 * s))
    return slope, bend
