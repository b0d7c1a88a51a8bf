"""Scans along trajectories in numba. Contracts: `parl_core/ops/{recurrence,gae,vtrace}.py`.

Steps (T,) are flat, float32 or float64, trajectory after trajectory; `offsets` (N+1,) say where each begins and ends.
"""

import numba
import numpy as np

# Below this many elements a thread costs more to wake than it saves; the parallel variants are slow to compile.
# They are functions of their own, since numba's cache does not tell the options of one function apart.
_PARALLEL_ELEMENTS = 1 << 16


def _in_parallel(steps: int, trajectories: int, num_threads: int) -> bool:
    if num_threads == 1 or trajectories < 2 or steps < _PARALLEL_ELEMENTS:
        return False
    available: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(num_threads, available))
    return True


@numba.njit(cache=True, nogil=True)
def _scan_trajectory(values, out, start, stop, discount, reverse):
    carry = values.dtype.type(0)
    if reverse:
        for i in range(stop - 1, start - 1, -1):
            carry = values[i] + discount * carry
            out[i] = carry
    else:
        for i in range(start, stop):
            carry = values[i] + discount * carry
            out[i] = carry


@numba.njit(cache=True, nogil=True)
def _scan(values, discount, offsets, out, reverse):
    for n in range(len(offsets) - 1):
        _scan_trajectory(values, out, offsets[n], offsets[n + 1], discount, reverse)


@numba.njit(cache=True, nogil=True, parallel=True)
def _scan_parallel(values, discount, offsets, out, reverse):
    for n in numba.prange(len(offsets) - 1):
        _scan_trajectory(values, out, offsets[n], offsets[n + 1], discount, reverse)


@numba.njit(cache=True, nogil=True)
def _recur_trajectory(values, coefficients, out, start, stop, reverse):
    if reverse:
        for i in range(stop - 1, start - 1, -1):
            out[i] = values[i]
            if i + 1 < stop:
                out[i] += coefficients[i] * out[i + 1]
    else:
        for i in range(start, stop):
            out[i] = values[i]
            if i > start:
                out[i] += coefficients[i - 1] * out[i - 1]


@numba.njit(cache=True, nogil=True)
def _recur(values, coefficients, offsets, out, reverse):
    for n in range(len(offsets) - 1):
        _recur_trajectory(values, coefficients, out, offsets[n], offsets[n + 1], reverse)


@numba.njit(cache=True, nogil=True, parallel=True)
def _recur_parallel(values, coefficients, offsets, out, reverse):
    for n in numba.prange(len(offsets) - 1):
        _recur_trajectory(values, coefficients, out, offsets[n], offsets[n + 1], reverse)


@numba.njit(cache=True, nogil=True)
def _estimate_trajectory(rewards, values, next_value, out, start, stop, discount, decay, add_values):
    advantage = values.dtype.type(0)
    for i in range(stop - 1, start - 1, -1):
        error = rewards[i] + discount * next_value - values[i]
        advantage = error + decay * advantage
        next_value = values[i]
        out[i] = advantage + values[i] if add_values else advantage


@numba.njit(cache=True, nogil=True)
def _estimate(rewards, values, bootstrap, offsets, out, discount, decay, add_values):
    for n in range(len(offsets) - 1):
        _estimate_trajectory(
            rewards, values, bootstrap[n], out, offsets[n], offsets[n + 1], discount, decay, add_values
        )


@numba.njit(cache=True, nogil=True, parallel=True)
def _estimate_parallel(rewards, values, bootstrap, offsets, out, discount, decay, add_values):
    for n in numba.prange(len(offsets) - 1):
        _estimate_trajectory(
            rewards, values, bootstrap[n], out, offsets[n], offsets[n + 1], discount, decay, add_values
        )


