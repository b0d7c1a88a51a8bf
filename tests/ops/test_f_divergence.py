"""Estimates of f-divergences: against their definitions, for every backend and instruction set, and their derivatives.

What is biased and what is not is in test_f_divergence_unbiased.py.
"""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parl_core.ops import available_backends, f_divergence
from parl_core.ops.accelerators import triton_devices
from parl_core.ops.f_divergence import _SUM
from parl_core.ops.f_divergence_elementwise import TERMS
from parl_core.ops.f_divergence_terms import KINDS
from tests.ops.f_divergences import (
    MODES,
    NAMES,
    TOLERANCE,
    arguments,
    case_term,
    expected_jet,
    expected_of_normals,
    log_ratios,
    plain_summand,
)


@pytest.fixture(params=["reference", "portable", "avx2", "avx512", "triton"])
def backend(request):
    """The reference, the kernel in each instruction set, and Triton's where it is interpreted, on the CPU."""
    if request.param == "triton" and ("triton" not in available_backends() or "cpu" not in triton_devices()):
        pytest.skip("Triton's kernels do not run on the CPU here; tests/kernels has their tests on a GPU")
    if request.param in ("reference", "triton"):
        yield request.param
        return
    if "cpp" not in available_backends():
        pytest.skip("backend cpp is unavailable")
    from parl_core import _native

    if request.param not in _native.isas():
        pytest.skip(f"this machine has no {request.param}")
    before = _native.isa()
    _native.use_isa(request.param)
    yield "cpp"
    _native.use_isa(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@NAMES
class TestSummand:
    def test_against_the_definition(self, backend, name, dtype):
        """Value and two derivatives of every element; the definition is differentiated by autograd in float64."""
        for sampled_from, on_policy in MODES:
            term, kernel = case_term(name, sampled_from, on_policy), TERMS.kernel(backend)
            x, expected = expected_of_normals(name, sampled_from, on_policy, dtype)
            # The definition itself cancels about x = 0, by eps/|α(α − 1)|.
            scale = 1 + max(part.abs().max().item() for part in expected) * 1e-3
            for order in range(3):
                found = kernel(x, term, order)
                assert found.dtype == dtype
                size = expected[order].abs() + scale
                error = ((found.double() - expected[order]).abs() / size).max().item()
                assert error < (1e-12 if dtype == torch.float64 else 2e-6), order

    def test_sum_and_gradient(self, backend, name, dtype):
        """Over ragged trajectories with weights, into a poisoned gradient."""
        for sampled_from, on_policy in MODES:
            lengths = torch.tensor([3, 0, 1, 63, 17, 0, 16, 31])
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            x = log_ratios(int(lengths.sum()), seed=1, dtype=dtype, spread=0.2)
            weights = torch.linspace(0.1, 2.0, len(lengths), dtype=dtype)
            gradient = torch.full_like(x, math.nan)
            term = case_term(name, sampled_from, on_policy)
            value = _SUM.kernel(backend)(x, offsets, weights, term, gradient)
            sums = torch.stack([x[a:b].double().sum() for a, b in itertools.pairwise(offsets)])
            expected, slope, _ = expected_jet(name, sampled_from, on_policy, sums)
            close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
            torch.testing.assert_close(value.double(), (weights.double() * expected).sum(), **close)
            torch.testing.assert_close(
                gradient.double(), (weights.double() * slope).repeat_interleave(lengths), **close
            )


SMALL = ["kl", "jensen_shannon", "total_variation", "alpha 0.2", "alpha 3.0"]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 600, 1000]), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
    name=st.sampled_from(SMALL),
    weighted=st.booleans(),
    pooled=st.booleans(),
    threads=st.integers(1, 3),
)
def test_kernel_against_reference(lengths, seed, name, weighted, pooled, threads):
    native = pytest.importorskip("parl_core._native")
    total = sum(lengths)
    if pooled and total == 0:
        return
    offsets = None if pooled else torch.tensor([0, *lengths]).cumsum(0)
    x = log_ratios(total, seed, spread=0.1)
    count = total if pooled else len(lengths)
    weights = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=x.dtype) if weighted else None
    term = case_term(name, "q", False)
    expected_gradient = torch.empty_like(x)
    expected = _SUM.kernel("reference")(x, offsets, weights, term, expected_gradient)
    before = native.isa()
    try:
        for isa in native.isas():
            native.use_isa(isa)
            gradient = torch.full_like(x, math.nan)
            value = native.divergence_sum(x, offsets, weights, gradient, *term, threads)
            assert value == pytest.approx(expected.item(), rel=1e-12, abs=1e-14)
            alone = native.divergence_sum(x, offsets, weights, None, *term, threads)
            assert alone == pytest.approx(value, rel=1e-13, abs=1e-15)
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)
    finally:
        native.use_isa(before)


