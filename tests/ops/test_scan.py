"""The scan against a plain double loop, for every backend, and its derivatives against closed forms."""

import math
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parl_core.ops import available_backends, discounted_returns, prefix_sum
from parl_core.ops.registry import BackendError
from tests.ops.ragged import LENGTHS, cpu_backends, offsets_of, random_values


def loop(values: Tensor, lengths: list[int], discount: float, reverse: bool) -> Tensor:
    """The definition, term by term, in Python floats: y_h = Σ_k discount^|k−h| x_k over one side of h."""
    out, start = [], 0
    for length in lengths:
        x = values[start : start + length].tolist()
        for h in range(length):
            side = range(h, length) if reverse else range(h + 1)
            out.append(sum(discount ** abs(k - h) * x[k] for k in side))
        start += length
    return torch.tensor(out, dtype=torch.float64)


def test_returns_by_hand(backend):
    rewards = torch.tensor([1.0, 2.0, 4.0, 10.0])
    offsets = torch.tensor([0, 3, 3, 4])
    expected = torch.tensor([1 + 1 + 1.0, 2 + 2.0, 4.0, 10.0])
    assert torch.equal(discounted_returns(rewards, 0.5, offsets, backend=backend), expected)


def test_prefix_sum_by_hand(backend):
    values = torch.tensor([1.0, 2.0, 4.0, 10.0, 5.0])
    offsets = torch.tensor([0, 3, 5])
    expected = torch.tensor([1.0, 3.0, 7.0, 10.0, 15.0])
    assert torch.equal(prefix_sum(values, offsets, backend=backend), expected)


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_discount_at_its_bounds(backend, discount):
    rewards = torch.tensor([1.0, 2.0, 3.0])
    expected = rewards if discount == 0.0 else torch.tensor([6.0, 5.0, 3.0])
    assert torch.equal(discounted_returns(rewards, discount, backend=backend), expected)


