"""The summands of f-divergences and their first two derivatives in Triton, in single or double precision.

The specification, with the same names, is `parl_core/ops/f_divergence_terms.py`; the forms are those of
csrc/math/divergence.h. Triton's own exp is off by |x|/2 units in the last place, and its interpreter knows no library of
the device, hence the exponential here: one reduction by ln 2 gives e^x, e^−x and both less 1 to a few units in the last
place, of arithmetic that the interpreter repeats.
"""

import triton
import triton.language as tl

# Adding 1.5·2^mantissa rounds to an integer, which then stands in the lowest bits.
_ROUNDER_SINGLE = tl.constexpr(12582912.0)
_ROUNDER_DOUBLE = tl.constexpr(6755399441055744.0)
# Beyond it e^x is infinite and e^−x is 0.
_EXP_ENDS_SINGLE = tl.constexpr(104.0)
_EXP_ENDS_DOUBLE = tl.constexpr(746.0)
# Within it both are normal numbers.
_EXP_BOUND_SINGLE = tl.constexpr(87.0)
_EXP_BOUND_DOUBLE = tl.constexpr(708.0)
_LARGEST_SINGLE = tl.constexpr(3.4028234663852886e38)
_LARGEST_DOUBLE = tl.constexpr(1.7976931348623157e308)


@triton.jit
def _at_most(x, bound):
    """The smaller one; a NaN stays."""
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _at_least(x, bound):
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _below_infinity(x):
    """For differences in which ∞ − ∞ is not to come about; −∞ stays."""
    if x.dtype == tl.float64:
        return _at_most(x, _LARGEST_DOUBLE)
    else:
        return _at_most(x, _LARGEST_SINGLE)


@triton.jit
def _below_exp_bound(x):
    if x.dtype == tl.float64:
        return _at_most(x, _EXP_BOUND_DOUBLE)
    else:
        return _at_most(x, _EXP_BOUND_SINGLE)


@triton.jit
def _constant(x, value: tl.constexpr):
    """`value`, or NaN where x is."""
    return tl.where(x == x, value, x)


@triton.jit
def _expm1_reduced(r):
    """e^r − 1 for |r| ≤ ln(2)/2, by its series, in single precision by a minimax polynomial that is 3e-9 off at most."""
    if r.dtype == tl.float64:
        tail = r * (1 / 6227020800) + 1 / 479001600
        tail = tail * r + 1 / 39916800
        tail = tail * r + 1 / 3628800
        tail = tail * r + 1 / 362880
        tail = tail * r + 1 / 40320
        tail = tail * r + 1 / 5040
        tail = tail * r + 1 / 720
        tail = tail * r + 1 / 120
        tail = tail * r + 1 / 24
        tail = tail * r + 1 / 6
        tail = tail * r + 1 / 2
    else:
        tail = r * 0.00139506003 + 0.00836895371
        tail = tail * r + 0.0416662042
        tail = tail * r + 0.166665183
        tail = tail * r + 0.5
    return r + (r * r) * tail


@triton.jit
def _power_of_two(k):
    """2^k for an integer-valued k within the exponents of normal numbers."""
    bits = (k + _ROUNDER_DOUBLE).to(tl.int64, bitcast=True) << 52
    return (bits + 0x3FF0000000000000).to(tl.float64, bitcast=True)


@triton.jit
def _scaled(near, k):
    """(1 + near)·2^k in two factors, since 2^k itself may be infinite where the product is not."""
    if near.dtype == tl.float64:
        half = (k * 0.5 + _ROUNDER_DOUBLE) - _ROUNDER_DOUBLE
        return (near + 1.0) * _power_of_two(half) * _power_of_two(k - half)
    else:
        # One instruction, and exact, as 2^k of whole numbers is.
        return (near * 2.0 + 2.0) * tl.exp2(k - 1.0)


@triton.jit
def _reduced(x):
    """x = k·ln 2 + r with |r| ≤ ln(2)/2, and x itself, all within the ends of e^x and e^−x."""
    if x.dtype == tl.float64:
        x = _at_least(_at_most(x, _EXP_ENDS_DOUBLE), -_EXP_ENDS_DOUBLE)
        k = (x * 1.4426950408889634 + _ROUNDER_DOUBLE) - _ROUNDER_DOUBLE
        r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10
    else:
        x = _at_least(_at_most(x, _EXP_ENDS_SINGLE), -_EXP_ENDS_SINGLE)
        k = (x * 1.44269504 + _ROUNDER_SINGLE) - _ROUNDER_SINGLE
        r = (x - k * 0.693359375) - k * -2.12194440e-4
    return k, r, x


@triton.jit
def _exp_of_reduced(k, r):
    near = _expm1_reduced(r)
    ratio = _scaled(near, k)
    return ratio, tl.where(k == 0.0, near, ratio - 1.0)


