"""Estimates of f-divergences in Triton. Contract: `parl_core/ops/f_divergence.py`.

One pass over memory gives the value Σ w g(r), its gradient w g′(r), and of a vector v the second-order product w g″(r) v
and the slope Σ w g′(r) v. It moves 8 bytes of float32 for an element's gradient and 12 for its product; its arithmetic
hides behind that up to some 70 instructions an element. Every program leaves its sums in double precision, and one
program adds them, in the order of their places: no atomics, and the same bits for the same numbers.

What is summed is computed in the precision of the log-ratios, single for half. Where a program's sum is not well within
single precision, it does its part again in double precision, in which single summands do not overflow.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import LAUNCH, number, program
from .triton_divergence_terms import jet

# Steps of one program, 8 for each thread of 8 warps: two loads of 16 bytes in flight for a thread, 64 KiB for a
# multiprocessor that holds 2048 of them, twice what hides the latency of an H200's memory.
_BLOCK = 2048
_WARPS = 8
# Steps that a program does at once in double precision, one for each thread.
_CHUNK = 256
# Steps of a trajectory that a program takes at once, at least and at most.
_COLUMNS = (16, 1024)
# Programs beyond which each may take several trajectories: two for each of an H200's multiprocessors.
_PROGRAMS = 264
# From this mean length on, trajectories are taken in parts of the second number of steps.
_LONG, _LONG_CHUNK = 16384, 8192
# Sums that the last program adds at once.
_SUMS = 4096
# Sums of float terms beyond this are taken again in double precision.
_TRUSTED = tl.constexpr(1e30)


@triton.jit
def _is_untrusted(total):
    return (tl.abs(total) < _TRUSTED) == 0  # a NaN is not below it, either


@triton.jit
def _load(steps, place, count, masked: tl.constexpr, dtype: tl.constexpr):
    """Steps at `place`, 0 from `count` on, which is where a ratio is 1 and every f is 0.

    Only a program at the end masks: to masks the compiler does not load whole vectors.
    """
    if masked:
        return tl.load(steps + place, mask=place < count, other=0.0).to(dtype)
    else:
        return tl.load(steps + place).to(dtype)


@triton.jit
def _store(out, place, values, count, masked: tl.constexpr):
    if masked:
        tl.store(out + place, values, mask=place < count)
    else:
        tl.store(out + place, values)


@triton.jit
def _part_of_terms(
    log_ratio,
    out,
    place,
    count,
    alpha,
    function: tl.constexpr,
    flipped: tl.constexpr,
    over_ratio: tl.constexpr,
    order: tl.constexpr,
    dtype: tl.constexpr,
    masked: tl.constexpr,
):
    r = _load(log_ratio, place, count, masked, dtype)
    derivatives = jet(r, number(alpha, dtype), function, flipped, over_ratio)
    _store(out, place, derivatives[order], count, masked)


@triton.jit
def terms_kernel(
    log_ratio,
    out,
    count,
    alpha: tl.float64,
    function: tl.constexpr,
    flipped: tl.constexpr,
    over_ratio: tl.constexpr,
    order: tl.constexpr,
    dtype: tl.constexpr,
    block: tl.constexpr,
):
    """Write the derivative of `order` 0, 1 or 2 of the summand at every log-ratio (count,)."""
    first = program(0) * block
    place = first + tl.arange(0, block)
    if first + block <= count:
        _part_of_terms(
            log_ratio, out, place, count, alpha, function, flipped, over_ratio, order, dtype, masked=False
        )  # fmt: skip
    else:
        _part_of_terms(
            log_ratio, out, place, count, alpha, function, flipped, over_ratio, order, dtype, masked=True
        )  # fmt: skip


@triton.jit
def _part_of_sum(
    log_ratio,
    weights,
    vector,
    cotangent,
    gradient,
    product,
    first,
    count,
    scale,
    alpha,
    function: tl.constexpr,
    flipped: tl.constexpr,
    over_ratio: tl.constexpr,
    dtype: tl.constexpr,
    size: tl.constexpr,
    masked: tl.constexpr,
):
    """Σ w g and Σ w g′v, without `scale`, of `size` samples from `first`; writes their gradient and product."""
    place = first + tl.arange(0, size)
    r = _load(log_ratio, place, count, masked, dtype)
    value, slope, curvature = jet(r, number(alpha, dtype), function, flipped, over_ratio)
    if weights is not None:
        weight = _load(weights, place, count, masked, dtype)
        value = value * weight
        slope = slope * weight
        curvature = curvature * weight
    factor = number(scale, dtype)
    if gradient is not None:
        _store(gradient, place, slope * factor, count, masked)
    along = slope
    if vector is not None:
        v = _load(vector, place, count, masked, dtype)
        if cotangent is not None:
            factor = factor * tl.load(cotangent).to(dtype)
        _store(product, place, curvature * factor * v, count, masked)
        along = slope * v
    return tl.sum(value).to(tl.float64), tl.sum(along).to(tl.float64)


@triton.jit
def sum_kernel(
    log_ratio,
    weights,
    vector,
    cotangent,
    gradient,
    product,
    values,
    slopes,
    count,
    scale: tl.float64,
    alpha: tl.float64,
    function: tl.constexpr,
    flipped: tl.constexpr,
    over_ratio: tl.constexpr,
    dtype: tl.constexpr,
    block: tl.constexpr,
    chunk: tl.constexpr,
):
    """Samples are the elements of `log_ratio` (count,). Leaves in values and slopes (programs,) each program's sums."""
    part = program(0)
    first = part * block
    if first + block <= count:
        value, along = _part_of_sum(
            log_ratio, weights, vector, cotangent, gradient, product, first, count, scale, alpha,
            function, flipped, over_ratio, dtype, block, masked=False,
        )  # fmt: skip
    else:
        value, along = _part_of_sum(
            log_ratio, weights, vector, cotangent, gradient, product, first, count, scale, alpha,
            function, flipped, over_ratio, dtype, block, masked=True,
        )  # fmt: skip
    if dtype == tl.float32:
        if _is_untrusted(value):
            value = tl.full((), 0.0, tl.float64)
            along = tl.full((), 0.0, tl.float64)
            for begin in range(0, block, chunk):
                more, more_along = _part_of_sum(
                    log_ratio, weights, vector, cotangent, gradient, product, first + begin, count, scale, alpha,
                    function, flipped, over_ratio, tl.float64, chunk, masked=True,
                )  # fmt: skip
                value += more
                along += more_along
    if values is not None:
        tl.store(values + part, value)
    if slopes is not None:
        tl.store(slopes + part, along)


