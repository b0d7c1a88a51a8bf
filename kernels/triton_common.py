"""What the Triton kernels share. Imported where they are used, since Triton may be missing.

A kernel's name ends in `_kernel`; other `@triton.jit` functions are parts of kernels. Its numbers are annotated as
tl.float64 and turned into the dtype it computes in by `number`: Triton would take a Python float as float32. Pointers are
stepped by `program`, in int64, since a product of int32 overflows beyond 2³¹ elements.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl

from parl_core.ops.accelerators import interpreted

LAUNCH = {"enable_fp_fusion": True}
"""Options of every launch. Multiplications and additions become fused ones, as in the kernels in C++; Triton is about to
change its default and warns where nothing is said."""


def autotune(configs: Sequence[triton.Config], key: Sequence[str]) -> Callable[[Any], Any]:
    """`triton.autotune`, which measures the configurations at the first call for each value of the arguments `key`.

    They may differ in what leaves the order of operations alone, no more: otherwise the last bits of a result would depend
    on what was measured. The number of warps does not; nor does the size of a tile along an axis of sums or scans.

    The interpreter takes the first: there is nothing to measure. So does everyone where PARL_TRITON_UNTUNED is set, since
    tests come with hundreds of values, and for each of them all configurations would be compiled. A kernel is to be called
    once before it is captured in a CUDA graph, and what it writes must not depend on what was there, since measuring runs it
    many times.
    """
    untuned = interpreted() or bool(os.environ.get("PARL_TRITON_UNTUNED"))
    return triton.autotune(list(configs[:1] if untuned else configs), list(key))


@triton.constexpr_function
def accumulator(element: tl.dtype) -> tl.dtype:
    """The dtype that elements in memory are computed in: float64 for float64, float32 for all others."""
    return tl.float64 if element == tl.float64 else tl.float32


@triton.jit
def number(value, dtype: tl.constexpr):
    """An argument annotated as tl.float64, as a scalar of `dtype`."""
    return tl.full((), value, dtype)


@triton.jit
def program():
    """The number of this program, int64. Grids are of one dimension: in the others a GPU takes 65535 programs at most."""
    return tl.program_id(0).to(tl.int64)