@pytest.mark.usefixtures("isa")
def test_the_gradient_ends_where_it_should():
    """Trajectories are filled by whole vectors: nothing outside the gradient is written."""
    from parl_core import _native

    term = case_term("kl", "q", False)
    for count in (1, 5, 16, 33, 64 * 1024 + 3):
        x = log_ratios(count, dtype=torch.float32, spread=0.01)
        room = torch.full((count + 64,), 7.0)
        offsets = torch.tensor([0, count // 3, count // 3, count])
        _native.divergence_sum(x, offsets, None, room[:count], *term, 2)
        _native.divergence_sum(x, None, None, room[:count], *term, 2)
        assert (room[count:] == 7.0).all()


@pytest.mark.parametrize("name", ["kl", "jensen_shannon", "chi_squared", "squared_hellinger", "kl, k3"])
@pytest.mark.parametrize("spread", [1.0, 0.02])
def test_a_million_in_single_precision(name, spread):
    """As exact as the elements themselves: the mean to 1e-6 of the mean size, and to the bit by 1 thread or its fellows."""
    x = log_ratios(10**6, dtype=torch.float32, spread=spread)
    given = arguments(name)
    expected = plain_summand(name, "q", x.double())
    found = f_divergence(x, **given).item()
    assert abs(found - expected.mean().item()) < 1e-6 * expected.abs().mean().item()
    assert f_divergence(x, **given).item() == found
    offsets = torch.arange(0, 10**6 + 1, 50)
    sums = x.double().reshape(-1, 50).sum(1) / 50
    expected = plain_summand(name, "q", sums)
    found = f_divergence(x / 50, offsets=offsets, **given).item()
    assert abs(found - expected.mean().item()) < 2e-6 * expected.abs().mean().item()


def test_a_gradient_in_memory_that_is_mapped_for_it():
    """Beyond 32 MiB; the gradient of KL at p = q is 1/T everywhere."""
    x = torch.zeros(9_000_011, requires_grad=True)
    value = f_divergence(x, "kl")
    (gradient,) = torch.autograd.grad(value, x)
    assert value.item() == 0.0
    assert (gradient == torch.tensor(1.0 / 9_000_011)).all()


@pytest.mark.parametrize("name", ["kl", "total_variation", "alpha 0.7"])
def test_threads_share_the_work(name):
    """Large enough for several threads; the same bits again for the same number of them."""
    native = pytest.importorskip("parl_core._native")
    x = log_ratios(200_003, spread=0.3)
    cuts = torch.randint(0, len(x), (3000,), generator=torch.Generator().manual_seed(0)).sort().values
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([len(x)])])
    term = case_term(name, "q", False)
    for bounds in (None, offsets):
        alone = torch.full_like(x, math.nan)
        value = native.divergence_sum(x, bounds, None, alone, *term, 1)
        for threads in (2, 5, 1000):
            gradient, again = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
            first = native.divergence_sum(x, bounds, None, gradient, *term, threads)
            assert first == pytest.approx(value, rel=1e-13)
            assert torch.equal(gradient, alone)
            assert native.divergence_sum(x, bounds, None, again, *term, threads) == first


