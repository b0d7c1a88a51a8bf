"""The kernels of f-divergence estimates in Triton; `triton_divergence` launches them.

A program computes its samples' values, gradients and products as it has them in registers, and leaves its sums in double
precision, which are added in the order of their places: no atomics, and the same bits for the same numbers.

Summands are computed in the precision `dtype`. Where a program's sums are not well within single precision, with weights or
without, it does its part again in double precision, in which single summands do not overflow.

What kernels are given is left out by None. The constants function, flipped and over_ratio are `f_divergence_terms.Term`'s.
"""

import triton
import triton.language as tl

from .triton_common import accumulator, number, program
from .triton_divergence_terms import jet

# Sums of float terms beyond this are taken again in double precision. What is below bounds first and second derivatives,
# too: they exceed a large summand by small factors only. Weights of 1e-10 and the like must not hide one.
_TRUSTED = tl.constexpr(1e30)


@triton.jit
def _is_untrusted(value, unweighted):
    return ((tl.abs(value) < _TRUSTED) & (tl.abs(unweighted) < _TRUSTED)) == 0  # a NaN is not below it, either


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
def _narrowed(values, out):
    """Values in the dtype in which `out` holds them: half precision by way of single, as all GPUs do."""
    if out.dtype.element_ty == tl.float64:
        return values.to(tl.float64)
    else:
        return values.to(tl.float32).to(out.dtype.element_ty)


