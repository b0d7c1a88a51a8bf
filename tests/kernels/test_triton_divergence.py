"""The f-divergence kernels in Triton against the reference in float64: on a GPU, or interpreted on the CPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

pytest.importorskip("triton")
from parl_core.kernels import triton_divergence as kernels
from parl_core.kernels.triton_divergence import Estimate, divergence, divergence_terms
from parl_core.ops import f_divergence
from parl_core.ops.f_divergence import reference, reference_product
from parl_core.ops.f_divergence_elementwise import reference_terms
from parl_core.ops.f_divergence_terms import Term
from tests.conftest import HAS_GPU
from tests.kernels.signatures.triton_divergence_kernels import FUNCTIONS
from tests.ops.f_divergences import NAMES, arguments, expected_jet, log_ratios
from tests.ops.ragged import offsets_of

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")  # Hypothesis takes no fixtures that live for one example only
FLOATS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
WIDE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
ALPHA = {"alpha_low": 0.3, "alpha_high": 1.7}
KL, MIXTURE = Term("kl", False, False, math.nan), Term("jensen_shannon", True, True, math.nan)


def term(function, flipped=False, over_ratio=False):
    return Term(function, flipped, over_ratio, ALPHA.get(function, math.nan))


def check(log_ratio, offsets, weights, which, *, rtol=None):
    """All that the kernels write, into NaNs between guards, against the reference."""
    dtype, count = log_ratio.dtype, len(log_ratio)
    vector = torch.linspace(-1.0, 2.0, count, dtype=torch.float64).to(dtype)
    cotangent = torch.tensor(-1.3, dtype=dtype)
    wide = (log_ratio.double(), offsets, None if weights is None else weights.double(), which)
    gradient = torch.empty(count, dtype=torch.float64)
    expected = {"value": reference(*wide, gradient), "gradient": gradient}
    expected["product"], expected["slope"] = reference_product(*wide, vector.double(), cotangent.double(), True)

    steps = {name: torch.full((count + 32,), 7.0, dtype=dtype, device=DEVICE) for name in ("gradient", "product")}
    out = {name: guarded[16:-16].fill_(math.nan) for name, guarded in steps.items()}
    out |= {name: torch.full((), math.nan, dtype=dtype, device=DEVICE) for name in ("value", "slope")}
    given = (None if given is None else given.to(DEVICE) for given in (log_ratio, offsets, weights, vector, cotangent))
    log_ratio, offsets, weights, vector, cotangent = given
    divergence(log_ratio, offsets, Estimate(weights, which, vector=vector, cotangent=cotangent, **out))
    for name, found in out.items():
        size = expected[name].abs().max().item() if expected[name].numel() else 0.0
        tolerance = (rtol or WIDE[dtype]) * (1.0 + size)
        torch.testing.assert_close(
            found.cpu().double(), expected[name], rtol=rtol or WIDE[dtype], atol=tolerance, msg=name
        )
    for guarded in steps.values():
        assert (guarded[:16] == 7.0).all()
        assert (guarded[-16:] == 7.0).all()
    # Each alone gives the same bits: they share one pass, and nothing else.
    alone = torch.full((count,), math.nan, dtype=dtype, device=DEVICE)
    value = torch.full((), math.nan, dtype=dtype, device=DEVICE)
    divergence(log_ratio, offsets, Estimate(weights, which, value, alone))
    assert torch.equal(alone, out["gradient"])
    assert torch.equal(value, out["value"])


@FLOATS
@pytest.mark.parametrize("function", FUNCTIONS)
class TestSummand:
    def test_all_magnitudes(self, function, dtype):
        x = torch.cat([log_ratios(100, spread=spread) for spread in (1e-6, 1e-2, 1.0, 10.0)]).to(dtype)
        for which in (term(function), term(function, flipped=True, over_ratio=True)):
            for order in range(3):
                found = divergence_terms(x.to(DEVICE), which, order).cpu()
                assert found.dtype == dtype
                expected = reference_terms(x.double(), which, order)
                # Where a sum of larger numbers is small, it is exact to their size; none has more than a few times |x|.
                size = expected.abs() + x.double().abs() + (0.0 if order == 0 else 1.0)
                error = ((found.double() - expected).abs() / size).max().item()
                assert error < 32 * torch.finfo(dtype).eps, (which, order)

    def test_far_out(self, function, dtype):
        """Infinite where the exact number is beyond the dtype, never a NaN."""
        far = (20.0, 60.0, 200.0, 1e4) if dtype == torch.float32 else (20.0, 60.0, 300.0, 1e4)
        x = torch.tensor([0.0, -0.0, *far, *(-size for size in far)], dtype=dtype)
        for which in (term(function), term(function, flipped=True, over_ratio=True)):
            for order in range(3):
                found = divergence_terms(x.to(DEVICE), which, order).cpu()
                expected = reference_terms(x.double(), which, order).to(dtype)
                beyond = expected.isinf()
                assert (found[beyond] * expected[beyond].sign() > torch.finfo(dtype).max * 1e-3).all()
                torch.testing.assert_close(found[~beyond], expected[~beyond], rtol=2e-5, atol=1e-6)

    def test_a_nan_stays_where_it_is(self, function, dtype):
        x = log_ratios(40, dtype=dtype)
        x[33] = math.nan
        for which in (term(function), term(function, flipped=True, over_ratio=True)):
            for order in range(3):
                found = divergence_terms(x.to(DEVICE), which, order).cpu()
                assert found.isnan().nonzero().flatten().tolist() == [33]
            value, gradient = (torch.zeros(shape, dtype=dtype, device=DEVICE) for shape in ((), 40))
            divergence(x.to(DEVICE), None, Estimate(None, which, value, gradient))
            assert value.isnan()
            assert gradient.cpu().isnan().nonzero().flatten().tolist() == [33]


@FLOATS
def test_full_relative_precision_near_equality(dtype):
    """Of those that are no difference of larger numbers, down to the smallest log-ratios; by their series."""
    x = torch.logspace(-30, -3, 200, dtype=torch.float64).to(dtype)
    x = torch.cat([x, -x])
    r = x.double()
    exact = {
        ("chi_squared", False, 0): torch.expm1(r) ** 2,
        ("squared_hellinger", False, 0): torch.expm1(r / 2) ** 2 / 2,
        ("total_variation", False, 0): torch.expm1(r).abs() / 2,
        ("jeffreys", False, 0): torch.expm1(r) * r,
        ("neyman", False, 0): -torch.expm1(r) * torch.expm1(-r),
        ("reverse_kl_k3", False, 1): torch.expm1(r),
        ("chi_squared", True, 1): 2 * torch.expm1(r),
        ("jensen_shannon", True, 1): r / 4 - r**2 / 16,
        ("jensen_shannon", False, 1): r / 4 + 3 * r**2 / 16,
        ("alpha_high", True, 1): torch.expm1(0.7 * r) / 0.7,
        ("alpha_low", True, 1): torch.expm1(-0.7 * r) / -0.7,
    }
    for (function, over_ratio, order), expected in exact.items():
        near = r.abs() < 1e-6 if function == "jensen_shannon" else r.abs() < 1
        near &= expected.abs() > torch.finfo(dtype).tiny
        found = divergence_terms(x.to(DEVICE), term(function, over_ratio=over_ratio), order).cpu().double()
        error = (found / expected - 1)[near].abs().max().item()
        assert error < (
            8 * torch.finfo(dtype).eps if function != "jensen_shannon" else 1e-11 if dtype == torch.float64 else 1e-6
        )


class TestSums:
    @FLOATS
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("count", [1, 63, 1023, 1024, 1025, 2047, 2048, 2049, 5000])
    def test_elements_about_the_ends_of_blocks(self, count, weighted, dtype):
        weights = torch.linspace(0.1, 2.0, count, dtype=dtype) if weighted else None
        for which in (KL, MIXTURE):
            check(log_ratios(count, seed=count, dtype=dtype), None, weights, which)

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(
        lengths=st.lists(st.sampled_from([0, 0, 1, 2, 15, 16, 17, 63, 64, 65, 1000]), min_size=1, max_size=12),
        dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
        weighted=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def test_ragged(self, lengths, dtype, weighted, seed):
        x = log_ratios(sum(lengths), seed, dtype, spread=0.05)
        weights = torch.linspace(0.1, 1.0, len(lengths)).to(dtype) if weighted else None
        check(x, offsets_of(lengths), weights, KL)

    @pytest.mark.parametrize("number", [31, 32, 33, 100])
    @FLOATS
    def test_many_short_trajectories_in_a_tile(self, number, dtype, monkeypatch):
        monkeypatch.setattr(kernels, "_PROGRAMS", 1)
        generator = torch.Generator().manual_seed(number)
        lengths = torch.randint(0, 12, (number,), generator=generator).tolist()
        lengths[5] = 100  # far beyond the tile's width
        x = log_ratios(sum(lengths), seed=number, dtype=dtype, spread=0.1)
        for weights in (None, torch.rand(number, generator=generator).to(dtype)):
            check(x, offsets_of(lengths), weights, MIXTURE)

    @pytest.mark.parametrize("lengths", [[100], [64, 65], [0, 500, 1, 0, 40], [200, 0, 300]], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
    def test_long_trajectories_in_parts(self, lengths, dtype, monkeypatch):
        monkeypatch.setattr(kernels, "_LONG", 32)
        monkeypatch.setattr(kernels, "_PART", 32)
        x = log_ratios(sum(lengths), dtype=dtype, spread=0.02)
        for weights in (None, torch.linspace(0.1, 1.0, len(lengths)).to(dtype)):
            check(x, offsets_of(lengths), weights, KL)

    def test_as_long_as_they_are_meant(self):
        """20 000 steps of two trajectories, by the thresholds as they are."""
        check(log_ratios(40_000, dtype=torch.float32, spread=0.005), offsets_of([25_000, 15_000]), None, KL, rtol=2e-5)

    @pytest.mark.parametrize("count", [4 * 2048, 4 * 2048 + 1, 20 * 2048])
    def test_more_programs_than_are_added_at_once(self, count, monkeypatch):
        monkeypatch.setattr(kernels, "_SUMS", 4)
        check(log_ratios(count, dtype=torch.float32, spread=0.5), None, None, KL)

    @FLOATS
    def test_no_steps_at_all(self, dtype):
        """Trajectories without steps have the log-ratio 0, where every divergence is 0."""
        check(torch.zeros(0, dtype=dtype), offsets_of([0, 0, 0]), None, KL)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_half_precision(self, function, dtype):
        """As exact as its numbers: computed in single precision."""
        x = log_ratios(2500, dtype=dtype, spread=0.5)
        check(x, None, torch.rand(2500, generator=torch.Generator().manual_seed(0)).to(dtype) / 2500, term(function))
        for order in range(3):
            found = divergence_terms(x.to(DEVICE), term(function), order).cpu()
            expected = reference_terms(x.double(), term(function), order)
            size = expected.abs() + x.double().abs()
            assert ((found.double() - expected).abs() <= torch.finfo(dtype).eps * size + 1e-6).all()

    @pytest.mark.parametrize("wrong", [[0, 50], [-70, 20, 40], [3, 900, 40], [0, 30, 10, 40]], ids=str)
    def test_wrong_offsets_touch_nothing_outside(self, wrong):
        """Their contents may not have been looked at."""
        guarded = torch.full((104,), 7.0, device=DEVICE)
        log_ratio = torch.full((104,), math.nan, device=DEVICE)
        log_ratio[32:72] = 0.1
        value, offsets = torch.zeros((), device=DEVICE), torch.tensor(wrong, device=DEVICE)
        divergence(log_ratio[32:72], offsets, Estimate(None, KL, value, guarded[32:72]))
        assert value.isfinite()
        assert (guarded[:32] == 7.0).all()
        assert (guarded[72:] == 7.0).all()


class TestBeyondSinglePrecision:
    """Single summands of float32 overflow, their weighted sums and gradients do not: float64 is what they are to be."""

    # e^89.5 is beyond float32, a ten-thousandth of it is not.
    WHICH = Term("kl_k3", False, False, math.nan)

    @pytest.mark.parametrize("place", [0, 17, 2047, 2048, 2999])
    def test_one_element(self, place):
        x = log_ratios(3000, dtype=torch.float32, spread=0.1)
        x[place] = 89.5
        check(x, None, torch.full((3000,), 1e-4), self.WHICH, rtol=1e-6)

    @pytest.mark.parametrize("length", [1, 10])
    def test_one_trajectory(self, length):
        x = log_ratios(7 * length, dtype=torch.float32, spread=0.1)
        x[3 * length : 4 * length] = 89.5 / length
        check(x, offsets_of([length] * 7), torch.full((7,), 1e-4), self.WHICH, rtol=2e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
    @pytest.mark.parametrize("lengths", [None, [1, 1], [2, 3]], ids=str)
    def test_where_only_derivatives_overflow(self, lengths, dtype):
        """(e^r − 1)² of 44.25 is in the range of numbers, its derivatives are not; their weighted ones are."""
        samples = torch.tensor([44.25, 0.125], dtype=dtype)
        x = samples if lengths is None else (samples / torch.tensor(lengths)).repeat_interleave(torch.tensor(lengths))
        offsets = None if lengths is None else offsets_of(lengths)
        weights = torch.tensor([1e-10, 1.0], dtype=dtype)
        check(x.to(dtype), offsets, weights, term("chi_squared"), rtol=2e-5 if dtype == torch.float32 else None)

    def test_where_the_sum_itself_is_infinite(self):
        value, gradient = torch.zeros((), device=DEVICE), torch.zeros(10, device=DEVICE)
        x = torch.full((10,), 89.5, device=DEVICE)
        divergence(x, None, Estimate(None, term("chi_squared"), value, gradient))
        assert value.item() == math.inf
        assert (gradient == math.inf).all()


def test_the_same_bits_every_time():
    x = log_ratios(10_000, dtype=torch.float32).to(DEVICE)
    offsets = offsets_of([7, 0, 500, 493] * 10).to(DEVICE)
    for which in (None, offsets):
        outcomes = []
        for _ in range(3):
            value, gradient = torch.zeros((), device=DEVICE), torch.zeros_like(x)
            divergence(x, which, Estimate(None, KL, value, gradient))
            outcomes.append((value, gradient))
        for value, gradient in outcomes[1:]:
            assert torch.equal(value, outcomes[0][0])
            assert torch.equal(gradient, outcomes[0][1])


class TestThroughTheOp:
    offsets = torch.tensor([0, 3, 3, 7, 12])

    @pytest.mark.parametrize("name", ["kl", "jensen_shannon", "alpha 0.2"])
    def test_finite_differences(self, name):
        """Twice, along random directions, through a function of the estimate; and in the weights, too."""
        x = log_ratios(12, seed=3, spread=0.4).to(DEVICE).requires_grad_()
        weights = torch.tensor([0.1, 0.5, 0.2, 0.7], dtype=torch.float64, device=DEVICE)

        def estimate(x, weights=weights):
            given = {"offsets": self.offsets.to(DEVICE), "weights": weights, "backend": "triton"}
            return f_divergence(x, **given, **arguments(name)).square()

        torch.manual_seed(0)
        assert gradcheck(estimate, (x,), fast_mode=True)
        assert gradgradcheck(estimate, (x,), fast_mode=True)
        assert gradgradcheck(estimate, (x, weights.requires_grad_()), fast_mode=True)

    @NAMES
    def test_third_derivative(self, name):
        """Beyond what the kernels know, one after the other."""
        x = log_ratios(9, seed=5).to(DEVICE).requires_grad_()
        expected = expected_jet(name, "q", False, x.detach().cpu().requires_grad_(), count=3)
        found = f_divergence(x, backend="triton", **arguments(name))
        for part in expected[1:]:
            (gradient,) = torch.autograd.grad(found, x, create_graph=True, materialize_grads=True)
            torch.testing.assert_close(gradient.detach().cpu(), part / 9, rtol=1e-9, atol=1e-9)
            found = gradient.sum() + 0 * x.sum()

    def test_second_order_is_one_pass(self, monkeypatch):
        """The gradient of the forward pass serves the differentiated one, whose derivative is a single product."""
        launched = []
        for name in ("divergence", "divergence_terms"):
            original = getattr(kernels, name)
            spy = lambda *given, name=name, original=original: launched.append(name) or original(*given)  # noqa: E731
            monkeypatch.setattr(kernels, name, spy)
        x = log_ratios(12, spread=0.4).to(DEVICE).requires_grad_()
        value = f_divergence(x, "kl", self.offsets.to(DEVICE), backend="triton")
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        torch.autograd.grad(gradient, x, torch.ones_like(x))
        assert launched == ["divergence"] * 2

    @pytest.mark.parametrize("sampled_from", "pq")
    def test_self_normalized(self, sampled_from):
        x = log_ratios(12, spread=0.4)
        given = {"sampled_from": sampled_from, "self_normalized": True}
        expected = f_divergence(x, "jeffreys", self.offsets, **given, backend="reference")
        found = f_divergence(x.to(DEVICE), "jeffreys", self.offsets.to(DEVICE), **given, backend="triton")
        torch.testing.assert_close(found.cpu(), expected)

    def test_opaque_under_compile(self):
        torch._dynamo.reset()
        x = log_ratios(12).to(DEVICE).requires_grad_()

        def estimate(x):
            return f_divergence(2 * x, "jensen_shannon", self.offsets.to(DEVICE), backend="triton").square()

        compiled = torch.compile(estimate, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), estimate(x))
        torch.testing.assert_close(*(torch.autograd.grad(f(x), x)[0] for f in (compiled, estimate)))

    def test_a_view_with_strides(self):
        x = log_ratios(24).to(DEVICE)[::2]
        torch.testing.assert_close(
            f_divergence(x, "kl", backend="triton").cpu(), f_divergence(x.cpu(), "kl", backend="reference")
        )


@pytest.mark.gpu
class TestOnAGpu:
    def test_captured_in_a_graph(self):
        """Value, gradient and second order, for new numbers at every replay."""
        x = torch.zeros(5000, device=DEVICE, requires_grad=True)
        offsets = offsets_of([50] * 100).to(DEVICE)

        def run():
            value = f_divergence(x, "jensen_shannon", offsets, backend="triton")
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            (product,) = torch.autograd.grad(gradient, x, torch.ones_like(x))
            return value.detach(), gradient.detach(), product

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for seed in range(2):
            with torch.no_grad():
                x.copy_(log_ratios(5000, seed=seed, spread=0.05))
            graph.replay()
            for found, expected in zip(captured, run(), strict=True):
                assert torch.equal(found, expected)

    def test_beyond_two_to_the_31(self):
        count = 2**31 + 2**20 + 5
        if torch.cuda.mem_get_info()[0] < 3 * 2 * count:
            pytest.skip("needs 13 GB of the GPU's memory")
        x = torch.zeros(count, dtype=torch.bfloat16, device=DEVICE)
        x[-3:] = 1.0
        offsets = torch.tensor([0, 2**31, count - 3, count - 1, count], device=DEVICE)
        found = divergence_terms(x, term("total_variation"), 0)
        assert found[-4:].tolist() == pytest.approx([0.0, *[math.expm1(1.0) / 2] * 3], rel=1e-2)
        del found
        value, gradient = x.new_zeros(()), torch.zeros_like(x)
        divergence(x, None, Estimate(None, term("chi_squared"), value, gradient))
        slope = 2 * math.e * math.expm1(1.0) / count
        assert gradient[-4:].tolist() == pytest.approx([0.0, *[slope] * 3], rel=1e-2)
        divergence(x, offsets, Estimate(None, term("reverse_kl"), value, gradient))
        assert value.item() == pytest.approx(-3 / 4, rel=1e-2)
        assert (gradient == -1 / 4).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 1023, 2048, 5000])
def test_scale(device, count, dtype):
    """As torch's product, every element rounded once; the interpreter's bfloat16 cuts what torch rounds."""
    tolerance = 2.0**-7 if dtype == torch.bfloat16 else 0.0
    steps = torch.randn(count + 1, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for factor in (0.0, -1.5, 1.0, math.nan):
        scaled = steps.clone()
        kernels.scale(scaled[:count], torch.tensor(factor, dtype=dtype, device=device))
        assert torch.equal(scaled[count:], steps[count:])
        torch.testing.assert_close(scaled[:count], steps[:count] * factor, rtol=tolerance, atol=0, equal_nan=True)
