"""exp, log and their kin in every instruction set: errors in units of the last place, and the special values."""

import math

import numpy as np
import pytest
import torch

native = pytest.importorskip("parl_core._native")

NUMPY = {
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.log1p(np.exp(x)),
}
# Where, and how many units in the last place may be off: a little above what 400 000 random points showed.
BOUNDS = [
    ("exp", -87, 87, 1.2),
    ("exp", -1, 1, 1.2),
    ("expm1", -3, 3, 2.0),
    ("expm1", -1e-3, 1e-3, 1.0),
    ("log", 0, 10, 1.0),
    ("log", 0.9, 1.1, 1.0),
    ("log", 1e-38, 1e38, 1.0),
    ("log1p", -0.9, 3, 1.5),
    ("log1p", -1e-4, 1e-4, 1.5),
    ("tanh", -5, 5, 2.5),
    ("tanh", -1e-2, 1e-2, 2.5),
    ("sigmoid", -30, 30, 2.5),
    ("softplus", -30, 30, 2.5),
]


def evaluate(name, values):
    out = torch.full_like(values, math.nan)
    native.elementary(name, values, out)
    return out


@pytest.mark.skipif(np.finfo(np.longdouble).nmant <= 52, reason="this machine has no longer floating-point numbers")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "low", "high", "bound"), BOUNDS)
def test_errors(isa, name, low, high, bound, dtype):
    x = np.random.default_rng(0).uniform(low, high, 20_003).astype(dtype)  # the last 3 go as scalars
    found = evaluate(name, torch.from_numpy(x)).numpy()
    expected = NUMPY[name](x.astype(np.longdouble))
    unit = np.spacing(np.abs(expected.astype(dtype))).astype(np.longdouble)
    assert float((np.abs(found - expected) / unit).max()) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NUMPY)
def test_special_values(isa, name, dtype):
    """In each lane and as scalars: no NaN but of a NaN and outside the domain, infinities and zeros where they belong."""
    tiny = torch.finfo(dtype).smallest_normal / 1024  # denormal
    points = [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, tiny, 2000.0, -2000.0, -2.0, torch.finfo(dtype).max]
    x = torch.tensor(points, dtype=dtype).repeat(17)
    found = evaluate(name, x)
    with np.errstate(all="ignore"):
        stable = {"softplus": lambda v: np.logaddexp(0, v)}.get(name, NUMPY[name])
        expected = torch.from_numpy(stable(x.double().numpy())).to(dtype)
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


def test_what_is_wrong_is_refused():
    x = torch.zeros(4)
    for call, error, message in [
        (lambda: native.elementary("sin", x, x), ValueError, "name must be .* got 'sin'"),
        (lambda: native.elementary("exp", x.long(), x), TypeError, "values must be float32 or float64, got int64"),
        (lambda: native.elementary("exp", x, x.double()), TypeError, "out must have the dtype of values"),
        (lambda: native.elementary("exp", x, x[:3]), ValueError, "out must have as many elements as values, 4, got 3"),
    ]:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(("dtype", "bits"), [(np.float32, np.uint32), (np.float64, np.uint64)])
@pytest.mark.parametrize("name", NUMPY)
def test_every_kind_of_nan_stays_one(isa, name, dtype, bits):
    """Whatever their sign and payload; those of the last elements go as scalars."""
    width, mantissa = (32, 23) if dtype == np.float32 else (64, 52)
    exponent = (1 << width - 1) - (1 << mantissa)
    payloads = [1 << place for place in range(mantissa)] + [(1 << mantissa) - 1]
    numbers = [sign << width - 1 | exponent | payload for sign in (0, 1) for payload in payloads]
    for kept in range(1, 18):  # each of the payloads is once among the scalars
        values = np.array(numbers[-kept:] + numbers[:-kept], dtype=bits).view(dtype)
        assert evaluate(name, torch.from_numpy(values)).isnan().all()