class TestExtremes:
    @NAMES
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
    def test_overflow_is_an_infinity_and_never_a_nan(self, backend, name, dtype):
        """Far out: as in exact arithmetic, rounded to an infinity or to zero where the dtype ends there."""
        for sampled_from, on_policy in MODES:
            mpmath = pytest.importorskip("mpmath")
            term, kernel = case_term(name, sampled_from, on_policy), TERMS.kernel(backend)
            points = [-800.0, -300.0, -89.5, -20.0, 20.0, 89.5, 300.0, 800.0]
            for order in range(3):
                found = kernel(torch.tensor(points, dtype=dtype), term, order)
                for x, value in zip(points, found.tolist(), strict=True):
                    exact = _exact(mpmath, name, sampled_from, on_policy, order, x)
                    largest, smallest = torch.finfo(dtype).max, 4 * torch.finfo(dtype).eps
                    if abs(exact) > largest:
                        # Products of several factors may come within reach of the end of the range.
                        assert value == math.copysign(math.inf, exact) or abs(value) > largest * 1e-3, (order, x, value)
                    elif abs(exact) > largest * 1e-2:
                        assert value == math.copysign(math.inf, exact) or value == pytest.approx(float(exact), rel=1e-4)
                    else:
                        assert value == pytest.approx(float(exact), rel=1e-4, abs=smallest), (order, x)

    def test_a_mean_is_finite_where_a_single_term_is_not(self, backend):
        """e^89.5 is beyond float32, a thousandth of it is not; so is the gradient of its mean."""
        x = torch.zeros(10_000)
        x[17] = 89.5
        gradient = torch.full_like(x, math.nan)
        value = _SUM.kernel(backend)(x, None, None, case_term("chi_squared", "q", False), gradient)
        assert value.item() == math.inf  # e^179
        value = _SUM.kernel(backend)(x, None, None, case_term("kl, k3", "q", False), gradient)
        assert value.item() == pytest.approx(88.5e-4 * math.exp(89.5), rel=1e-5)
        assert gradient[17].item() == pytest.approx(89.5e-4 * math.exp(89.5), rel=1e-5)
        assert gradient[18].item() == 0.0

    def test_a_weight_makes_a_gradient_finite_where_the_term_is(self, backend):
        """(e^44.2 − 1)² is in the range of float32, its derivative is not; a ten-billionth of that is."""
        x, weights = torch.tensor([44.2, 0.1]), torch.tensor([1e-10, 1.0])
        expected = torch.empty(2, dtype=torch.float64)
        term = case_term("chi_squared", "q", False)
        _SUM.kernel("reference")(x.double(), None, weights.double(), term, expected)
        for offsets in (None, torch.tensor([0, 1, 2])):
            gradient = torch.full_like(x, math.nan)
            _SUM.kernel(backend)(x, offsets, weights, term, gradient)
            torch.testing.assert_close(gradient.double(), expected, rtol=2e-5, atol=0.0)

    @NAMES
    def test_nan_stays_nan(self, backend, name):
        for sampled_from, on_policy in MODES:
            x = log_ratios(40, dtype=torch.float32)
            x[33] = math.nan
            gradient = torch.zeros_like(x)
            term = case_term(name, sampled_from, on_policy)
            assert math.isnan(_SUM.kernel(backend)(x, None, None, term, gradient).item())
            for order in range(3):
                found = TERMS.kernel(backend)(x, term, order)
                assert found.isnan().nonzero().flatten().tolist() == [33]

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("kl", 0.0),
            ("kl, k2", 0.0),
            ("kl, k3", 1.0),
            ("reverse_kl", math.inf),
            ("reverse_kl, k3", math.inf),
            ("jensen_shannon", 0.5 * math.log(2)),
            ("jeffreys", math.inf),
            ("chi_squared", 1.0),
            ("neyman", math.inf),
            ("squared_hellinger", 0.5),
            ("total_variation", 0.5),
            ("alpha 0.2", 5.0),
            ("alpha 0.7", 1 / 0.7),
            ("alpha 3.0", 1 / 3),
            ("alpha -1.3", math.inf),
        ],
    )
    def test_samples_without_mass_under_p(self, backend, name, value):
        """f(0)."""
        for dtype in (torch.float32, torch.float64):
            found = f_divergence(torch.tensor([-math.inf], dtype=dtype), **arguments(name), backend=backend)
            assert found.item() == pytest.approx(value, rel=1e-6)
        adjoint = {"kl": "reverse_kl", "reverse_kl": "kl", "chi_squared": "neyman", "neyman": "chi_squared"}
        swapped = arguments(name)
        if "alpha" in swapped:
            swapped["alpha"] = 1 - swapped["alpha"]
        swapped["kind"] = adjoint.get(swapped["kind"], swapped["kind"])
        found = f_divergence(torch.tensor([math.inf]), **swapped, sampled_from="p", backend=backend)
        assert found.item() == pytest.approx(value, rel=1e-6)

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_divergence_of_equal_distributions(self, backend, kind):
        """The kink of the total variation has the subgradient 0."""
        x = torch.zeros(5, requires_grad=True)
        value = f_divergence(x, kind, alpha=1.7 if kind == "alpha" else None, estimator=None, backend=backend)
        (gradient,) = torch.autograd.grad(value, x)
        assert value.item() == 0.0
        slope = {"kl": 0.2, "reverse_kl": -0.2}.get(kind, 0.0)
        assert gradient.tolist() == pytest.approx([slope] * 5)