@triton.jit
def _ratio(x):
    """e^x; e^x − 1, to full relative precision; and a finite factor in place of x, for products with e^x."""
    k, r, log = _reduced(x)
    ratio, step = _exp_of_reduced(k, r)
    return ratio, step, log


@triton.jit
def _ratios(x):
    """The same of x and of −x: e^x, e^x − 1, e^−x, e^−x − 1, x within their ends."""
    k, r, log = _reduced(x)
    up, up_step = _exp_of_reduced(k, r)
    down, down_step = _exp_of_reduced(-k, -r)
    return up, up_step, down, down_step, log


@triton.jit
def _log_reduced(f, e):
    """log(2^e·(1 + f)) for f in [√½ − 1, √2 − 1]."""
    square = 0.5 * f * f
    if f.dtype == tl.float64:
        # By the series of the inverse hyperbolic tangent: log(1 + f) = 2 artanh(s).
        s = f / (f + 2.0)
        z = s * s
        series = z * (2 / 19) + 2 / 17
        series = series * z + 2 / 15
        series = series * z + 2 / 13
        series = series * z + 2 / 11
        series = series * z + 2 / 9
        series = series * z + 2 / 7
        series = series * z + 2 / 5
        series = series * z + 2 / 3
        rest = s * (square + series * z) + e * 1.90821492927058770002e-10
        return e * 6.93147180369123816490e-01 + (f - (square - rest))
    else:
        # log(1 + f) = f − f²/2 + f³·tail; tail is minimax, of error 6e-9 in log(1 + f).
        tail = f * -0.0763558823 + 0.127633003
        tail = tail * f - 0.131605952
        tail = tail * f + 0.142015575
        tail = tail * f - 0.166232975
        tail = tail * f + 0.200012332
        tail = tail * f - 0.250008227
        tail = tail * f + 0.333333317
        rest = (2.0 * square * f) * tail + e * -2.12194440e-4
        return e * 0.693359375 + (f - (square - rest))


@triton.jit
def _mixture(x):
    """e^x, e^−x, log((1 + e^x)/2) and log(2 e^x/(1 + e^x)), both logarithms to full relative precision, and 1/(1 + e^x)."""
    # By symmetry at −|x|, where (1 + e^−|x|)/2 lies in [½, 1]; doubled if below √½.
    lower = tl.where(x < 0.0, x, -x)
    small, small_step, large, _large_step, _log = _ratios(lower)
    doubled = small < 0.41421356237309503
    log_lower = _log_reduced(tl.where(doubled, small, 0.5 * small_step), tl.where(doubled, -1.0, 0.0).to(x.dtype))
    negative = x < 0.0
    over_q = tl.where(negative, log_lower, x + log_lower)
    over_p = tl.where(negative, -_below_infinity(-lower) - log_lower, -log_lower)
    mixed = tl.where(negative, 1.0, small) / (small + 1.0)
    return tl.where(negative, small, large), tl.where(negative, large, small), over_q, over_p, mixed


@triton.jit
def _plain(x, alpha, function: tl.constexpr):
    """f(e^x) and its first two derivatives in x."""
    if function == "kl":  # t log t
        t, _t_step, log = _ratio(x)
        value = t * log
        return value, value + t, value + (t + t)
    elif function == "kl_k2":  # ½ t log² t
        t, _t_step, log = _ratio(x)
        square = 0.5 * log * log
        return t * square, t * (square + log), t * (square + log + log + 1.0)
    elif function == "kl_k3":  # t log t − t + 1
        t, t_step, log = _ratio(x)
        first = t * log
        return first - _below_infinity(t_step), first, first + t
    elif function == "reverse_kl":  # −log t
        return -x, _constant(x, -1.0), _constant(x, 0.0)
    elif function == "reverse_kl_k2":  # ½ log² t
        return 0.5 * x * x, x, _constant(x, 1.0)
    elif function == "reverse_kl_k3":  # t − 1 − log t
        t, t_step, _log = _ratio(x)
        return t_step - _below_infinity(x), t_step, t
    elif function == "jensen_shannon":  # ½ (t log t − (1 + t) log((1 + t)/2))
        t, _u, over_q, over_p, mixed = _mixture(x)
        first = (0.5 * t) * over_p
        return first - 0.5 * over_q, first, (0.5 * t) * (over_p + mixed)
    elif function == "jeffreys":  # (t − 1) log t
        t, t_step, log = _ratio(x)
        product = t * log
        return t_step * x, product + t_step, product + (t + t)
    elif function == "chi_squared":  # (t − 1)²
        t, t_step, _log = _ratio(x)
        return t_step * t_step, (t_step + t_step) * t, (t + t) * (t + t_step)
    elif function == "neyman":  # (t − 1)²/t
        t, t_step, u, u_step, _log = _ratios(x)
        return -t_step * u_step, t_step - u_step, t + u
    elif function == "squared_hellinger":  # ½ (√t − 1)²
        root, root_step, _log = _ratio(0.5 * x)
        half_step = 0.5 * root_step
        return half_step * root_step, half_step * root, 0.25 * root * (root + root_step)
    elif function == "total_variation":  # ½ |t − 1|, with the subgradient 0 at t = 1
        t, t_step, _log = _ratio(x)
        slope = 0.5 * t
        first = tl.where(x < 0.0, -slope, tl.where(x > 0.0, slope, x))  # x: 0, or NaN
        return 0.5 * tl.abs(t_step), first, first
    elif function == "alpha_high":  # (t^α − α t − (1 − α))/(α(α − 1)), by t^{α−1}
        tilt = alpha - 1.0
        t, t_step, _log = _ratio(x)
        _power, power_step, _tilted_log = _ratio(-_below_exp_bound(-x) * tilt)
        first = t * (power_step * (1.0 / tilt))
        return (first - _below_infinity(t_step)) * (1.0 / alpha), first, alpha * first + t
    else:  # the same by t^α
        tl.static_assert(function == "alpha_low")
        weight = 1.0 / (1.0 - alpha)
        t, t_step, _log = _ratio(x)
        power, power_step, _power_log = _ratio(_below_exp_bound(x) * alpha)
        value = t_step - power_step * (1.0 / alpha)
        return value * weight, (t_step - power_step) * weight, (t - alpha * power) * weight


