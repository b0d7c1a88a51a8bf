"""What the scans in Triton are made of: which part of a trajectory a program takes, and the scan of a block.

A recurrence y_i = x_i + c_i · y_j, with j the step after i (reverse) or before, is a scan of pairs (c, x), Blelloch (1990).
It is taken block by block: each is scanned as if nothing came before, then the carry of the one before is added.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import program
from .triton_steps import spans

WHOLE, SUMMARY, REST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def chunks(offsets, steps, horizon, count, CHUNK: tl.constexpr, NUMBERS: tl.constexpr):
    """Trajectories (NUMBERS,), their start and stop, and the numbers of their first chunk and of the one after the last."""
    n, start, stop = spans(offsets, steps, horizon, count, 0, NUMBERS)
    number = (stop - start + CHUNK - 1) // CHUNK
    last = tl.cumsum(number, 0)
    return n, start, stop, last - number, last


@triton.jit
def part(
    offsets,
    steps,
    horizon,
    count,
    carries,
    REVERSE: tl.constexpr,
    PHASE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUMBERS: tl.constexpr,
    dtype: tl.constexpr,
):
    """What this program takes: trajectories (ROWS,), their start and stop, of them steps begin to end, and the carry."""
    if PHASE == WHOLE:
        n, start, stop = spans(offsets, steps, horizon, count, program() * ROWS, ROWS)
        return n, start, stop, start, stop, tl.zeros((ROWS,), dtype)
    else:
        chunk = program()
        if PHASE == REST:
            # The other way round: what was read last may still be in the cache.
            chunk = tl.num_programs(0) - 1 - chunk
        all, starts, stops, firsts, lasts = chunks(offsets, steps, horizon, count, CHUNK, NUMBERS)
        mine = (chunk >= firsts) & (chunk < lasts)
        one = tl.zeros((ROWS,), tl.int64)
        n = one + tl.sum(tl.where(mine, all, 0), 0)
        start = one + tl.sum(tl.where(mine, starts, 0), 0)
        stop = one + tl.sum(tl.where(mine, stops, 0), 0)
        first = one + tl.sum(tl.where(mine, firsts, 0), 0)
        begin = start + (chunk - first) * CHUNK
        end = tl.minimum(begin + CHUNK, stop)
        carry = tl.zeros((ROWS,), dtype)
        if PHASE == REST:
            if REVERSE:
                carry = tl.load(carries + chunk + 1 + one, mask=end < stop, other=0)
            else:
                carry = tl.load(carries + chunk - 1 + one, mask=(begin > start) & (begin < stop), other=0)
        return n, start, stop, begin, end, carry


@triton.jit
def _smallest(dtype: tl.constexpr):
    """The smallest positive number. A product of coefficients that is below it, none of them 0, becomes this, so that it
    takes an infinity to an infinity, as its factors would one after another, and what is finite to next to nothing."""
    return tl.full((), 1.401298464324817e-45 if dtype == tl.float32 else 5e-324, dtype)


@triton.jit
def _product(c, c_next):
    """c · c_next of numbers in [0, 1]."""
    return tl.maximum(c * c_next, tl.minimum(tl.minimum(c, c_next), _smallest(c.dtype)))


@triton.jit
def _product_within_range(c, c_next):
    """c · c_next, held in the range of numbers: where it meets a carry or a c of 0, the recurrence has no NaN.

    The smallest number stays what it is: factors that follow would not bring back what was lost, either.
    """
    largest = 3.4028234663852886e38 if c.dtype == tl.float32 else 1.7976931348623157e308
    product = tl.maximum(c * c_next, -largest, propagate_nan=tl.PropagateNan.ALL)
    product = tl.minimum(product, largest, propagate_nan=tl.PropagateNan.ALL)
    smallest = _smallest(c.dtype)
    lower = tl.minimum(tl.abs(c), tl.abs(c_next), propagate_nan=tl.PropagateNan.ALL)
    lost = (lower > 0) & ((lower <= smallest) | (product == 0))
    return tl.where(lost, tl.where((c < 0) != (c_next < 0), -smallest, smallest), product)


@triton.jit
def _then(c, y, c_next, y_next):
    """Two stretches of a recurrence as one: y = y_next + c_next · (y + c · y before)."""
    return _product(c, c_next), y_next + c_next * y


@triton.jit
def _then_within_range(c, y, c_next, y_next):
    return _product_within_range(c, c_next), y_next + c_next * y


@triton.jit
def _mirrored_2(x):
    first, second = tl.split(x)
    return tl.join(second, first)


@triton.jit
def _mirrored_4(x):
    even, odd = tl.split(x)
    return tl.join(_mirrored_2(odd), _mirrored_2(even))


@triton.jit
def _mirrored_8(x):
    even, odd = tl.split(x)
    return tl.join(_mirrored_4(odd), _mirrored_4(even))


@triton.jit
def _mirrored(x, VECTOR: tl.constexpr):
    """x (ROWS, BLOCK), each vector the other way round: only within threads, where `tl.associative_scan(…, reverse=True)`
    exchanges all elements between them, twice."""
    ROWS: tl.constexpr = x.shape[0]
    BLOCK: tl.constexpr = x.shape[1]
    if VECTOR == 8:
        x = _mirrored_8(tl.reshape(x, (ROWS, BLOCK // 8, 2, 2, 2)))
    elif VECTOR == 4:
        x = _mirrored_4(tl.reshape(x, (ROWS, BLOCK // 4, 2, 2)))
    elif VECTOR == 2:
        x = _mirrored_2(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
    return tl.reshape(x, (ROWS, BLOCK))


@triton.jit
def scan(c, x, carry, product, REVERSE: tl.constexpr, BOUNDED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """y of a block (ROWS, BLOCK) of pairs c, x, from `carry` (ROWS,); the next carry, and `product` times all c.

    BOUNDED: every c is in [0, 1].
    """
    if REVERSE:
        c, x = _mirrored(c, VECTOR), _mirrored(x, VECTOR)
    if BOUNDED:
        c, x = tl.associative_scan((c, x), 1, _then)
    else:
        c, x = tl.associative_scan((c, x), 1, _then_within_range)
    y = x + c * carry[:, None]
    last = tl.arange(0, BLOCK)[None, :] == BLOCK - 1
    carry = tl.sum(tl.where(last, y, 0), 1)
    product = _product_within_range(product, tl.sum(tl.where(last, c, 0), 1))
    if REVERSE:
        y = _mirrored(y, VECTOR)
    return y, carry, product


@triton.jit
def summarise(sums, products, carry, product, ROWS: tl.constexpr):
    """Write what a chunk makes of a carry: carry + product · it."""
    here = program() + tl.arange(0, ROWS)
    tl.store(sums + here, carry)
    tl.store(products + here, product)