@functools.cache
def _exact(mpmath, name, sampled_from, on_policy, order, x):
    """The summand's derivative from the definition, by the rule of the power functions of which all are made."""
    with mpmath.workdps(900):
        x = mpmath.mpf(x)
        if name == "total_variation":
            shift = 1 if sampled_from == "p" else 0
            sign = mpmath.sign(x) / 2
            t_part, one_part = mpmath.exp((1 - shift) * x), -mpmath.exp(-shift * x)
            exponents = (1, 0) if on_policy and sampled_from == "p" else (1 - shift, -shift)
            if on_policy and sampled_from == "q":
                exponents = (0, -1)
            return sign * (t_part * exponents[0] ** order + one_part * exponents[1] ** order)
        base = -1 if on_policy and sampled_from == "q" else 0
        if not on_policy and sampled_from == "p":
            base = -1

        def moving(r):
            return mpmath.exp(base * r) * _generator(mpmath, name, r)

        rest = {("p", True): -x, ("q", True): x}.get((sampled_from, on_policy), mpmath.mpf(0))
        h = mpmath.mpf(10) ** -60
        values = [moving(x + k * h) for k in (-1, 0, 1)]
        found = [values[1], (values[2] - values[0]) / (2 * h), (values[2] - 2 * values[1] + values[0]) / h**2][order]
        return found * mpmath.exp(rest)


def _generator(mpmath, name, r):
    t, log = mpmath.exp(r), mpmath.log
    if name.startswith("alpha") and float(name.split()[1]) not in (0.0, 1.0):
        a = mpmath.mpf(float(name.split()[1]))
        return (t**a - a * t - (1 - a)) / (a * (a - 1))
    return {
        "kl": lambda: t * r,
        "reverse_kl": lambda: -r,
        "jensen_shannon": lambda: (t * r - (1 + t) * log((1 + t) / 2)) / 2,
        "jeffreys": lambda: (t - 1) * r,
        "chi_squared": lambda: (t - 1) ** 2,
        "neyman": lambda: (t - 1) ** 2 / t,
        "squared_hellinger": lambda: (mpmath.sqrt(t) - 1) ** 2 / 2,
        "kl, k2": lambda: t * r**2 / 2,
        "kl, k3": lambda: t * r - t + 1,
        "alpha 1.0": lambda: t * r - t + 1,
        "reverse_kl, k2": lambda: r**2 / 2,
        "reverse_kl, k3": lambda: t - 1 - r,
        "alpha 0.0": lambda: t - 1 - r,
    }[name]()


