"""Log-densities of diagonal Gaussians in Triton, squashed by tanh or not, with first and second derivatives.

For a step with mean μ and log standard deviation ℓ in each of da dimensions, z = (u − μ) e^{−ℓ} and a tangent (t, s):

    value      Σ −½ (z² + log 2π) − ℓ
    gradient   w z e^{−ℓ}, w (z² − 1)
    along      Σ z e^{−ℓ} t + (z² − 1) s
    Hessian    −w e^{−ℓ} (e^{−ℓ} t + 2 z s), −2 w z (e^{−ℓ} t + z s)

u is the action, or atanh of one that tanh has squashed, whose density then has Σ log(1 − tanh² u) taken off. Everything is
read once and written once. Means and the like (T, da) may have rows of any stride, 0 for what all steps share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import LAUNCH, accumulator, number, program
from .triton_math import log1p, tanh

_TILE = 512  # elements for 256 threads, half as many of float64


def log_prob(actions: Tensor | None, mean: Tensor, log_std: Tensor, squash: bool) -> Tensor:
    """(T, da), (T, da), (T, da) -> (T,); without actions they are 0."""
    value = mean.new_empty(len(mean))
    launch(actions, mean, log_std, squash, value=value)
    return value


def gradient(
    actions: Tensor | None, mean: Tensor, log_std: Tensor, squash: bool, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights (T,) -> what they pull back to the means and the log standard deviations, (T, da) each."""
    by_mean, by_log_std = mean.new_empty(mean.shape), mean.new_empty(mean.shape)
    launch(actions, mean, log_std, squash, weights=weights, by_mean=by_mean, by_log_std=by_log_std)
    return by_mean, by_log_std


def along(
    actions: Tensor | None, mean: Tensor, log_std: Tensor, squash: bool, of_mean: Tensor, of_log_std: Tensor
) -> Tensor:
    """Tangents (T, da) of the means and of the log standard deviations -> that of the log-densities (T,)."""
    value = mean.new_empty(len(mean))
    launch(actions, mean, log_std, squash, of_mean=of_mean, of_log_std=of_log_std, value=value)
    return value


