"""Estimates of f-divergences in Triton. Contract: `parl_core/ops/f_divergence.py`.

One pass over memory gives the value Σ w g(r), its gradient w g′(r), and of a vector v the second-order product w g″(r) v
and the slope Σ w g′(r) v. For a float32 element it moves 8 bytes for the gradient and 12 for the product. An H200 has time
for some 80 instructions an element meanwhile (132 multiprocessors, 4.2 TB/s); in the code for sm_90 a gradient takes 26 of
KL and 71 of Jensen–Shannon, counted, not timed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import LAUNCH
from .triton_divergence_kernels import (
    chunk_sums_kernel,
    fill_chunks_kernel,
    scale_kernel,
    sum_kernel,
    terms_kernel,
    total_kernel,
    trajectory_sum_kernel,
)

# Bytes of a vector of one program, 32 for each thread of 8 warps: two loads of 16 bytes in flight for a thread, 64 KiB for
# a multiprocessor that holds 2048 of them, twice what hides the latency of an H200's memory. Not tuned by measurement: the
# order of summation, and so the last bits of a sum, would depend on what was measured.
_BYTES = 8192
_WARPS = 8
# Steps that a program does at once in double precision, one for each thread.
_CHUNK = 256
# Steps that a program of 4 warps takes of its trajectories at once, and how many of each at least: 4 for a thread, since a
# trajectory's bounds and sums take registers, too. About 60 of them leave 18 KiB in flight for a multiprocessor.
_TILE, _TILE_WARPS, _COLUMNS = 512, 4, 16
# Programs beyond which each may take several trajectories: two for each of an H200's multiprocessors.
_PROGRAMS = 264
# From this mean length on, trajectories are taken in parts of about the second number of steps.
_LONG, _PART = 16384, 8192
# Sums that a program adds.
_SUMS = 4096


class Estimate(NamedTuple):
    """What is estimated, and where what is wanted of it is written; `vector` is needed for product and slope."""

    weights: Tensor | None  # (N,); None: 1/N each
    term: Any  # f_divergence_terms.Term
    value: Tensor | None = None  # (): Σ w g
    gradient: Tensor | None = None  # (T,): w g′
    vector: Tensor | None = None  # (T,): v
    cotangent: Tensor | None = None  # (): of the product; None: 1
    product: Tensor | None = None  # (T,): cotangent · w g″v
    slope: Tensor | None = None  # (): Σ w g′v


def divergence_terms(log_ratio: Tensor, term: Any, order: int) -> Tensor:
    """The derivative of `order` 0, 1 or 2 of the summand of `term` at every log-ratio (T,)."""
    out = torch.empty_like(log_ratio)
    count = log_ratio.numel()
    if count == 0:
        return out
    function, flipped, over_ratio, alpha = term
    block = _block(log_ratio)
    with torch.cuda.device_of(log_ratio):
        terms_kernel[(triton.cdiv(count, block),)](
            log_ratio, out, count, alpha, function, flipped, over_ratio, order, _precision(log_ratio), block,
            num_warps=_WARPS, **LAUNCH,
        )  # fmt: skip
    return out


def divergence_sum(
    log_ratio: Tensor, offsets: Tensor | None, weights: Tensor | None, term: Any, gradient: Tensor | None
) -> Tensor:
    """Σ w g (), whose gradient (T,) is written into `gradient`."""
    value = log_ratio.new_empty(())
    divergence(log_ratio, offsets, Estimate(weights, term, value, gradient))
    return value


def divergence_product(
    log_ratio: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    term: Any,
    vector: Tensor,
    cotangent: Tensor,
    with_slope: bool,
) -> tuple[Tensor, Tensor | None]:
    """The Hessian of cotangent · Σ w g times `vector` (T,), and the slope of Σ w g along it ()."""
    product, slope = torch.empty_like(log_ratio), log_ratio.new_empty(()) if with_slope else None
    divergence(
        log_ratio,
        offsets,
        Estimate(weights, term, vector=vector, cotangent=cotangent, product=product, slope=slope),
    )
    return product, slope


def scale(gradient: Tensor, cotangent: Tensor) -> None:
    """Multiply gradient (T,) by cotangent () in place; where that is 1, without a pass over memory."""
    count, block = gradient.numel(), _block(gradient)
    if count:
        with torch.cuda.device_of(gradient):
            scale_kernel[(triton.cdiv(count, block),)](
                gradient, cotangent, count, block, num_warps=_WARPS, **LAUNCH
            )  # fmt: skip


def divergence(log_ratio: Tensor, offsets: Tensor | None, estimate: Estimate) -> None:
    """Write what is wanted of an estimate from log_ratio (T,), in one pass.

    offsets: (N+1,), of trajectories; None: every element is a sample.
    """
    with torch.cuda.device_of(log_ratio):
        if offsets is None:
            _of_elements(log_ratio, estimate)
        elif log_ratio.numel() < _LONG * (offsets.numel() - 1):
            _of_trajectories(log_ratio, offsets, estimate, _precision(log_ratio))
        else:
            _of_long_trajectories(log_ratio, offsets, estimate)


def _of_elements(log_ratio: Tensor, estimate: Estimate) -> None:
    count, block = log_ratio.numel(), _block(log_ratio)
    programs, scale = triton.cdiv(count, block), _scale(estimate, count)
    values, slopes = _sums(estimate, programs)
    function, flipped, over_ratio, alpha = estimate.term
    sum_kernel[(programs,)](
        log_ratio, estimate.weights, estimate.vector, estimate.cotangent, estimate.gradient, estimate.product,
        values, slopes, count, scale, alpha, function, flipped, over_ratio, _precision(log_ratio), block, _CHUNK,
        num_warps=_WARPS, **LAUNCH,
    )  # fmt: skip
    _total(values, estimate.value, scale)
    _total(slopes, estimate.slope, scale)


def _of_trajectories(log_ratio: Tensor, offsets: Tensor, estimate: Estimate, precision: tl.dtype) -> None:
    """In tiles of trajectories by steps, as wide as a trajectory of mean length.

    One long trajectory among many short ones is taken by one program, tile after tile: how long each is is known on the
    GPU only, and is not asked for.
    """
    count, trajectories = log_ratio.numel(), offsets.numel() - 1
    columns = min(max(triton.next_power_of_2(triton.cdiv(count, trajectories)), _COLUMNS), _TILE)
    rows = _TILE // columns
    while rows > 1 and trajectories < rows * _PROGRAMS:
        rows //= 2
    programs, scale = triton.cdiv(trajectories, rows), _scale(estimate, trajectories)
    values, slopes = _sums(estimate, programs)
    function, flipped, over_ratio, alpha = estimate.term
    trajectory_sum_kernel[(programs,)](
        log_ratio, offsets, estimate.weights, estimate.vector, estimate.cotangent, estimate.gradient, estimate.product,
        values, slopes, count, trajectories, scale, alpha, function, flipped, over_ratio, precision, rows, columns,
        num_warps=_TILE_WARPS, **LAUNCH,
    )  # fmt: skip
    _total(values, estimate.value, scale)
    _total(slopes, estimate.slope, scale)


def _of_long_trajectories(log_ratio: Tensor, offsets: Tensor, estimate: Estimate) -> None:
    """In parts, so that all multiprocessors share a trajectory: their sums, the terms of those, and back to the steps."""
    count, trajectories = log_ratio.numel(), offsets.numel() - 1
    parts = triton.cdiv(count, trajectories * _PART)
    grid = (trajectories * parts,)

    def sums(steps: Tensor) -> Tensor:
        out = steps.new_empty(trajectories * parts, dtype=torch.float64)
        chunk_sums_kernel[grid](steps, offsets, out, count, parts, _block(steps), num_warps=_WARPS, **LAUNCH)
        return out

    wanted = {name: steps for name in ("gradient", "product") if (steps := getattr(estimate, name)) is not None}
    of_parts = {name: steps.new_empty(trajectories * parts) for name, steps in wanted.items()}
    if estimate.vector is not None:
        of_parts["vector"] = sums(estimate.vector)
    part_offsets = torch.arange(0, trajectories * parts + 1, parts, device=offsets.device)
    _of_trajectories(sums(log_ratio), part_offsets, estimate._replace(**of_parts), _precision(log_ratio))
    for name, steps in wanted.items():
        fill_chunks_kernel[grid](
            steps, of_parts[name], offsets, count, parts, _block(steps), num_warps=_WARPS, **LAUNCH
        )


def _scale(estimate: Estimate, samples: int) -> float:
    return 1.0 / samples if estimate.weights is None else 1.0


def _sums(estimate: Estimate, programs: int) -> tuple[Tensor | None, Tensor | None]:
    """What the programs' values and slopes go into, of those that are wanted."""
    value, slope = (
        None if out is None else out.new_empty(programs, dtype=torch.float64)
        for out in (estimate.value, estimate.slope)
    )
    return value, slope


def _total(sums: Tensor | None, out: Tensor | None, scale: float) -> None:
    if sums is None or out is None:
        return
    while (count := sums.numel()) > _SUMS:
        parts, sums = sums, sums.new_empty(triton.cdiv(count, _SUMS))
        total_kernel[(sums.numel(),)](parts, sums, count, 1.0, _SUMS, num_warps=_WARPS, **LAUNCH)
    total_kernel[(1,)](sums, out, count, scale, _SUMS, num_warps=_WARPS, **LAUNCH)


def _block(log_ratio: Tensor) -> int:
    """Steps of one program; of half precision as many as of single, in which they are computed."""
    return _BYTES // max(log_ratio.element_size(), 4)


def _precision(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
