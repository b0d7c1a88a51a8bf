"""Categorical log-probabilities in Triton: value, gradient, derivative along a tangent, Fisher product.

With p = softmax(x) of a row x of logits, e_a the unit vector of its action (0 where no actions are given), t a tangent:

    value     x_a − log Σ eˣ            along     t_a − p·t
    gradient  w (e_a − p)               Fisher    s p ⊙ (t − p·t)

A row that fits into the registers of a program is read once. A longer one is swept once, and a second time where a Fisher
product is written, backwards then, over what the caches still hold. Where there are too few long rows to fill a GPU, each is
cut into parts, whose maxima and sums are merged afterwards by all that need them. Nothing of size (T, V) is kept but the
output.

Logits and tangents (T, V) may have rows of any stride. An action outside of 0 … V−1 gives NaN in its row; −∞ among the
logits is a probability of 0. Sums are taken in float32, of float64 in float64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import LAUNCH, accumulator, program

_SHORT_ROW = 8192  # elements, of x and of t, that 1024 threads hold
_TILE = 4096  # elements of several short rows, or of a part of a gradient, for 256 threads
_PROGRAMS = 1024  # of 256 threads: about what 132 multiprocessors hold at once
_SHORTEST_PART = 4096

# Of 16 bytes each, for 256 threads. Neither this nor the threads are tuned by measurement: the order of summation, and so
# the last bits of a sum, would depend on what was measured. More of them leave fewer rows at work at once.
_LANES, _LANE_WARPS = 512, 8


def log_prob(logits: Tensor, actions: Tensor | None) -> tuple[Tensor, Tensor]:
    """(T, V), (T,) -> log-probabilities (T,) in the dtype of the logits, and log Σ eˣ (T,) in that of the sums."""
    sums = logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))
    return _reduce(logits, actions, None, None, sums, None), sums


def along(logits: Tensor, actions: Tensor | None, tangent: Tensor) -> Tensor:
    """(T, V), (T,), (T, V) -> t_a − p·t: (T,)."""
    return _reduce(logits, actions, tangent, None, None, None)


def fisher(logits: Tensor, actions: Tensor | None, tangent: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(T, V), (T,), (T, V), (T,) -> t_a − p·t (T,) and s p ⊙ (t − p·t) (T, V); no scale means 1."""
    image = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return _reduce(logits, actions, tangent, scale, None, image), image


def gradient(logits: Tensor, logsumexp: Tensor, actions: Tensor | None, weights: Tensor) -> Tensor:
    """(T, V), (T,), (T,), (T,) -> w (e_a − p): (T, V)."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    logits = _dense_columns(logits)
    num_rows, num_columns = logits.shape
    block = min(triton.next_power_of_2(num_columns), _TILE)
    rows = _TILE // block
    with torch.cuda.device_of(logits):
        _gradient_kernel[(triton.cdiv(num_rows, rows) * triton.cdiv(num_columns, block),)](
            logits, logits.stride(0), logsumexp, actions, weights, out, num_rows, num_columns,
            ROWS=rows, BLOCK=block, num_warps=8, **LAUNCH,
        )  # fmt: skip
    return out


def _reduce(
    logits: Tensor,
    actions: Tensor | None,
    tangent: Tensor | None,
    scale: Tensor | None,
    logsumexp: Tensor | None,
    image: Tensor | None,
) -> Tensor:
    """The value, or with a tangent what is along it; fills `logsumexp` and `image` where they are given."""
    num_rows, num_columns = logits.shape
    value = logits.new_empty(num_rows)
    if num_rows == 0:
        return value
    logits = _dense_columns(logits)
    if tangent is not None:
        tangent = _dense_columns(tangent)
    inputs = logits, logits.stride(0), tangent, 0 if tangent is None else tangent.stride(0), actions, scale
    outputs = value, logsumexp, image
    with torch.cuda.device_of(logits):
        _launch(inputs, outputs, num_rows, num_columns)
    return value


def _launch(inputs: tuple[Any, ...], outputs: tuple[Any, ...], num_rows: int, num_columns: int) -> None:
    """Choose by the shape alone how rows go to programs."""
    logits, image = inputs[0], outputs[2]
    if num_columns <= _SHORT_ROW:
        block = triton.next_power_of_2(max(num_columns, 1))
        rows = max(_TILE * 4 // (block * max(logits.element_size(), 4)), 1)
        _short_rows_kernel[(triton.cdiv(num_rows, rows),)](
            *inputs, *outputs, num_rows, num_columns,
            ROWS=rows, BLOCK=block, num_warps=32 if block > _TILE else 8, **LAUNCH,
        )  # fmt: skip
        return
    # A group is what a thread loads at once.
    lanes = {"GROUP": 16 // logits.element_size(), "LANES": _LANES, "num_warps": _LANE_WARPS}
    parts = min(triton.cdiv(_PROGRAMS, num_rows), triton.cdiv(num_columns, _SHORTEST_PART))
    if parts == 1:
        _long_row_kernel[(num_rows,)](*inputs, *outputs, num_columns, **lanes, **LAUNCH)
        return
    part = triton.cdiv(triton.cdiv(num_columns, parts), _SHORTEST_PART) * _SHORTEST_PART
    parts = triton.cdiv(num_columns, part)
    sums = torch.empty(num_rows, 3, parts, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    _part_kernel[(num_rows * parts,)](*inputs[:4], sums, parts, part, num_columns, **lanes, **LAUNCH)
    blocks = 1 if image is None else triton.cdiv(num_columns, _TILE)
    _merge_kernel[(num_rows * blocks,)](
        *inputs, *outputs, sums, parts, num_columns, blocks,
        PARTS=triton.next_power_of_2(parts), BLOCK=_TILE, num_warps=8, **LAUNCH,
    )  # fmt: skip


def _dense_columns(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


@triton.jit
def _short_rows_kernel(
    logits, logits_stride, tangent, tangent_stride, actions, scale, value, logsumexp, image, num_rows, num_columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows: all that is asked of them, from one reading."""
    ACC: tl.constexpr = accumulator(logits.dtype.element_ty)
    row = program() * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows)[:, None] & (columns < num_columns)
    x_row = logits + row * logits_stride
    x = tl.load(x_row[:, None] + columns, mask=mask, other=float("-inf")).to(ACC)
    highest = tl.max(x, 1)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    raised = tl.exp(x - shift[:, None])
    total = tl.sum(raised, 1)
    if tangent is None:
        level = shift + tl.log(total)
        taken_from = x_row
    else:
        taken_from = tangent + row * tangent_stride
        t = tl.load(taken_from[:, None] + columns, mask=mask, other=0.0).to(ACC)
        level = tl.sum(raised * t, 1) / total
        if image is not None:
            height = 1.0 / total
            if scale is not None:
                height *= tl.load(scale + row, mask=row < num_rows, other=0.0).to(ACC)
            product = height[:, None] * raised * (t - level[:, None])
            tl.store(image + row[:, None] * num_columns + columns, product, mask=mask)
    if logsumexp is not None:
        tl.store(logsumexp + row, level, mask=row < num_rows)
    taken = tl.zeros([ROWS], ACC)
    if actions is not None:
        action = tl.load(actions + row, mask=row < num_rows, other=0)
        inside = (row < num_rows) & (action >= 0) & (action < num_columns)
        taken = tl.load(taken_from + action, mask=inside, other=float("nan")).to(ACC)
    tl.store(value + row, taken - level, mask=row < num_rows)