# float32: about 1000 additions, each with a relative error of 6e-8 of a sum of order 30.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-5)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_every_kernel_is_the_loop(kernel, lengths, dtype, tolerance):
    values, offsets = random_values(sum(lengths), dtype=dtype), offsets_of(lengths)
    for scanned, expected in [
        (discounted_returns(values, 0.97, offsets, backend=kernel), loop(values, lengths, 0.97, True)),
        (prefix_sum(values, offsets, backend=kernel), loop(values, lengths, 1.0, False)),
    ]:
        assert scanned.dtype == dtype
        torch.testing.assert_close(scanned.double(), expected, rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(lengths=st.lists(st.integers(0, 9), max_size=9), discount=st.floats(0, 1), seed=st.integers(0, 2**31 - 1))
def test_any_lengths(lengths, discount, seed):
    values, offsets = random_values(sum(lengths), seed=seed), offsets_of(lengths)
    expected = loop(values, lengths, discount, True)
    for name in cpu_backends():
        scanned = discounted_returns(values, discount, offsets, backend=name)
        torch.testing.assert_close(scanned, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    values = torch.full((2000,), 1.0, dtype=dtype)
    assert prefix_sum(values)[-1] == torch.tensor(2000.0).to(dtype)


def test_no_offsets_is_one_trajectory(backend):
    values = random_values(63)
    whole = torch.tensor([0, 63])
    assert torch.equal(prefix_sum(values, backend=backend), prefix_sum(values, whole, backend=backend))
    assert prefix_sum(values[:0], backend=backend).shape == (0,)


def test_strided_values_and_offsets(backend):
    values = random_values(24)[::2]
    offsets = torch.tensor([0, -1, 5, -1, 12])[::2]
    scanned = discounted_returns(values, 0.9, offsets, backend=backend)
    torch.testing.assert_close(scanned, loop(values, [5, 7], 0.9, True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("lengths", [[2, 3, 4], [40, 21, 70]])
def test_what_is_not_finite_reaches_what_depends_on_it(kernel, lengths, bad):
    """In the second trajectory, at its second step: not in the others, and only on one side of it."""
    values, offsets = torch.ones(sum(lengths)), offsets_of(lengths)
    start, at, stop = lengths[0], lengths[0] + 1, lengths[0] + lengths[1]
    values[at] = bad
    step = torch.arange(len(values))
    returns = discounted_returns(values, 0.9, offsets, backend=kernel)
    assert torch.equal(~returns.isfinite(), (step >= start) & (step <= at))
    sums = prefix_sum(values, offsets, backend=kernel)
    assert torch.equal(~sums.isfinite(), (step >= at) & (step < stop))


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 3), (3, 0), (1, 1), (5, 3), (3, 70)])
def test_rows_are_trajectories(kernel, shape):
    values = random_values(*shape)
    flat, horizon = values.reshape(-1), shape[-1]
    lengths = [horizon] * (shape[0] if len(shape) == 2 else 1)
    for scan, discount, reverse in [
        (lambda v: discounted_returns(v, 0.9, backend=kernel), 0.9, True),
        (lambda v: prefix_sum(v, backend=kernel), 1.0, False),
    ]:
        expected = loop(flat, lengths, discount, reverse).reshape(shape)
        torch.testing.assert_close(scan(values), expected, rtol=1e-12, atol=1e-12)


def test_rows_that_are_not_contiguous(backend):
    values = random_values(6, 4).T
    expected = discounted_returns(values.contiguous(), 0.9, backend="reference")
    torch.testing.assert_close(discounted_returns(values, 0.9, backend=backend), expected, rtol=1e-12, atol=1e-12)


def test_an_output_of_several_megabytes():
    values = random_values(3, (1 << 19) + 5, dtype=torch.float32)
    for name in cpu_backends():
        assert torch.equal(discounted_returns(values, 0.0, backend=name), values)


MANY = [0, 7, 9] * 4200  # enough for several threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS["around_a_vector"], MANY], ids=["serial", "threaded"])
@pytest.mark.parametrize("name", ["numba", "cpp"])
def test_kernels_write_every_element_and_no_other(name, lengths, reverse, dtype):
    if name not in available_backends():
        pytest.skip(f"backend {name} is unavailable")
    values, offsets = random_values(sum(lengths), dtype=dtype), offsets_of(lengths)
    frame = torch.full((len(values) + 64,), float("nan"), dtype=dtype)
    out = frame[32:-32]
    if name == "cpp":
        native = pytest.importorskip("parl_core._native")
        native.discounted_scan(values, 0.9, offsets, out, reverse, 2)
    else:
        kernels = pytest.importorskip("parl_core.kernels.numba_scan")
        kernels.discounted_scan(values.numpy(), 0.9, offsets.numpy(), out.numpy(), reverse, 2)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    expected = loop(values, lengths, 0.9, reverse)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    assert frame[:32].isnan().all() and frame[-32:].isnan().all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.usefixtures("isa")
def test_bits_depend_neither_on_the_place_nor_on_threads(reverse):
    """A trajectory alone, among others, and on several threads, which each end somewhere else."""
    native = pytest.importorskip("parl_core._native")
    lengths = [37, 5, 0, 61, 16, 1] * 1100
    values, offsets = random_values(sum(lengths), dtype=torch.float32), offsets_of(lengths)
    outs = []
    for threads in (1, 2, 3):
        out = torch.full_like(values, float("nan"))
        native.discounted_scan(values, 0.97, offsets, out, reverse, threads)
        outs.append(out)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    for n in (0, 3, 4, len(lengths) - 1):
        piece = slice(int(offsets[n]), int(offsets[n + 1]))
        alone = torch.full((lengths[n],), float("nan"))
        native.discounted_scan(values[piece].clone(), 0.97, None, alone, reverse, 1)
        assert torch.equal(alone, outs[0][piece])


FOUR = torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: prefix_sum(cast(Any, [1.0])), TypeError, "values must be a Tensor, got list"),
        (lambda: prefix_sum(torch.arange(4)), TypeError, "values must be of a floating-point dtype"),
        (
            lambda: prefix_sum(FOUR.reshape(1, 2, 2)),
            ValueError,
            r"values must be of shape \(T,\) or \(N, H\), got \(1, 2",
        ),
        (
            lambda: discounted_returns(FOUR[0], 0.9),
            ValueError,
            r"rewards must be of shape \(T,\) or \(N, H\), got \(\)",
        ),
        (
            lambda: prefix_sum(FOUR[None], torch.tensor([0, 4])),
            ValueError,
            r"offsets must be None where values is of shape \(N, H\)",
        ),
        (lambda: discounted_returns(FOUR, 1.1), ValueError, r"discount must lie in \[0, 1\], got 1.1"),
        (lambda: discounted_returns(FOUR, float("nan")), ValueError, "discount must lie in"),
        (
            lambda: discounted_returns(FOUR, cast(Any, torch.tensor(0.9))),
            TypeError,
            "discount must be a number",
        ),
        (
            lambda: prefix_sum(FOUR, cast(Any, [0, 4])),
            TypeError,
            "offsets must be a Tensor or None, got list",
        ),
        (lambda: prefix_sum(FOUR, torch.tensor([0, 4]).int()), TypeError, "offsets must be of dtype"),
        (lambda: prefix_sum(FOUR, torch.tensor([[0, 4]])), ValueError, r"offsets must be of shape \(N\+1,\)"),
        (
            lambda: prefix_sum(FOUR, torch.tensor([]).long()),
            ValueError,
            r"offsets must be of shape \(N\+1,\)",
        ),
        (
            lambda: prefix_sum(FOUR, torch.tensor([0, 4], device="meta")),
            ValueError,
            "offsets must be on the device of values, cpu, got meta",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 4], "offsets must start at 0, got 1"),
        ([0, 3], "offsets must end at the number of steps, 4, got 3"),
        ([0], "offsets must end at the number of steps, 4, got 0"),
        ([0, 3, 2, 4], r"offsets must not decrease, got offsets\[2\] = 2 after offsets\[1\] = 3"),
        ([0, *[4] * 40, 3, 4], r"offsets must not decrease, got offsets\[41\] = 3 after offsets\[40\] = 4"),
    ],
)
def test_offsets_that_do_not_cover_the_values(backend, offsets, message):
    for values in (FOUR, FOUR.clone().requires_grad_()):
        with pytest.raises(ValueError, match=message):
            prefix_sum(values, torch.tensor(offsets), backend=backend)
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(lambda v: prefix_sum(v, torch.tensor(offsets), backend=backend))(FOUR[None])


