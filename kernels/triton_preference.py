"""The preference loss and its gradient in Triton. Contract: `parl_core/ops/preference_loss.py`.

The loss reads every reward once and the gradient writes every step once; the rest is a few numbers for each pair. A program
takes as many pairs as fill a tile of (pairs, steps), of one member.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parl_core.ops.accelerators import interpreted

from .triton_common import LAUNCH, accumulator, autotune, program
from .triton_math import log1p
from .triton_steps import bounds, load, places, spans, store

# Bytes of a tile, in the dtype that is computed in, to choose from; and the most of one segment in it.
_TILES, _BLOCK = ((1024,), 256) if interpreted() else ((1 << 13, 1 << 12), 1 << 12)
# More or fewer pairs in a tile; what is done along a segment is the same.
_CONFIGS = [triton.Config({"SIZE": size}, num_warps=4) for size in _TILES]


@triton.jit
def _member_and_pair(pairs, ROWS: tl.constexpr):
    """Whose segments this program takes, and the first of its pairs."""
    of_member = tl.cdiv(pairs, ROWS)
    return program() // of_member, program() % of_member * ROWS


@triton.jit
def _segment_sums(
    rewards, offsets, steps, length, member, pair, pairs,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The sums (ROWS,) of a member's segments from `pair` on."""
    VECTOR: tl.constexpr = 128 // rewards.dtype.element_ty.primitive_bitwidth
    _n, start, stop = spans(offsets, steps, length, pairs, pair, ROWS)
    low, high, blocks = bounds(start, stop, VECTOR, BLOCK)
    totals = tl.zeros((ROWS, BLOCK), dtype)
    for k in range(blocks):
        base, lane, inside, whole = places(low, high, start, stop, k, False, VECTOR, BLOCK)
        totals += load(rewards + member * steps, base, lane, inside, whole, dtype)
    return tl.sum(totals, 1)


@autotune(_CONFIGS, ["scale", "BLOCK"])
@triton.jit(do_not_specialize=["scale"])
def preference_kernel(
    first,
    first_offsets,
    second,
    second_offsets,
    labels,
    losses,
    logits,
    in_order,
    first_steps: tl.int64,
    first_length: tl.int64,
    second_steps: tl.int64,
    second_length: tl.int64,
    label_stride: tl.int64,
    pairs: tl.int64,
    scale,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Of every pair: logit z = Σ second − Σ first, cross-entropy, and whether it is ordered as labelled."""
    dtype: tl.constexpr = accumulator(first.dtype.element_ty)
    ROWS: tl.constexpr = SIZE * 8 // dtype.primitive_bitwidth // BLOCK
    member, pair = _member_and_pair(pairs, ROWS)
    logit = _segment_sums(
        second, second_offsets, second_steps, second_length, member, pair, pairs, ROWS, BLOCK, dtype
    ) - _segment_sums(first, first_offsets, first_steps, first_length, member, pair, pairs, ROWS, BLOCK, dtype)
    pair += tl.arange(0, ROWS)
    known = pair < pairs
    label = tl.load(labels + member * label_stride + pair, mask=known, other=0).to(dtype)
    # −y·log σ(z) − (1 − y)·log σ(−z) without a difference of large numbers.
    loss = tl.where(logit < 0, -label * logit, (1 - label) * logit) + log1p(tl.exp(-tl.abs(logit)))
    place = member * pairs + pair
    tl.store(logits + place, logit, mask=known)
    tl.store(losses + place, loss.to(losses.dtype.element_ty), mask=known)
    agrees = ((label > 0.5) & (logit > 0)) | ((label < 0.5) & (logit < 0))
    tl.store(in_order + place, agrees.to(tl.int8), mask=known)


@autotune(_CONFIGS, ["scale", "BLOCK"])
@triton.jit(do_not_specialize=["scale"])
def spread_kernel(
    out,
    slopes,
    offsets,
    steps: tl.int64,
    length: tl.int64,
    pairs: tl.int64,
    scale,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
):
    """To every step what its segment receives."""
    dtype: tl.constexpr = accumulator(out.dtype.element_ty)
    ROWS: tl.constexpr = SIZE * 8 // dtype.primitive_bitwidth // BLOCK
    VECTOR: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth
    member, pair = _member_and_pair(pairs, ROWS)
    n, start, stop = spans(offsets, steps, length, pairs, pair, ROWS)
    slope = tl.load(slopes + member * pairs + n, mask=n < pairs, other=0)[:, None]
    low, high, blocks = bounds(start, stop, VECTOR, BLOCK)
    for k in range(blocks):
        base, lane, inside, whole = places(low, high, start, stop, k, False, VECTOR, BLOCK)
        values = slope + tl.zeros((ROWS, BLOCK), slope.dtype)
        store(out + member * steps, base, lane, values, inside, whole)


def _sizes(steps: int, pairs: int, dtype: torch.dtype) -> tuple[dict[str, Any], int]:
    """Of a launch over segments with `steps` in all: how many steps of each are in a tile, and the bytes of a row."""
    item = max(dtype.itemsize, 4)
    block = min(max(triton.next_power_of_2(triton.cdiv(steps, pairs)), 16), _BLOCK // item)
    return {"scale": min(max(steps.bit_length() - 16, 0) // 4, 3), "BLOCK": block, **LAUNCH}, block * item


def _layout(rewards: Tensor, offsets: Tensor | None) -> tuple[int, int]:
    """The steps of one member, and those of each segment where they are equally long."""
    return (rewards.shape[-2:].numel(), rewards.shape[-1]) if offsets is None else (rewards.shape[-1], 0)


def preference_loss(
    first: Tensor, second: Tensor, labels: Tensor, first_offsets: Tensor | None, second_offsets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, logits and how many pairs are in order, of contiguous tensors; logits in float32 for half precision."""
    shape = first.shape[:-2] if first_offsets is None else first.shape[:-1]
    pairs = labels.shape[-1]
    losses = first.new_empty(*shape, pairs)
    logits = losses.new_empty(losses.shape, dtype=first.dtype if first.dtype == torch.float64 else torch.float32)
    in_order = losses.new_empty(losses.shape, dtype=torch.bool)
    if losses.numel():
        first_steps, first_length = _layout(first, first_offsets)
        second_steps, second_length = _layout(second, second_offsets)
        sizes, row = _sizes(max(first_steps, second_steps), pairs, first.dtype)
        members = shape.numel()
        with torch.cuda.device_of(first):
            preference_kernel[lambda meta: (members * triton.cdiv(pairs, meta["SIZE"] // row),)](
                first, first_offsets, second, second_offsets, labels, losses, logits, in_order.view(torch.int8),
                first_steps, first_length, second_steps, second_length, pairs if labels.dim() == 2 else 0, pairs, **sizes,
            )  # fmt: skip
    return losses, logits, in_order.sum(-1)


def spread(slopes: Tensor, rewards: Tensor, offsets: Tensor | None) -> Tensor:
    """Contiguous slopes (…, M) to every step of their segments, in the shape and dtype of `rewards`."""
    out = torch.empty_like(rewards, memory_format=torch.contiguous_format)
    pairs = slopes.shape[-1]
    if out.numel() and pairs:
        steps, length = _layout(rewards, offsets)
        sizes, row = _sizes(steps, pairs, rewards.dtype)
        members = slopes.shape[:-1].numel()
        with torch.cuda.device_of(out):
            spread_kernel[lambda meta: (members * triton.cdiv(pairs, meta["SIZE"] // row),)](
                out, slopes, offsets, steps, length, pairs, **sizes
            )
    return out
