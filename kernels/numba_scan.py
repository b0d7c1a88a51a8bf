"""Segmented discounted scan in numba. Contract: `parl_core/ops/scan.py`."""

import numba
import numpy as np

# Below this many elements a thread costs more to wake than it saves; the parallel variant is slow to compile.
_PARALLEL_ELEMENTS = 1 << 18


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
def _scan(values, offsets, out, discount, reverse):
    for n in range(len(offsets) - 1):
        _scan_trajectory(values, out, offsets[n], offsets[n + 1], discount, reverse)


@numba.njit(cache=True, nogil=True, parallel=True)
def _scan_parallel(values, offsets, out, discount, reverse):
    for n in numba.prange(len(offsets) - 1):
        _scan_trajectory(values, out, offsets[n], offsets[n + 1], discount, reverse)


def scan(
    values: np.ndarray, offsets: np.ndarray, out: np.ndarray, discount: float, reverse: bool, num_threads: int
) -> None:
    """Write the scan of `values` (T,) over `offsets` (N+1,) into `out` (T,), both float32 or both float64."""
    # In the dtype of the values: a Python float would widen float32 arithmetic.
    discount = values.dtype.type(discount)
    if num_threads > 1 and len(offsets) > 2 and len(values) >= _PARALLEL_ELEMENTS:
        available: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        numba.set_num_threads(min(num_threads, available))
        _scan_parallel(values, offsets, out, discount, reverse)
    else:
        _scan(values, offsets, out, discount, reverse)
