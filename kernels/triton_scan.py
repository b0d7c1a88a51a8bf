"""Scans along trajectories in Triton. Contracts: `parl_core/ops/{recurrence,gae,vtrace}.py`.

Which steps a program takes is decided by their number and that of the trajectories alone:

    WHOLE                   as many trajectories as fill a tile of (trajectories, steps), or one of many tiles
    SUMMARY, carries, REST  chunks of few long trajectories, on all multiprocessors: c and x of each chunk as a whole, the
                            recurrence over the chunks, and the chunks again, each from its carry. All is read twice.

So one long trajectory among many short ones is taken by one program, tile after tile, while the others have long ended:
how long trajectories are is known on the GPU only, and is not asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from parl_core.ops.accelerators import interpreted

from .triton_common import LAUNCH, accumulator, autotune, number, program
from .triton_scan_parts import REST, SUMMARY, WHOLE, chunks, part, scan, summarise
from .triton_steps import bounds, lane_of, load, places, store


class _Sizes(NamedTuple):
    block: int
    """Most bytes of one trajectory in a tile."""
    tiles: tuple[int, ...]
    """To choose from: bytes of a tile, in the dtype that is computed in."""
    few: int
    """Up to so many trajectories …"""
    long: int
    """… of at least so many steps on average are taken in chunks …"""
    chunk: int
    """… of at least so many steps …"""
    most_chunks: int
    """… and about so many of them."""


# A tile of 8 KiB is 16 floats for each of 128 threads, as many as their registers hold beside what else they need; some ten
# tiles at a time on a multiprocessor cover the latency of memory. Up to some 30 tiles one after another, of about a
# microsecond each, should cost less than reading twice and two launches more. Reckoned for an H200, not measured.
_SIZES = _Sizes(block=1 << 12, tiles=(1 << 13, 1 << 12), few=256, long=1 << 15, chunk=1 << 13, most_chunks=2048)
_WARPS = 4
if interpreted():  # slow, so small; and boundaries are where mistakes are
    _SIZES = _Sizes(block=256, tiles=(1024,), few=4, long=250, chunk=300, most_chunks=8)

# More or fewer trajectories in a tile; what is done along one is the same.
_CONFIGS = [triton.Config({"SIZE": size}, num_warps=_WARPS) for size in _SIZES.tiles]
_KEY = ["scale", "REVERSE", "PHASE", "BLOCK"]


@autotune(_CONFIGS, _KEY)
@triton.jit(do_not_specialize=["scale"])
def recurrence_kernel(
    values,
    coefficients,
    out,
    sums,
    products,
    carries,
    offsets,
    steps: tl.int64,
    horizon: tl.int64,
    count: tl.int64,
    discount: tl.float64,
    scale,
    REVERSE: tl.constexpr,
    PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    NUMBERS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """y_h = x_h + c_{h−1} · y_{h−1}, or x_h + c_h · y_{h+1}; c: `coefficients`, or `discount` where there are none."""
    dtype: tl.constexpr = accumulator(values.dtype.element_ty)
    VECTOR: tl.constexpr = 128 // values.dtype.element_ty.primitive_bitwidth
    ELEMENTS: tl.constexpr = SIZE * 8 // dtype.primitive_bitwidth
    WIDTH: tl.constexpr = BLOCK if PHASE == WHOLE else ELEMENTS
    ROWS: tl.constexpr = ELEMENTS // WIDTH
    _, start, stop, begin, end, carry = part(
        offsets, steps, horizon, count, carries, REVERSE, PHASE, ROWS, CHUNK, NUMBERS, dtype
    )
    product = tl.full((ROWS,), 1, dtype)
    low, high, blocks = bounds(begin, end, VECTOR, WIDTH)
    for k in range(blocks):
        base, lane, inside, whole = places(low, high, begin, end, k, REVERSE, VECTOR, WIDTH)
        x = load(values, base, lane, inside, whole, dtype)
        linked = inside & (lane + 1 < lane_of(stop, base, WIDTH) if REVERSE else lane > lane_of(start, base, WIDTH))
        if coefficients is None:
            c = number(discount, dtype)
        elif REVERSE:
            c = load(coefficients, base, lane, inside, whole, dtype)
        else:
            c = tl.load(coefficients + base + lane - 1, mask=linked, other=0).to(dtype)
        c = tl.where(inside, tl.where(linked, c, 0), 1)
        y, carry, product = scan(c, x, carry, product, REVERSE, coefficients is None, VECTOR, WIDTH)
        if PHASE != SUMMARY:
            store(out, base, lane, y, inside, whole)
    if PHASE == SUMMARY:
        summarise(sums, products, carry, product, ROWS)


@autotune(_CONFIGS, _KEY)
@triton.jit(do_not_specialize=["scale"])
def lambda_returns_kernel(
    rewards,
    values,
    bootstrap,
    out,
    sums,
    products,
    carries,
    offsets,
    steps: tl.int64,
    horizon: tl.int64,
    count: tl.int64,
    discount: tl.float64,
    decay: tl.float64,
    scale,
    ADD_VALUES: tl.constexpr,
    REVERSE: tl.constexpr,
    PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    NUMBERS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """A_h = δ_h + decay · A_{h+1}, plus the values if ADD_VALUES; REVERSE is true."""
    dtype: tl.constexpr = accumulator(rewards.dtype.element_ty)
    VECTOR: tl.constexpr = 128 // rewards.dtype.element_ty.primitive_bitwidth
    ELEMENTS: tl.constexpr = SIZE * 8 // dtype.primitive_bitwidth
    WIDTH: tl.constexpr = BLOCK if PHASE == WHOLE else ELEMENTS
    ROWS: tl.constexpr = ELEMENTS // WIDTH
    n, start, stop, begin, end, carry = part(
        offsets, steps, horizon, count, carries, REVERSE, PHASE, ROWS, CHUNK, NUMBERS, dtype
    )
    product = tl.full((ROWS,), 1, dtype)
    after = _after(bootstrap, n, start, stop, ROWS, dtype)
    low, high, blocks = bounds(begin, end, VECTOR, WIDTH)
    for k in range(blocks):
        base, lane, inside, whole = places(low, high, begin, end, k, REVERSE, VECTOR, WIDTH)
        linked = inside & (lane + 1 < lane_of(stop, base, WIDTH))
        value = load(values, base, lane, inside, whole, dtype)
        next_value = tl.load(values + base + lane + 1, mask=linked, other=0).to(dtype)
        next_value = tl.where(linked, next_value, after)
        error = load(rewards, base, lane, inside, whole, dtype) + number(discount, dtype) * next_value - value
        c = tl.where(inside, tl.where(linked, number(decay, dtype), 0), 1)
        y, carry, product = scan(c, tl.where(inside, error, 0), carry, product, REVERSE, True, VECTOR, WIDTH)
        if PHASE != SUMMARY:
            store(out, base, lane, y + value if ADD_VALUES else y, inside, whole)
    if PHASE == SUMMARY:
        summarise(sums, products, carry, product, ROWS)


@autotune(_CONFIGS, _KEY)
@triton.jit(do_not_specialize=["scale"])
def vtrace_kernel(
    log_ratios,
    rewards,
    values,
    bootstrap,
    targets,
    advantages,
    sums,
    products,
    carries,
    offsets,
    steps: tl.int64,
    horizon: tl.int64,
    count: tl.int64,
    discount: tl.float64,
    decay: tl.float64,
    rho_clip: tl.float64,
    c_clip: tl.float64,
    scale,
    REVERSE: tl.constexpr,
    PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    NUMBERS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """V-trace's targets and advantages; REVERSE is true.

    An advantage needs the next step's correction D_{h+1} = v_{h+1} − V(s_{h+1}). So that is what is scanned, at h, but for
    the block's last step, which takes the carry; D_h follows from it without an exchange between threads. What is read
    once more, a step further, comes from the cache.
    """
    dtype: tl.constexpr = accumulator(rewards.dtype.element_ty)
    VECTOR: tl.constexpr = 128 // rewards.dtype.element_ty.primitive_bitwidth
    ELEMENTS: tl.constexpr = SIZE * 8 // dtype.primitive_bitwidth
    WIDTH: tl.constexpr = BLOCK if PHASE == WHOLE else ELEMENTS
    ROWS: tl.constexpr = ELEMENTS // WIDTH
    n, start, stop, begin, end, carry = part(
        offsets, steps, horizon, count, carries, REVERSE, PHASE, ROWS, CHUNK, NUMBERS, dtype
    )
    product = tl.full((ROWS,), 1, dtype)
    after = _after(bootstrap, n, start, stop, ROWS, dtype)
    gamma, decay, rho_clip = number(discount, dtype), number(decay, dtype), number(rho_clip, dtype)
    c_clip = number(c_clip, dtype)
    low, high, blocks = bounds(begin, end, VECTOR, WIDTH)
    for k in range(blocks):
        base, lane, inside, whole = places(low, high, begin, end, k, REVERSE, VECTOR, WIDTH)
        stop_lane = lane_of(stop, base, WIDTH)
        linked = inside & (lane + 1 < stop_lane)
        value = load(values, base, lane, inside, whole, dtype)
        value_1 = tl.where(linked, tl.load(values + base + lane + 1, mask=linked, other=0).to(dtype), after)
        reward = load(rewards, base, lane, inside, whole, dtype)
        rho, c = _clipped(load(log_ratios, base, lane, inside, whole, dtype), decay, rho_clip, c_clip)
        error = tl.where(inside, rho * (reward + gamma * value_1 - value), 0)
        if PHASE == SUMMARY:
            c = tl.where(inside, tl.where(linked, c, 0), 1)
            _y, carry, product = scan(c, error, carry, product, REVERSE, False, VECTOR, WIDTH)
        else:
            next_inside = linked & (lane + 1 < tl.minimum(lane_of(end, base, WIDTH), WIDTH))
            linked_1 = next_inside & (lane + 2 < stop_lane)
            value_2 = tl.where(linked_1, tl.load(values + base + lane + 2, mask=linked_1, other=0).to(dtype), after)
            reward_1 = tl.load(rewards + base + lane + 1, mask=next_inside, other=0).to(dtype)
            log_ratio_1 = tl.load(log_ratios + base + lane + 1, mask=next_inside, other=0).to(dtype)
            rho_1, c_1 = _clipped(log_ratio_1, decay, rho_clip, c_clip)
            error_1 = tl.where(next_inside, rho_1 * (reward_1 + gamma * value_2 - value_1), 0)
            takes_carry = (linked | ~inside) & ~next_inside
            c_1 = tl.where(takes_carry, 1, tl.where(linked_1, c_1, 0))
            correction_1, _last, product = scan(c_1, error_1, carry, product, REVERSE, False, VECTOR, WIDTH)
            correction = error + tl.where(linked, c * correction_1, 0)
            carry = tl.sum(tl.where(lane == 0, correction, 0), 1)
            store(targets, base, lane, value + correction, inside, whole)
            target_1 = tl.where(linked, value_1 + correction_1, after)
            store(advantages, base, lane, rho * (reward + gamma * target_1 - value), inside, whole)
    if PHASE == SUMMARY:
        summarise(sums, products, carry, product, ROWS)


@triton.jit
def _after(bootstrap, n, start, stop, ROWS: tl.constexpr, dtype: tl.constexpr):
    """The value after each trajectory's last step (ROWS, 1)."""
    if bootstrap is None:
        return tl.zeros((ROWS, 1), dtype)
    else:
        return tl.load(bootstrap + n, mask=start < stop, other=0).to(dtype)[:, None]