@numba.njit(cache=True, nogil=True)
def _correct_trajectory(
    log_ratios, rewards, values, next_value, targets, advantages, start, stop, discount, decay, rho_clip, c_clip
):
    next_target = next_value
    correction = values.dtype.type(0)
    for i in range(stop - 1, start - 1, -1):
        ratio = np.exp(log_ratios[i])
        rho = rho_clip if ratio > rho_clip else ratio
        c = c_clip if ratio > c_clip else ratio
        error = rho * (rewards[i] + discount * next_value - values[i])
        correction = error + decay * c * correction if i + 1 < stop else error
        targets[i] = values[i] + correction
        advantages[i] = rho * (rewards[i] + discount * next_target - values[i])
        next_value = values[i]
        next_target = targets[i]


@numba.njit(cache=True, nogil=True)
def _correct(log_ratios, rewards, values, bootstrap, offsets, targets, advantages, discount, decay, rho_clip, c_clip):
    for n in range(len(offsets) - 1):
        _correct_trajectory(
            log_ratios,
            rewards,
            values,
            bootstrap[n],
            targets,
            advantages,
            offsets[n],
            offsets[n + 1],
            discount,
            decay,
            rho_clip,
            c_clip,
        )


@numba.njit(cache=True, nogil=True, parallel=True)
def _correct_parallel(
    log_ratios, rewards, values, bootstrap, offsets, targets, advantages, discount, decay, rho_clip, c_clip
):
    for n in numba.prange(len(offsets) - 1):
        _correct_trajectory(
            log_ratios,
            rewards,
            values,
            bootstrap[n],
            targets,
            advantages,
            offsets[n],
            offsets[n + 1],
            discount,
            decay,
            rho_clip,
            c_clip,
        )


def discounted_scan(
    values: np.ndarray, discount: float, offsets: np.ndarray, out: np.ndarray, reverse: bool, num_threads: int
) -> None:
    """Write the scan of `values` with the coefficient `discount` into `out`."""
    scan = _scan_parallel if _in_parallel(len(values), len(offsets) - 1, num_threads) else _scan
    # Numbers in the dtype of the values, here and below: a Python float would widen float32 arithmetic.
    scan(values, values.dtype.type(discount), offsets, out, reverse)


def linear_recurrence(
    values: np.ndarray,
    coefficients: np.ndarray,
    offsets: np.ndarray,
    out: np.ndarray,
    reverse: bool,
    num_threads: int,
) -> None:
    """Write the recurrence of `values` with a coefficient for every step into `out`."""
    recur = _recur_parallel if _in_parallel(len(values), len(offsets) - 1, num_threads) else _recur
    recur(values, coefficients, offsets, out, reverse)


def lambda_returns(
    rewards: np.ndarray,
    values: np.ndarray,
    bootstrap: np.ndarray,
    offsets: np.ndarray,
    out: np.ndarray,
    discount: float,
    trace_lambda: float,
    add_values: bool,
    num_threads: int,
) -> None:
    """Write generalized advantage estimates, plus the values if `add_values`, into `out`."""
    estimate = _estimate_parallel if _in_parallel(len(rewards), len(offsets) - 1, num_threads) else _estimate
    number = rewards.dtype.type
    estimate(rewards, values, bootstrap, offsets, out, number(discount), number(discount * trace_lambda), add_values)


def vtrace(
    log_ratios: np.ndarray,
    rewards: np.ndarray,
    values: np.ndarray,
    bootstrap: np.ndarray,
    offsets: np.ndarray,
    targets: np.ndarray,
    advantages: np.ndarray,
    discount: float,
    trace_lambda: float,
    rho_clip: float,
    c_clip: float,
    num_threads: int,
) -> None:
    """Write V-trace's value targets and policy-gradient advantages."""
    correct = _correct_parallel if _in_parallel(len(rewards), len(offsets) - 1, num_threads) else _correct
    numbers = (rewards.dtype.type(x) for x in (discount, discount * trace_lambda, rho_clip, c_clip))
    correct(log_ratios, rewards, values, bootstrap, offsets, targets, advantages, *numbers)
