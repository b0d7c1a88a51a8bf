"""Elementary functions that triton.language lacks, or has with fewer correct digits."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """From e^{−2|x|}, and by its series near 0, where that would cancel."""
    small = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - small) / (1.0 + small)
    square = x * x
    near = 1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0 - square * (62.0 / 2835.0))))
    return tl.where(tl.abs(x) < 0.05, x * near, tl.where(x < 0.0, -far, far))


@triton.jit
def log1p(x):
    """log(1 + x) to the last digits: what rounding 1 + x changed is made up for (Higham 2002, section 1.14.1)."""
    sum = 1.0 + x
    return tl.where(sum == 1.0, x, tl.log(sum) * (x / tl.where(sum == 1.0, 1.0, sum - 1.0)))