def test_custom_op_is_well_formed():
    x = log_ratios(5).requires_grad_()
    term = case_term("kl", "q", False)
    for order in range(3):
        torch.library.opcheck(torch.ops.parl_core.f_divergence_terms.default, (x, *term, order, None))


def test_half_precision_is_left_to_the_reference():
    x = log_ratios(100, dtype=torch.bfloat16)
    found = f_divergence(x, "jensen_shannon")
    assert found.dtype == torch.bfloat16
    assert found.item() == pytest.approx(f_divergence(x.double(), "jensen_shannon").item(), rel=1e-2)


FOUR = torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: f_divergence([0.0], "kl"), TypeError, "log_ratio must be a Tensor, got list"),
        (lambda: f_divergence(torch.arange(3), "kl"), TypeError, "log_ratio must be of a floating-point dtype"),
        (
            lambda: f_divergence(FOUR.reshape(2, 2), "kl"),
            ValueError,
            r"log_ratio must be of shape \(T,\), got \(2, 2\)",
        ),
        (lambda: f_divergence(FOUR[:0], "kl"), ValueError, "log_ratio must hold at least one sample"),
        (lambda: f_divergence(FOUR[:0], "kl", torch.tensor([0])), ValueError, "at least one sample"),
        (lambda: f_divergence(FOUR, "helinger"), ValueError, "Unknown kind 'helinger': did you mean"),
        (lambda: f_divergence(FOUR, "kl", alpha=2.0), ValueError, "alpha must be left out for kind 'kl', got 2.0"),
        (lambda: f_divergence(FOUR, "alpha"), ValueError, "alpha must be a finite number for kind 'alpha', got None"),
        (lambda: f_divergence(FOUR, "alpha", alpha=math.nan), ValueError, "alpha must be a finite number"),
        (lambda: f_divergence(FOUR, "kl", sampled_from="r"), ValueError, "sampled_from must be 'p' or 'q', got 'r'"),
        (lambda: f_divergence(FOUR, "kl", estimator="k4"), ValueError, "estimator must be 'k1', 'k2', 'k3' or None"),
        (lambda: f_divergence(FOUR, "neyman", estimator="k1"), ValueError, "estimator must be None for kind 'neyman'"),
        (
            lambda: f_divergence(FOUR, "kl", self_normalized=True, on_policy=True),
            ValueError,
            "self_normalized must be False with on_policy=True",
        ),
        (lambda: f_divergence(FOUR, "kl", [0, 4]), TypeError, "offsets must be a Tensor or None, got list"),
        (lambda: f_divergence(FOUR, "kl", torch.tensor([0, 4]).int()), TypeError, "offsets must be of dtype"),
        (lambda: f_divergence(FOUR, "kl", torch.tensor([[0, 4]])), ValueError, r"offsets must be of shape \(N\+1,\)"),
        (lambda: f_divergence(FOUR, "kl", torch.tensor([0, 3])), ValueError, "end at the number of steps, 4, got 3"),
        (lambda: f_divergence(FOUR, "kl", torch.tensor([0, 3, 2, 4])), ValueError, "must not decrease"),
        (
            lambda: torch.func.grad(lambda x: f_divergence(x, "kl", torch.tensor([0, 3])))(FOUR),
            ValueError,
            "end at the number of steps, 4, got 3",
        ),
        (
            lambda: torch.func.vmap(lambda o: f_divergence(FOUR, "kl", o))(torch.tensor([[0, 4], [0, 4]])),
            ValueError,
            "offsets must be the same for all of a vmap",
        ),
        (
            lambda: f_divergence(FOUR, "kl", torch.tensor([0, 3]), self_normalized=True),
            ValueError,
            "end at the number of steps, 4, got 3",
        ),
        (lambda: f_divergence(FOUR, "kl", weights=[1.0]), TypeError, "weights must be a Tensor, got list"),
        (lambda: f_divergence(FOUR, "kl", weights=FOUR[:3]), ValueError, r"weights must be of shape \(N,\) = \(4,\)"),
        (
            lambda: f_divergence(FOUR, "kl", weights=FOUR.double()),
            TypeError,
            "weights must be of the dtype of log_ratio",
        ),
        (lambda: f_divergence(FOUR, "kl", weights=FOUR.to("meta")), ValueError, "weights must be on the device of"),
        (
            lambda: f_divergence(FOUR, "kl", torch.zeros(2).long().to("meta")),
            ValueError,
            "offsets must be on the device",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_native_module_checks_its_tensors():
    native = pytest.importorskip("parl_core._native")
    x, offsets, out = torch.zeros(4), torch.tensor([0, 4]), torch.empty(4)
    term = ("kl", False, False, math.nan)

    def total(x=x, offsets=None, weights=None, gradient=None, term=term) -> Tensor:
        return native.divergence_sum(x, offsets, weights, gradient, *term, 1)

    def terms(x=x, out=out, order=0, term=term) -> None:
        native.divergence_terms(x, out, *term, order, 1)

    for call, error, message in [
        (lambda: total(x=x.long()), TypeError, "log_ratio must be float32 or float64, got int64"),
        (lambda: total(x=x[None]), ValueError, "log_ratio must have one dimension, got 2"),
        (lambda: total(x=torch.zeros(8)[::2]), ValueError, "log_ratio must be contiguous"),
        (lambda: total(x=x.to("meta")), TypeError, "log_ratio must be on the CPU, got a tensor on meta"),
        (lambda: total(x=None), TypeError, "log_ratio must be a Tensor, got NoneType"),
        (lambda: total(x=x[:0]), ValueError, "log_ratio must be of one sample or more, got none"),
        (lambda: total(offsets=torch.tensor([0])), ValueError, "offsets must end at the number of steps, 4, got 0"),
        (lambda: total(x=x[:0], offsets=torch.tensor([0])), ValueError, "offsets must be of one sample or more"),
        (lambda: total(offsets=torch.tensor([0, 10**9])), ValueError, "offsets must end at .* 4, got 1000000000"),
        (lambda: total(offsets=torch.tensor([-9, 4])), ValueError, "offsets must start at 0, got -9"),
        (lambda: total(offsets=torch.tensor([0, 9, 4])), ValueError, "offsets must not decrease"),
        (lambda: total(offsets=offsets.double()), TypeError, "offsets must be int64, got float64"),
        (lambda: total(offsets=offsets[:0]), ValueError, "offsets must have at least one element, got none"),
        (lambda: total(weights=x.double()), TypeError, "weights must be of dtype float32 as log_ratio is, got float64"),
        (lambda: total(weights=x[:3]), ValueError, "weights must have 4 elements, got 3"),
        (lambda: total(offsets=offsets, weights=x), ValueError, "weights must have 1 elements, got 4"),
        (lambda: total(gradient=x[:3]), ValueError, "gradient must have 4 elements, got 3"),
        (lambda: total(gradient=offsets), TypeError, "gradient must be of dtype float32"),
        (lambda: total(term=("kl_k4", *term[1:])), ValueError, "function must be .* got 'kl_k4'"),
        (lambda: terms(out=None), TypeError, "out must be a Tensor, got None"),
        (lambda: terms(out=out[:3]), ValueError, "out must have 4 elements, got 3"),
        (lambda: terms(out=out.double()), TypeError, "out must be of dtype float32"),
        (lambda: terms(order=3), ValueError, "order must be 0, 1 or 2, got 3"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_batched_cotangents():
    ratios = torch.randn(6, dtype=torch.float64).requires_grad_()
    value = f_divergence(ratios, "kl", torch.tensor([0, 2, 6]))
    (found,) = torch.autograd.grad(
        value, ratios, torch.tensor([1.0, -2.0]).double(), is_grads_batched=True, retain_graph=True
    )
    (alone,) = torch.autograd.grad(value, ratios)
    torch.testing.assert_close(found, torch.stack((alone, -2.0 * alone)))
