"""Which steps of ragged data a program takes, and how it reads and writes them.

A tile is (ROWS, BLOCK): some steps of each of several segments, which lie wherever the offsets say. Elements are read
and written in vectors of 16 bytes where those lie within a segment, and one by one at its ends. So a thread holds
neighbours, and what it makes of them is exchanged once: with single elements the exchange, not memory, would limit a scan.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spans(offsets, steps, horizon, count, first, ROWS: tl.constexpr):
    """Segments first, first + 1, … (ROWS,), where they start and stop: within the steps, whatever the offsets hold.

    Without offsets each is `horizon` steps long.
    """
    n = first + tl.arange(0, ROWS).to(tl.int64)
    known = n < count
    if offsets is None:
        start = tl.where(known, n * horizon, 0)
        stop = tl.where(known, start + horizon, 0)
    else:
        start = tl.load(offsets + n, mask=known, other=0)
        stop = tl.load(offsets + n + 1, mask=known, other=0)
        start = tl.minimum(tl.maximum(start, 0), steps)
        stop = tl.minimum(tl.maximum(stop, start), steps)
    return n, start, stop


@triton.jit
def bounds(begin, end, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Where blocks begin, where they end, at whole vectors around begin and end (ROWS,), and the most blocks of a row."""
    low = begin // VECTOR * VECTOR
    high = (end + VECTOR - 1) // VECTOR * VECTOR
    return low, high, tl.max((high - low + BLOCK - 1) // BLOCK, 0)


@triton.jit
def places(low, high, begin, end, k, REVERSE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Block k, upwards from `low` or downwards from `high`: its first step in each row (ROWS, 1), its lanes (1, BLOCK),
    which of them lie between begin and end (ROWS, BLOCK), and which in whole vectors that do.

    In reverse the last vector comes first, each as it lies in memory.
    """
    base = (high - (k + 1) * BLOCK if REVERSE else low + k * BLOCK)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    vector = lane // VECTOR * VECTOR
    if REVERSE:
        vector = BLOCK - VECTOR - vector
        lane = vector + lane % VECTOR
    first, last = lane_of(begin, base, BLOCK), lane_of(end, base, BLOCK)
    inside = (lane >= first) & (lane < last)
    whole = (vector >= first) & (vector + VECTOR <= last)
    return base, lane, inside, whole


@triton.jit
def lane_of(step, base, BLOCK: tl.constexpr):
    """Where `step` (ROWS,) is in the block, int32, as far as that makes a difference: each lane's own step would take two
    registers."""
    return tl.minimum(tl.maximum(step[:, None] - base, -2), BLOCK + 2).to(tl.int32)


@triton.jit
def load(pointer, base, lane, inside, whole, dtype: tl.constexpr):
    """The elements inside, 0 elsewhere."""
    vectors = tl.load(pointer + base + lane, mask=whole, other=0)
    single = tl.load(pointer + base + lane, mask=inside & ~whole, other=0)
    return tl.where(whole, vectors, single).to(dtype)


@triton.jit
def store(pointer, base, lane, value, inside, whole):
    value = value.to(pointer.dtype.element_ty)
    tl.store(pointer + base + lane, value, mask=whole)
    tl.store(pointer + base + lane, value, mask=inside & ~whole)