@triton.jit
def _store(out, place, values, count, masked: tl.constexpr):
    values = _narrowed(values, out)
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
    first = program() * block
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
    """Σ g, Σ w g and Σ w g′v, without `scale`, of `size` samples from `first`; writes their gradient and product."""
    place = first + tl.arange(0, size)
    r = _load(log_ratio, place, count, masked, dtype)
    value, slope, curvature = jet(r, number(alpha, dtype), function, flipped, over_ratio)
    unweighted = value
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
    return tl.sum(unweighted).to(tl.float64), tl.sum(value).to(tl.float64), tl.sum(along).to(tl.float64)


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
    part = program()
    first = part * block
    if first + block <= count:
        unweighted, value, along = _part_of_sum(
            log_ratio, weights, vector, cotangent, gradient, product, first, count, scale, alpha,
            function, flipped, over_ratio, dtype, block, masked=False,
        )  # fmt: skip
    else:
        unweighted, value, along = _part_of_sum(
            log_ratio, weights, vector, cotangent, gradient, product, first, count, scale, alpha,
            function, flipped, over_ratio, dtype, block, masked=True,
        )  # fmt: skip
    if dtype == tl.float32:  # noqa: SIM102, or the constant condition would not spare the compiler what is within
        if _is_untrusted(value, unweighted):
            value = tl.full((), 0.0, tl.float64)
            along = tl.full((), 0.0, tl.float64)
            for begin in range(0, block, chunk):
                _, more, more_along = _part_of_sum(
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
def _row_sums(steps, start, stop, longest, rows: tl.constexpr, columns: tl.constexpr):
    """Σ steps[start:stop] of every row; sums over `columns` steps are added in double precision."""
    dtype: tl.constexpr = accumulator(steps.dtype.element_ty)
    sums = tl.zeros((rows,), tl.float64)
    # In double precision the columns are added first: the compiler fails on sums of sums that need no conversion.
    columnwise = tl.zeros((rows, columns), tl.float64)
    for begin in range(0, longest, columns):
        place = (start + begin)[:, None] + tl.arange(0, columns)[None, :]
        part = tl.load(steps + place, mask=place < stop[:, None], other=0.0).to(dtype)
        if dtype == tl.float64:
            columnwise += part
        else:
            sums += tl.sum(part, 1).to(tl.float64)
    if dtype == tl.float64:
        sums = tl.sum(columnwise, 1)
    return sums


@triton.jit
def _fill_rows(out, values, start, stop, longest, rows: tl.constexpr, columns: tl.constexpr):
    """Write a row's value to all its steps."""
    for begin in range(0, longest, columns):
        place = (start + begin)[:, None] + tl.arange(0, columns)[None, :]
        tl.store(
            out + place, tl.broadcast_to(_narrowed(values, out)[:, None], (rows, columns)), mask=place < stop[:, None]
        )


@triton.jit
def _terms_of(
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
    """Of trajectories with the log-ratios `sums`, one or many: g, w g, w g′v, their gradients, products with v = `moved`."""
    value, slope, curvature = jet(sums.to(dtype), number(alpha, dtype), function, flipped, over_ratio)
    unweighted = value
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
    return unweighted, value, along, slope, product


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
    part = program()
    samples = part * rows + tl.arange(0, rows)
    inside = samples < trajectories
    start = tl.load(offsets + samples, mask=inside, other=0)
    stop = tl.load(offsets + samples + 1, mask=inside, other=0)
    # Whatever the offsets hold, nothing outside is touched.
    start = tl.maximum(start, 0)
    stop = tl.minimum(stop, count)
    longest = tl.max(stop - start)
    sums = _row_sums(log_ratio, start, stop, longest, rows, columns)
    moved = tl.zeros((rows,), tl.float64)
    if vector is not None:
        moved = _row_sums(vector, start, stop, longest, rows, columns)
    row_unweighted, row_values, row_alongs, slope, curvature = _terms_of(
        sums, moved, weights, cotangent, samples, inside, scale, alpha, function, flipped, over_ratio, dtype
    )
    unweighted = tl.sum(row_unweighted).to(tl.float64)
    value = tl.sum(row_values).to(tl.float64)
    along = tl.sum(row_alongs).to(tl.float64)
    if dtype == tl.float32:  # noqa: SIM102, or the constant condition would not spare the compiler what is within
        if _is_untrusted(value, unweighted):
            value = tl.full((), 0.0, tl.float64)
            along = tl.full((), 0.0, tl.float64)
            # One by one: all at once would take most registers of a thread, in every program.
            for row in range(0, rows):
                here = tl.arange(0, rows) == row
                _, more, more_along, row_slope, row_curvature = _terms_of(
                    tl.sum(tl.where(here, sums, 0.0)),
                    tl.sum(tl.where(here, moved, 0.0)),
                    weights,
                    cotangent,
                    part * rows + row,
                    part * rows + row < trajectories,
                    scale,
                    alpha,
                    function,
                    flipped,
                    over_ratio,
                    tl.float64,
                )
                value += more
                along += more_along
                slope = tl.where(here, row_slope.to(tl.float32), slope)
                curvature = tl.where(here, row_curvature.to(tl.float32), curvature)
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
    """Write scale · Σ parts[width·i : width·(i + 1)] of parts (count,), in double precision until it is stored."""
    place = program() * width + tl.arange(0, width)
    total = tl.sum(tl.load(parts + place, mask=place < count, other=0.0))
    tl.store(out + program(), _narrowed(total * scale, out))


@triton.jit
def _chunk(offsets, count, chunks):
    """The steps of this program: of part number % chunks of trajectory number // chunks."""
    trajectory = program() // chunks
    start = tl.maximum(tl.load(offsets + trajectory), 0)
    stop = tl.minimum(tl.load(offsets + trajectory + 1), count)
    size = tl.cdiv(stop - start, chunks)
    first = start + program() % chunks * size
    return first, tl.minimum(first + size, stop)


@triton.jit
def chunk_sums_kernel(steps, offsets, sums, count, chunks, block: tl.constexpr):
    """Write the sums (N, chunks) of a long trajectory's equal parts, one for each program."""
    first, last = _chunk(offsets, count, chunks)
    lanes = tl.arange(0, block)
    dtype: tl.constexpr = accumulator(steps.dtype.element_ty)
    total = tl.full((), 0.0, tl.float64)
    for begin in range(first, last, block):
        part = tl.load(steps + begin + lanes, mask=begin + lanes < last, other=0.0).to(dtype)
        total += tl.sum(part).to(tl.float64)
    tl.store(sums + program(), total)


@triton.jit
def fill_chunks_kernel(out, values, offsets, count, chunks, block: tl.constexpr):
    """Write the values (N, chunks) of the parts to all their steps."""
    first, last = _chunk(offsets, count, chunks)
    value = tl.load(values + program())
    lanes = tl.arange(0, block)
    for begin in range(first, last, block):
        tl.store(out + begin + lanes, tl.full((block,), value, value.dtype), mask=begin + lanes < last)


@triton.jit
def scale_kernel(steps, factor, count, block: tl.constexpr):
    """Multiply steps (count,) by factor (). Where that is 1, which the host does not know, nothing of them moves."""
    by = tl.load(factor)
    if by != 1:
        place = program() * block + tl.arange(0, block)
        inside = place < count
        values = tl.load(steps + place, mask=inside, other=0.0)
        dtype: tl.constexpr = accumulator(steps.dtype.element_ty)
        tl.store(steps + place, _narrowed(values.to(dtype) * by.to(dtype), steps), mask=inside)