def second_order(
    actions: Tensor | None,
    mean: Tensor,
    log_std: Tensor,
    squash: bool,
    of_mean: Tensor,
    of_log_std: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`along` of tangents (T, da), and what the Hessian, times weights (T,), makes of them: (T,), (T, da), (T, da)."""
    value = mean.new_empty(len(mean))
    by_mean, by_log_std = mean.new_empty(mean.shape), mean.new_empty(mean.shape)
    launch(
        actions, mean, log_std, squash,
        of_mean=of_mean, of_log_std=of_log_std, weights=weights, value=value, by_mean=by_mean, by_log_std=by_log_std,
    )  # fmt: skip
    return value, by_mean, by_log_std


def launch(
    actions: Tensor | None,
    mean: Tensor,
    log_std: Tensor,
    squash: bool,
    *,
    bounds: tuple[float, float] | None = None,
    of_mean: Tensor | None = None,
    of_log_std: Tensor | None = None,
    weights: Tensor | None = None,
    fisher: Tensor | None = None,
    value: Tensor | None = None,
    by_mean: Tensor | None = None,
    by_log_std: Tensor | None = None,
) -> None:
    """Write what `value`, `by_mean` and `by_log_std` are given for, each (T, …) with rows of any stride.

    Args:
        bounds: `log_std` is not ℓ but what tanh rescales into these bounds; then so are its tangent and its cotangent.
        of_mean, of_log_std: tangents (T, da). With them products of second order are written, without them those of first.
        weights: (T,) of the gradient, or of the Hessian.
        fisher: (T,), weights of the Fisher matrix diag(e^{−2ℓ}, 2), which is added to the Hessian.
    """
    steps, size = mean.shape
    if steps == 0:
        return
    block = min(triton.next_power_of_2(max(size, 1)), _TILE // 2)
    rows = max(_TILE * 4 // (block * max(mean.element_size(), 4)), 1)
    low, high = bounds or (0.0, 0.0)
    inputs: list[Tensor | int | None] = []
    for tensor in (actions, mean, log_std, of_mean, of_log_std):
        dense = tensor if tensor is None or tensor.stride(1) == 1 else tensor.contiguous()
        inputs += [dense, 0 if dense is None else dense.stride(0)]
    outputs = (by_mean, 0 if by_mean is None else by_mean.stride(0), by_log_std)
    log_std_stride = 0 if by_log_std is None else by_log_std.stride(0)
    with torch.cuda.device_of(mean):
        _gaussian_kernel[(triton.cdiv(steps, rows),)](
            *inputs, weights, fisher, value, *outputs, log_std_stride, steps, size,
            1.0 - torch.finfo(mean.dtype).eps, low, high,
            SQUASH=squash, BOUNDED=bounds is not None, ROWS=rows, BLOCK=block, num_warps=8, **LAUNCH,
        )  # fmt: skip


@triton.jit
def _gaussian_kernel(
    actions, actions_stride, mean, mean_stride, log_std, log_std_stride, of_mean, of_mean_stride,
    of_log_std, of_log_std_stride, weights, fisher, value, by_mean, by_mean_stride, by_log_std, by_log_std_stride,
    num_steps, size, edge: tl.float64, low: tl.float64, high: tl.float64,
    SQUASH: tl.constexpr, BOUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All that is asked of ROWS steps."""
    ACC: tl.constexpr = accumulator(mean.dtype.element_ty)
    step = program() * ROWS + tl.arange(0, ROWS)
    in_steps = step < num_steps
    total = tl.zeros([ROWS], ACC)
    if weights is not None:
        weight = tl.load(weights + step, mask=in_steps, other=0.0).to(ACC)[:, None]
    if fisher is not None:
        information = tl.load(fisher + step, mask=in_steps, other=0.0).to(ACC)[:, None]
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = in_steps[:, None] & (column < size)
        m = tl.load(mean + (step * mean_stride)[:, None] + column, mask=mask, other=0.0).to(ACC)
        log = tl.load(log_std + (step * log_std_stride)[:, None] + column, mask=mask, other=0.0).to(ACC)
        if BOUNDED:
            rising = tanh(log)
            half = 0.5 * (number(high, ACC) - number(low, ACC))
            log = number(low, ACC) + half * (rising + 1.0)
            slope = half * (1.0 - rising * rising)
        u = tl.zeros([ROWS, BLOCK], ACC)
        log_slope = tl.zeros([ROWS, BLOCK], ACC)
        if actions is not None:
            u = tl.load(actions + (step * actions_stride)[:, None] + column, mask=mask, other=0.0).to(ACC)
            if SQUASH:
                u, log_slope = _unsquash(u, number(edge, ACC))
        inverse = tl.exp(-log)
        z = (u - m) * inverse
        excess = z * z - 1.0
        if of_mean is None:
            if value is not None:
                term = -0.5 * (z * z + 1.8378770664093454836) - log - log_slope
                total += tl.sum(tl.where(mask, term, 0.0), 1)
            if by_mean is not None:
                to_mean = weight * z * inverse
                to_log_std = weight * excess
                if BOUNDED:
                    to_log_std *= slope
        else:
            scaled = (
                tl.load(of_mean + (step * of_mean_stride)[:, None] + column, mask=mask, other=0.0).to(ACC) * inverse
            )
            given = tl.zeros([ROWS, BLOCK], ACC)
            if of_log_std is not None:
                place = (step * of_log_std_stride)[:, None] + column
                given = tl.load(of_log_std + place, mask=mask, other=0.0).to(ACC)
            s = given
            if BOUNDED:
                s = slope * given
            total += tl.sum(z * scaled + excess * s, 1)
            to_mean = tl.zeros([ROWS, BLOCK], ACC)
            to_log_std = tl.zeros([ROWS, BLOCK], ACC)
            if weights is not None:
                to_mean -= weight * inverse * (scaled + 2.0 * z * s)
                to_log_std -= 2.0 * weight * z * (scaled + z * s)
            if fisher is not None:
                to_mean += information * inverse * scaled
                to_log_std += 2.0 * information * s
            if BOUNDED:
                to_log_std *= slope
                if weights is not None:
                    to_log_std -= weight * excess * 2.0 * rising * s
        if by_mean is not None:
            tl.store(by_mean + (step * by_mean_stride)[:, None] + column, to_mean, mask=mask)
        if by_log_std is not None:
            tl.store(by_log_std + (step * by_log_std_stride)[:, None] + column, to_log_std, mask=mask)
    if value is not None:
        tl.store(value + step, total, mask=in_steps)


@triton.jit
def _unsquash(action, edge):
    """atanh of an action, which is moved inside of the open interval, and log(1 − action²)."""
    inside = tl.where(action > edge, edge, tl.where(action < -edge, -edge, action))  # NaN stays
    up, down = log1p(inside), log1p(-inside)
    return 0.5 * (up - down), up + down