@triton.jit
def _long_row_kernel(
    logits, logits_stride, tangent, tangent_stride, actions, scale, value, logsumexp, image, num_columns,
    GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One row: swept for its sums, and backwards for its Fisher product."""
    row = program()
    x_row = logits + row * logits_stride
    t_row = None if tangent is None else tangent + row * tangent_stride
    peak, total, weighted = _sweep(x_row, t_row, 0, num_columns, LANES, GROUP)
    shift, total, weighted = _merge(peak, total, weighted)
    if tangent is None:
        level = shift + tl.log(total)
        _write_value(x_row, actions, row, value, level, num_columns)
        tl.store(logsumexp + row, level)
    else:
        level = weighted / total
        _write_value(t_row, actions, row, value, level, num_columns)
        if image is not None:
            height = _height(scale, row, total)
            blocks = tl.cdiv(num_columns, LANES * GROUP)
            for block in range(0, blocks):
                columns = _columns((blocks - 1 - block) * LANES * GROUP, LANES, GROUP)
                _write_image(x_row, t_row, image + row * num_columns, columns, shift, level, height, num_columns)


@triton.jit
def _part_kernel(
    logits, logits_stride, tangent, tangent_stride, sums, parts, part_length, num_columns,
    GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The sums of one part of a row: sums (T, 3, parts) are its maximum m, Σ e^{x − m} and Σ e^{x − m} t."""
    number = program()
    row = number // parts
    begin = (number % parts).to(tl.int32) * part_length
    end = tl.minimum(begin + part_length, num_columns)
    t_row = None if tangent is None else tangent + row * tangent_stride
    peak, total, weighted = _sweep(logits + row * logits_stride, t_row, begin, end, LANES, GROUP)
    shift, total, weighted = _merge(peak, total, weighted)
    place = sums + row * 3 * parts + number % parts
    tl.store(place, shift)
    tl.store(place + parts, total)
    tl.store(place + 2 * parts, weighted)


@triton.jit
def _merge_kernel(
    logits, logits_stride, tangent, tangent_stride, actions, scale, value, logsumexp, image, sums, parts,
    num_columns, blocks, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the parts of a row, and write one block of its Fisher product; the first block's program writes the rest."""
    number = program()
    row = number // blocks
    block = (number % blocks).to(tl.int32)
    part = tl.arange(0, PARTS)
    place = sums + row * 3 * parts + part
    peak = tl.load(place, mask=part < parts, other=float("-inf"))
    total = tl.load(place + parts, mask=part < parts, other=0.0)
    weighted = tl.load(place + 2 * parts, mask=part < parts, other=0.0)
    shift, total, weighted = _merge(peak, total, weighted)
    x_row = logits + row * logits_stride
    if tangent is None:
        level = shift + tl.log(total)
        _write_value(x_row, actions, row, value, level, num_columns)
        tl.store(logsumexp + row, level)
    else:
        t_row = tangent + row * tangent_stride
        level = weighted / total
        if block == 0:
            _write_value(t_row, actions, row, value, level, num_columns)
        if image is not None:
            columns = block * BLOCK + tl.arange(0, BLOCK)
            height = _height(scale, row, total)
            _write_image(x_row, t_row, image + row * num_columns, columns, shift, level, height, num_columns)


@triton.jit
def _gradient_kernel(
    logits, logits_stride, logsumexp, actions, weights, out, num_rows, num_columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a block of columns."""
    ACC: tl.constexpr = accumulator(logits.dtype.element_ty)
    blocks = tl.cdiv(num_columns, BLOCK)
    number = program()
    row = number // blocks * ROWS + tl.arange(0, ROWS)
    columns = (number % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_rows = row < num_rows
    mask = in_rows[:, None] & (columns < num_columns)
    level = tl.load(logsumexp + row, mask=in_rows, other=0.0)
    weight = tl.load(weights + row, mask=in_rows, other=0.0).to(ACC)
    x = tl.load(logits + (row * logits_stride)[:, None] + columns, mask=mask, other=0.0).to(ACC)
    product = -tl.exp(x - level[:, None])
    if actions is not None:
        action = tl.load(actions + row, mask=in_rows, other=0)
        weight = tl.where((action >= 0) & (action < num_columns), weight, float("nan"))
        product += (columns == action[:, None]).to(ACC)
    tl.store(out + row[:, None] * num_columns + columns, weight[:, None] * product, mask=mask)


@triton.jit
def _columns(start, LANES: tl.constexpr, GROUP: tl.constexpr):
    """(LANES, GROUP): neighbours go to one thread, which sums them by itself."""
    return start + tl.arange(0, LANES)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def _sweep(x_row, t_row, begin, end, LANES: tl.constexpr, GROUP: tl.constexpr):
    """Each thread's maximum m of x, Σ e^{x − m} and Σ e^{x − m} t over the columns begin … end−1.

    The maximum is raised on the way, and what is summed shrinks with it: Milakov and Gimelshein, "Online normalizer
    calculation for softmax" (2018). Threads go by themselves, since a barrier for every block would cost more than an
    exponential for every group.
    """
    ACC: tl.constexpr = accumulator(x_row.dtype.element_ty)
    peak = tl.full([LANES], float("-inf"), ACC)
    total = tl.zeros([LANES], ACC)
    weighted = tl.zeros([LANES], ACC)
    for start in range(begin, end, LANES * GROUP):
        columns = _columns(start, LANES, GROUP)
        x = tl.load(x_row + columns, mask=columns < end, other=float("-inf")).to(ACC)
        highest = tl.maximum(peak, tl.max(x, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        fade = tl.exp(peak - shift)
        raised = tl.exp(x - shift[:, None])
        total = total * fade + tl.sum(raised, 1)
        if t_row is not None:
            t = tl.load(t_row + columns, mask=columns < end, other=0.0).to(ACC)
            weighted = weighted * fade + tl.sum(raised * t, 1)
        peak = highest
    return peak, total, weighted


@triton.jit
def _merge(peak, total, weighted):
    """The same three of all together, but for a maximum of −∞, in place of which there is 0."""
    highest = tl.max(peak, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    fade = tl.exp(peak - shift)
    return shift, tl.sum(total * fade, 0), tl.sum(weighted * fade, 0)


@triton.jit
def _write_value(from_row, actions, row, value, level, num_columns):
    """The element at the row's action, without actions 0, less `level`."""
    if actions is None:
        tl.store(value + row, -level)
    else:
        action = tl.load(actions + row)
        inside = (action >= 0) & (action < num_columns)
        tl.store(value + row, tl.load(from_row + action, mask=inside, other=float("nan")) - level)


@triton.jit
def _height(scale, row, total):
    """What e^{x − m} (t − p·t) is multiplied with."""
    height = 1.0 / total
    if scale is not None:
        height *= tl.load(scale + row)
    return height


@triton.jit
def _write_image(x_row, t_row, out, columns, shift, level, height, num_columns):
    ACC: tl.constexpr = accumulator(x_row.dtype.element_ty)
    mask = columns < num_columns
    x = tl.load(x_row + columns, mask=mask, other=0.0).to(ACC)
    t = tl.load(t_row + columns, mask=mask, other=0.0).to(ACC)
    tl.store(out + columns, height * tl.exp(x - shift) * (t - level), mask=mask)