@triton.jit
def _clipped(log_ratio, decay, rho_clip, c_clip):
    """ρ and discount · c of importance ratios."""
    ratio = tl.exp(log_ratio)
    rho = tl.minimum(ratio, rho_clip, propagate_nan=tl.PropagateNan.ALL)
    return rho, decay * tl.minimum(ratio, c_clip, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def carries_kernel(
    sums,
    products,
    carries,
    offsets,
    steps: tl.int64,
    horizon: tl.int64,
    count: tl.int64,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """The recurrence over the chunks of one trajectory: what each hands on."""
    dtype: tl.constexpr = sums.dtype.element_ty
    n, _, _, firsts, lasts = chunks(offsets, steps, horizon, count, CHUNK, NUMBERS)
    mine = n == program()
    begin = tl.zeros((1,), tl.int64) + tl.sum(tl.where(mine, firsts, 0), 0)
    end = tl.zeros((1,), tl.int64) + tl.sum(tl.where(mine, lasts, 0), 0)
    carry, product = tl.zeros((1,), dtype), tl.full((1,), 1, dtype)
    low, high, blocks = bounds(begin, end, 1, BLOCK)
    for k in range(blocks):
        base, lane, inside, whole = places(low, high, begin, end, k, REVERSE, 1, BLOCK)
        x = load(sums, base, lane, inside, whole, dtype)
        c = tl.where(inside, load(products, base, lane, inside, whole, dtype), 1)
        y, carry, product = scan(c, x, carry, product, REVERSE, False, 1, BLOCK)
        store(carries, base, lane, y, inside, whole)


def _launch(
    kernel: Any, tensors: tuple[Tensor | None, ...], offsets: Tensor | None, numbers: dict[str, Any], reverse: bool
) -> None:
    """Run `kernel`, whose first argument says the shape and dtype of the steps, in one phase or in three."""
    like = tensors[0]
    assert like is not None
    steps = like.numel()
    count = offsets.numel() - 1 if offsets is not None else like.shape[0] if like.dim() == 2 else 1
    if steps == 0 or count == 0:
        return
    shape = (offsets, steps, like.shape[-1], count)
    numbers = {**numbers, "scale": min(max(steps.bit_length() - 16, 0) // 4, 3), "REVERSE": reverse, **LAUNCH}
    accumulated = torch.float64 if like.dtype == torch.float64 else torch.float32
    average, most = steps // count, _SIZES.block // accumulated.itemsize
    if count > _SIZES.few or average < _SIZES.long:
        block = min(max(triton.next_power_of_2(average), 16), most)
        row = block * accumulated.itemsize
        with torch.cuda.device_of(like):
            kernel[lambda meta: (triton.cdiv(count, meta["SIZE"] // row),)](
                *tensors, None, None, None, *shape, **numbers, PHASE=WHOLE.value, BLOCK=block, CHUNK=0, NUMBERS=0
            )
        return
    chunk = _SIZES.chunk * triton.cdiv(steps, _SIZES.chunk * _SIZES.most_chunks)
    grid = (triton.cdiv(steps, chunk) + count,)
    sums, products, carries = torch.empty(3, grid[0], dtype=accumulated, device=like.device).unbind()
    chunked: dict[str, Any] = {"CHUNK": chunk, "NUMBERS": triton.next_power_of_2(count)}
    numbers |= {"BLOCK": 0, **chunked, "SIZE": _SIZES.tiles[0], "num_warps": _WARPS}
    untuned = kernel.fn  # A tile holds one trajectory, so that another size would be another order.
    block = min(most, triton.next_power_of_2(grid[0]))
    with torch.cuda.device_of(like):
        untuned[grid](*tensors, sums, products, None, *shape, **numbers, PHASE=SUMMARY.value)
        carries_kernel[(count,)](sums, products, carries, *shape, REVERSE=reverse, BLOCK=block, **chunked, **LAUNCH)
        untuned[grid](*tensors, None, None, carries, *shape, **numbers, PHASE=REST.value)


def recurrence(values: Tensor, coefficients: Tensor | float, offsets: Tensor | None, reverse: bool) -> Tensor:
    """The linear recurrence, its coefficients one for every step or one number in [0, 1]."""
    out = torch.empty_like(values)
    links, discount = (coefficients, 0.0) if isinstance(coefficients, Tensor) else (None, coefficients)
    _launch(recurrence_kernel, (values, links, out), offsets, {"discount": discount}, reverse)
    return out


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    bootstrap: Tensor | None,
    offsets: Tensor | None,
    discount: float,
    trace_lambda: float,
    add_values: bool,
) -> Tensor:
    """Generalized advantage estimates, plus the values if `add_values`."""
    out = torch.empty_like(rewards)
    numbers = {"discount": discount, "decay": discount * trace_lambda, "ADD_VALUES": add_values}
    _launch(lambda_returns_kernel, (rewards, values, bootstrap, out), offsets, numbers, True)
    return out


def vtrace(
    log_ratios: Tensor,
    rewards: Tensor,
    values: Tensor,
    bootstrap: Tensor | None,
    offsets: Tensor | None,
    discount: float,
    trace_lambda: float,
    rho_clip: float,
    c_clip: float,
) -> tuple[Tensor, Tensor]:
    """V-trace's targets and advantages."""
    targets, advantages = torch.empty_like(rewards), torch.empty_like(rewards)
    numbers = {"discount": discount, "decay": discount * trace_lambda, "rho_clip": rho_clip, "c_clip": c_clip}
    tensors = (log_ratios, rewards, values, bootstrap, targets, advantages)
    _launch(vtrace_kernel, tensors, offsets, numbers, True)
    return targets, advantages