@pytest.mark.parametrize("name", ["numba", "cpp"])
def test_unsupported_dtype_falls_back_only_by_itself(name):
    if name not in available_backends():
        pytest.skip(f"backend {name} is unavailable")
    halves = torch.ones(3, dtype=torch.bfloat16)
    assert prefix_sum(halves).tolist() == [1, 2, 3]
    with pytest.raises(BackendError, match=f"'{name}' cannot be used: it computes in .*, not in torch.bf"):
        prefix_sum(halves, backend=name)


def test_native_module_checks_its_tensors():
    native = pytest.importorskip("parl_core._native")
    values, offsets = torch.ones(4), torch.tensor([0, 4])

    def scan(values=values, offsets=offsets, out=None):
        native.discounted_scan(values, 0.9, offsets, torch.empty(4) if out is None else out, False, 1)

    with pytest.raises(TypeError, match="values must be of dtype float32, float64 or int64, got torch"):
        scan(values=values.half())
    with pytest.raises(TypeError, match="values must be float32 or float64, got int64"):
        scan(values=values.long())
    with pytest.raises(TypeError, match="values must be on the CPU, got a tensor on meta"):
        scan(values=values.to("meta"))
    with pytest.raises(ValueError, match="offsets must have one dimension, got 2"):
        scan(offsets=offsets[None])
    with pytest.raises(ValueError, match="values must be contiguous"):
        scan(values=torch.ones(8)[::2])
    with pytest.raises(TypeError, match="offsets must be int64"):
        scan(offsets=offsets.double())
    with pytest.raises(ValueError, match="offsets must have at least one element"):
        scan(offsets=offsets[:0])
    with pytest.raises(TypeError, match="out must have the dtype of values"):
        scan(out=torch.empty(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="out must have as many elements as values, 4, got 3"):
        scan(out=torch.empty(3))
    with pytest.raises(TypeError, match="values must be a Tensor, got list"):
        scan(values=[1.0])
    with pytest.raises(TypeError, match="values must be a Tensor, got NoneType"):
        scan(values=None)
    with pytest.raises(TypeError, match=r"values must be a Tensor, got numpy\.ndarray"):
        scan(values=values.numpy())
    with pytest.raises(ValueError, match="values must have one dimension or more, got 0"):
        scan(values=values[0], offsets=None, out=torch.empty(()))
    room = torch.ones(6)
    for out in (room[:4], room[2:]):
        with pytest.raises(ValueError, match="out must not share memory with values"):
            scan(values=room[1:5], out=out)
    scan(values=room[:3], offsets=None, out=room[3:])
    scan(values=room[2:2], offsets=None, out=room[2:2])
    for threads in (-1, 0, 200_000):
        with pytest.raises(ValueError, match=f"num_threads must be 1 to 1024, got {threads}"):
            native.discounted_scan(values, 0.9, offsets, torch.empty(4), False, threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("discount", "values"),
    [
        (1e-6, [1.0, 1.0, -math.inf, 1.0]),
        (1e-6, [1.0, math.inf]),
        (1e6, [0.0]),
        (-1e40, [0.0]),
        (1e-40, [1.0, math.inf, 2.0]),
        (1e-2, [1e38, 0.0]),
        (0.0, [1.0, 2.0]),
        (1.0, [-3e38, 3e38, 3e38, -3e38, -3e38, 3e38]),
        (1.0, [-1.5e308, 1.5e308, 1.5e308, -1.5e308, -1.5e308, 1.5e308]),
        (0.9, [1.0, math.nan, math.inf, 1.0]),
    ],
)
@pytest.mark.usefixtures("isa")
def test_powers_and_sums_beyond_the_range(discount, values, reverse, dtype):
    """A power of the discount, or a sum over some steps, may leave the range where the recurrence does not."""
    if dtype == torch.float32 and abs(discount) > 3e38:
        pytest.skip("no such discount in float32")
    native = pytest.importorskip("parl_core._native")
    numbers = torch.zeros(45, dtype=dtype)
    numbers[3 : 3 + len(values)] = torch.tensor(values, dtype=torch.float64).to(dtype)
    numbers[-len(values) :] = numbers[3 : 3 + len(values)]
    out, expected = torch.full_like(numbers, math.nan), []
    native.discounted_scan(numbers, discount, None, out, reverse, 1)
    carry, factor = torch.zeros((), dtype=dtype), torch.tensor(discount, dtype=dtype)
    for number in numbers.flip(0) if reverse else numbers:
        carry = number + factor * carry
        expected.append(carry)
    expected = torch.stack(expected[::-1] if reverse else expected)
    tolerance, tiny = 1e-5 if dtype == torch.float32 else 1e-12, torch.finfo(dtype).tiny
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tiny, equal_nan=True)