@triton.jit
def _over_ratio(x, alpha, function: tl.constexpr):
    """The same, all over e^x, without overflow where e^x alone would."""
    if function == "kl":
        return x, x + 1.0, x + 2.0
    elif function == "kl_k2":
        square = 0.5 * x * x
        return square, square + x, square + x + x + 1.0
    elif function == "kl_k3":
        _u, u_step, _log = _ratio(-x)
        return x + u_step, x, x + 1.0
    elif function == "reverse_kl":
        u, _u_step, log = _ratio(-x)
        return u * log, -u, _constant(x, 0.0)
    elif function == "reverse_kl_k2":
        u, _u_step, log = _ratio(-x)
        return u * (0.5 * log * log), -u * log, u
    elif function == "reverse_kl_k3":
        u, u_step, log = _ratio(-x)
        return u * log - _below_infinity(u_step), -u_step, _constant(x, 1.0)
    elif function == "jensen_shannon":
        _t, u, over_q, over_p, mixed = _mixture(x)
        return 0.5 * (over_p - u * _below_infinity(over_q)), 0.5 * over_p, 0.5 * (over_p + mixed)
    elif function == "jeffreys":
        _u, u_step, _log = _ratio(-x)
        return -u_step * x, x - u_step, x + 2.0
    elif function == "chi_squared":
        t, t_step, _u, u_step, _log = _ratios(x)
        return -t_step * u_step, t_step + t_step, (t + t) + (t_step + t_step)
    elif function == "neyman":
        u, u_step, _log = _ratio(-x)
        return u_step * u_step, -u_step * (u + 1.0), u * u + 1.0
    elif function == "squared_hellinger":
        root, root_step, _log = _ratio(-0.5 * x)
        half_step = 0.5 * root_step
        return half_step * root_step, -half_step, 0.5 - 0.25 * root
    elif function == "total_variation":
        _u, u_step, _log = _ratio(-x)
        first = tl.where(x < 0.0, -0.5, tl.where(x > 0.0, 0.5, x))
        return 0.5 * tl.abs(u_step), first, first
    elif function == "alpha_high":
        tilt = alpha - 1.0
        _u, u_step, _log = _ratio(-x)
        _power, power_step, _tilted_log = _ratio(x * tilt)
        tilted = power_step * (1.0 / tilt)
        return (u_step - _below_infinity(-tilted)) * (1.0 / alpha), tilted, alpha * tilted + 1.0
    else:
        tl.static_assert(function == "alpha_low")
        tilt = alpha - 1.0
        weight = 1.0 / tilt
        u, u_step, _log = _ratio(-x)
        _power, power_step, _power_log = _ratio(_below_exp_bound(x) * alpha)
        _over, over_step, _over_log = _ratio(x * tilt)
        first = over_step * weight
        return (_below_infinity(u_step) + u * (power_step * (1.0 / alpha))) * weight, first, alpha * first + 1.0


@triton.jit
def jet(log_ratio, alpha, function: tl.constexpr, flipped: tl.constexpr, over_ratio: tl.constexpr):
    """The summand and its first two derivatives in `log_ratio`, in whose dtype `alpha` is too.

    The constants are the fields of `f_divergence_terms.Term`.
    """
    x = -log_ratio if flipped else log_ratio
    if over_ratio:
        value, first, second = _over_ratio(x, alpha, function)
    else:
        value, first, second = _plain(x, alpha, function)
    if flipped:
        first = -first
    return value, first, second