@triton.jit
def _row_sums(steps, start, stop, longest, dtype: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Σ steps[start:stop] of every row, in double precision beyond the first columns."""
    sums = tl.zeros((rows,), tl.float64)
    for begin in range(0, longest, columns):
        place = (start + begin)[:, None] + tl.arange(0, columns)[None, :]
        part = tl.load(steps + place, mask=place < stop[:, None], other=0.0).to(dtype)
        sums += tl.sum(part, 1).to(tl.float64)
    return sums


@triton.jit
def _fill_rows(out, values, start, stop, longest, rows: tl.constexpr, columns: tl.constexpr):
    """Write a row's value to all its steps."""
    for begin in range(0, longest, columns):
        place = (start + begin)[:, None] + tl.arange(0, columns)[None, :]
        tl.store(out + place, tl.broadcast_to(values[:, None], (rows, columns)), mask=place < stop[:, None])


@triton.jit
def _rows_of_sum(
    sums,
    moved,
    weights,
    cotangent,
    samples,
    inside,
    scale,
    alpha,
    function: tl.constexpr,
    flipped: tl.constexpr,
    over_ratio: tl.constexpr,
    dtype: tl.constexpr,
):
    """Of samples with the log-ratios `sums`: Σ w g, Σ w g′v, their gradients, and their products with v, `moved`."""
    value, slope, curvature = jet(sums.to(dtype), number(alpha, dtype), function, flipped, over_ratio)
    if weights is not None:
        weight = tl.load(weights + samples, mask=inside, other=0.0).to(dtype)
        value = value * weight
        slope = slope * weight
        curvature = curvature * weight
    along = slope * moved.to(dtype)
    factor = number(scale, dtype)
    slope = slope * factor
    if cotangent is not None:
        factor = factor * tl.load(cotangent).to(dtype)
    product = curvature * factor * moved.to(dtype)
    return tl.sum(value).to(tl.float64), tl.sum(along).to(tl.float64), slope, product


@triton.jit
def trajectory_sum_kernel(
    log_ratio,
    offsets,
    weights,
    vector,
    cotangent,
    gradient,
    product,
    values,
    slopes,
    count,
    trajectories,
    scale: tl.float64,
    alpha: tl.float64,
    function: tl.constexpr,
    flipped: tl.constexpr,
    over_ratio: tl.constexpr,
    dtype: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Samples are trajectories: their log-ratios are sums over log_ratio[offsets[n]:offsets[n + 1]], those of v alike.

    A program takes `rows` of them, `columns` steps of each at a time.
    """
    part = program(0)
    samples = part * rows + tl.arange(0, rows)
    inside = samples < trajectories
    start = tl.load(offsets + samples, mask=inside, other=0)
    stop = tl.load(offsets + samples + 1, mask=inside, other=0)
    # Whatever the offsets hold, nothing outside is touched.
    start = tl.maximum(start, 0)
    stop = tl.minimum(stop, count)
    longest = tl.max(stop - start)
    sums = _row_sums(log_ratio, start, stop, longest, dtype, rows, columns)
    moved = tl.zeros((rows,), tl.float64)
    if vector is not None:
        moved = _row_sums(vector, start, stop, longest, dtype, rows, columns)
    value, along, slope, curvature = _rows_of_sum(
        sums, moved, weights, cotangent, samples, inside, scale, alpha, function, flipped, over_ratio, dtype
    )
    if dtype == tl.float32:
        if _is_untrusted(value):
            value, along, wide_slope, wide_curvature = _rows_of_sum(
                sums, moved, weights, cotangent, samples, inside, scale, alpha, function, flipped, over_ratio, tl.float64
            )
            slope = wide_slope.to(tl.float32)
            curvature = wide_curvature.to(tl.float32)
    if gradient is not None:
        _fill_rows(gradient, slope, start, stop, longest, rows, columns)
    if vector is not None:
        _fill_rows(product, curvature, start, stop, longest, rows, columns)
    if values is not None:
        tl.store(values + part, value)
    if slopes is not None:
        tl.store(slopes + part, along)


@triton.jit
def total_kernel(parts, out, count, scale: tl.float64, width: tl.constexpr):
    """Write scale · Σ parts (count,), in double precision until it is stored."""
    lanes = tl.arange(0, width)
    sums = tl.zeros((width,), tl.float64)
    for begin in range(0, count, width):
        sums += tl.load(parts + begin + lanes, mask=begin + lanes < count, other=0.0)
    tl.store(out, tl.sum(sums) * scale)


@triton.jit
def chunk_sums_kernel(
    steps, offsets, sums, count, chunks, dtype: tl.constexpr, block: tl.constexpr
):
    """Write the sums (N, chunks) of a long trajectory's equal parts, one for each program."""
    first, last = _chunk(offsets, count, chunks)
    lanes = tl.arange(0, block)
    sum = tl.zeros((), tl.float64)
    for begin in range(first, last, block):
        part = tl.load(steps + begin + lanes, mask=begin + lanes < last, other=0.0).to(dtype)
        sum += tl.sum(part).to(tl.float64)
    tl.store(sums + program(0) * chunks + program(1), sum)


@triton.jit
def fill_chunks_kernel(out, values, offsets, count, chunks, block: tl.constexpr):
    """Write the values (N, chunks) of the parts to all their steps."""
    first, last = _chunk(offsets, count, chunks)
    value = tl.load(values + program(0) * chunks + program(1))
    lanes = tl.arange(0, block)
    for begin in range(first, last, block):
        tl.store(out + begin + lanes, tl.full((block,), value, value.dtype), mask=begin + lanes < last)


@triton.jit
def _chunk(offsets, count, chunks):
    """The steps of part program(1) of trajectory program(0)."""
    start = tl.maximum(tl.load(offsets + program(0)), 0)
    stop = tl.minimum(tl.load(offsets + program(0) + 1), count)
    size = tl.cdiv(stop - start, chunks)
    first = start + program(1) * size
    return first, tl.minimum(first + size, stop)


def divergence_terms(log_ratio: Tensor, term: Any, order: int) -> Tensor:
    """The derivative of `order` 0, 1 or 2 of the summand of `term` at every log-ratio (T,)."""
    out = torch.empty_like(log_ratio)
    count = log_ratio.numel()
    if count == 0:
        return out
    function, flipped, over_ratio, alpha = term
    with torch.cuda.device_of(log_ratio):
        terms_kernel[(triton.cdiv(count, _BLOCK),)](
            log_ratio, out, count, alpha, function, flipped, over_ratio, order, _precision(log_ratio), _BLOCK,
            num_warps=_WARPS, **LAUNCH,
        )  # fmt: skip
    return out


def divergence_sum(
    log_ratio: Tensor, offsets: Tensor | None, weights: Tensor | None, term: Any, gradient: Tensor | None
) -> Tensor:
    """Σ w g (), whose gradient (T,) is written into `gradient`."""
    value = log_ratio.new_empty(())
    divergence(log_ratio, offsets, weights, term, value=value, gradient=gradient)
    return value


def divergence_product(
    log_ratio: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    term: Any,
    vector: Tensor,
    cotangent: Tensor,
) -> tuple[Tensor, Tensor]:
    """The Hessian of cotangent · Σ w g times `vector` (T,), and the slope of Σ w g along it ()."""
    product, slope = torch.empty_like(log_ratio), log_ratio.new_empty(())
    divergence(
        log_ratio, offsets, weights, term, vector=vector, cotangent=cotangent, product=product, slope=slope
    )
    return product, slope


def divergence(
    log_ratio: Tensor,  # (T,)
    offsets: Tensor | None,  # (N+1,); None: every element is a sample
    weights: Tensor | None,  # (N,); None: 1/N each
    term: Any,
    *,
    value: Tensor | None = None,  # ()
    gradient: Tensor | None = None,  # (T,)
    vector: Tensor | None = None,  # (T,)
    cotangent: Tensor | None = None,  # (); None: 1
    product: Tensor | None = None,  # (T,)
    slope: Tensor | None = None,  # ()
) -> None:
    """Write, of what is given, the value Σ w g and its gradient w g′, in one pass; in the same pass with a vector v, which
    `product` and `slope` need, the product cotangent · w g″v and the slope Σ w g′v.
    """
    with torch.cuda.device_of(log_ratio):
        if offsets is None:
            _sum(log_ratio, weights, term, value, gradient, vector, cotangent, product, slope)
        elif log_ratio.numel() < _LONG * (offsets.numel() - 1):
            _sum_trajectories(
                log_ratio, offsets, weights, term, value, gradient, vector, cotangent, product, slope
            )
        else:
            _sum_long_trajectories(
                log_ratio, offsets, weights, term, value, gradient, vector, cotangent, product, slope
            )


def _sum(
    log_ratio: Tensor,
    weights: Tensor | None,
    term: Any,
    value: Tensor | None,
    gradient: Tensor | None,
    vector: Tensor | None,
    cotangent: Tensor | None,
    product: Tensor | None,
    slope: Tensor | None,
) -> None:
    count = log_ratio.numel()
    programs = triton.cdiv(count, _BLOCK)
    values, slopes = (_parts(out, programs, log_ratio) for out in (value, slope))
    function, flipped, over_ratio, alpha = term
    scale = 1.0 / count if weights is None else 1.0
    sum_kernel[(programs,)](
        log_ratio, weights, vector, cotangent, gradient, product, values, slopes, count, scale, alpha,
        function, flipped, over_ratio, _precision(log_ratio), _BLOCK, _CHUNK, num_warps=_WARPS, **LAUNCH,
    )  # fmt: skip
    _total(values, value, scale)
    _total(slopes, slope, scale)


def _sum_trajectories(
    log_ratio: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    term: Any,
    value: Tensor | None,
    gradient: Tensor | None,
    vector: Tensor | None,
    cotangent: Tensor | None,
    product: Tensor | None,
    slope: Tensor | None,
    dtype: tl.dtype | None = None,
) -> None:
    count, trajectories = log_ratio.numel(), offsets.numel() - 1
    columns = min(max(triton.next_power_of_2(triton.cdiv(count, trajectories)), _COLUMNS[0]), _COLUMNS[1])
    rows = _BLOCK // columns
    while rows > 1 and trajectories < rows * _PROGRAMS:
        rows //= 2
    programs = triton.cdiv(trajectories, rows)
    values, slopes = (_parts(out, programs, log_ratio) for out in (value, slope))
    function, flipped, over_ratio, alpha = term
    scale = 1.0 / trajectories if weights is None else 1.0
    trajectory_sum_kernel[(programs,)](
        log_ratio, offsets, weights, vector, cotangent, gradient, product, values, slopes, count, trajectories,
        scale, alpha, function, flipped, over_ratio, dtype or _precision(log_ratio), rows, columns,
        num_warps=_WARPS, **LAUNCH,
    )  # fmt: skip
    _total(values, value, scale)
    _total(slopes, slope, scale)


def _sum_long_trajectories(
    log_ratio: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    term: Any,
    value: Tensor | None,
    gradient: Tensor | None,
    vector: Tensor | None,
    cotangent: Tensor | None,
    product: Tensor | None,
    slope: Tensor | None,
) -> None:
    """By parts, so that all multiprocessors share a trajectory: their sums, the terms of those, and back to the steps."""
    count, trajectories = log_ratio.numel(), offsets.numel() - 1
    chunks = triton.cdiv(count, trajectories * _LONG_CHUNK)
    grid = (trajectories, chunks)
    dtype = _precision(log_ratio)

    def sums(steps: Tensor | None) -> Tensor | None:
        if steps is None:
            return None
        out = steps.new_empty(trajectories * chunks, dtype=torch.float64)
        chunk_sums_kernel[grid](steps, offsets, out, count, chunks, dtype, _BLOCK, num_warps=_WARPS, **LAUNCH)
        return out

    def of_parts(out: Tensor | None) -> Tensor | None:
        return None if out is None else out.new_empty(trajectories * chunks)

    def fill(out: Tensor | None, values: Tensor | None) -> None:
        if out is not None:
            fill_chunks_kernel[grid](out, values, offsets, count, chunks, _BLOCK, num_warps=_WARPS, **LAUNCH)

    parts = torch.arange(0, trajectories * chunks + 1, chunks, device=offsets.device)
    gradients, products = of_parts(gradient), of_parts(product)
    _sum_trajectories(
        sums(log_ratio), parts, weights, term, value, gradients, sums(vector), cotangent, products, slope, dtype
    )
    fill(gradient, gradients)
    fill(product, products)


def _parts(out: Tensor | None, programs: int, like: Tensor) -> Tensor | None:
    return None if out is None else like.new_empty(programs, dtype=torch.float64)


def _total(parts: Tensor | None, out: Tensor | None, scale: float) -> None:
    if parts is not None:
        total_kernel[(1,)](parts, out, parts.numel(), scale, _SUMS, num_warps=_WARPS, **LAUNCH)


def _precision(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
