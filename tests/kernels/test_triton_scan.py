"""Scans in Triton against the ops' references in float64: around the sizes of blocks and chunks, in every dtype.

What all backends have in common is tested in tests/ops, in this one as well.
"""

import importlib
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from benchmarks.peers.scans_gpu import doubled
from parl_core.ops import gae, linear_recurrence, vtrace
from tests.ops.ragged import offsets_of, random_values

triton_scan = pytest.importorskip("parl_core.kernels.triton_scan")
of_recurrence, of_gae, of_vtrace = (
    importlib.import_module(f"parl_core.ops.{name}").reference for name in ("recurrence", "gae", "vtrace")
)

SIZES = triton_scan._SIZES
BLOCK = SIZES.block // 4  # steps of one trajectory in a tile, in float32
LENGTHS = {
    "around_vectors": [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 0, 31, 33],
    "around_a_block": [BLOCK - 1, BLOCK, BLOCK + 1, 0, 2 * BLOCK, 2 * BLOCK + 1, BLOCK // 2],
    "one_of_several_blocks": [1, 1, 1, 1, 3 * BLOCK + 3, 2, 0],
    "one_in_chunks": [SIZES.long + SIZES.chunk + 5],
    "some_in_chunks": [SIZES.chunk, 0, 3 * SIZES.long + 1],
    "chunks_at_an_end": [SIZES.long, 1, 2 * SIZES.long + SIZES.chunk - SIZES.long % SIZES.chunk],
}
# Of sums of numbers of size 1 that are discounted, or weighted with numbers below 1: rounding once or thrice at the end, or
# at about ten levels of the scan.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def assert_close(found, expected, dtype):
    assert found.dtype == dtype
    torch.testing.assert_close(found.double().cpu(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def steps(lengths, dtype, device, number):
    """Steps of each kind, as they are for the kernel and for the reference: in float64, on the CPU."""
    values = [random_values(sum(lengths), seed=seed).to(dtype) for seed in range(number)]
    return [value.to(device) for value in values], [value.double() for value in values]


def doubled_recurrence(x, c, offsets, reverse):
    """The reference's answer without a loop over time, which takes minutes over chunks of a GPU's size."""
    c = c * torch.ones_like(x)
    c[offsets[1:][offsets.diff() > 0] - 1] = 0.0
    rounds = len(x).bit_length()
    return doubled(x, c, rounds) if reverse else doubled(x.flip(0), c.roll(1).flip(0), rounds).flip(0)


def following(values, last, offsets):
    """Of each step the value of the next one, and at a trajectory's end the bootstrap."""
    after, some = values.roll(-1), offsets.diff() > 0
    after[offsets[1:][some] - 1] = 0.0 if last is None else last[some]
    return after


def doubled_gae(rewards, values, last, offsets, discount, trace, add_values):
    errors = rewards + discount * following(values, last, offsets) - values
    return doubled_recurrence(errors, discount * trace, offsets, True) + (values if add_values else 0.0)


def doubled_vtrace(log_ratios, rewards, values, last, offsets, discount, trace, rho_clip, c_clip):
    rho, c = log_ratios.exp().clamp(max=rho_clip), trace * log_ratios.exp().clamp(max=c_clip)
    errors = rho * (rewards + discount * following(values, last, offsets) - values)
    targets = values + doubled_recurrence(errors, discount * c, offsets, True)
    return targets, rho * (rewards + discount * following(targets, last, offsets) - values)


LOOPS, DOUBLED = (of_recurrence, of_gae, of_vtrace), (doubled_recurrence, doubled_gae, doubled_vtrace)


def test_references_agree():
    lengths = [1, 0, 7, 40, 16]
    offsets, last = offsets_of(lengths), random_values(5)
    x, v, c = random_values(3, sum(lengths), seed=1).unbind(0)
    for one, other in zip(LOOPS, DOUBLED, strict=True):
        for flag in (False, True):
            given = {
                of_recurrence: [(x, c, offsets, flag), (x, 0.9, offsets, flag)],
                of_gae: [(x, v, b, offsets, 0.99, 0.9, flag) for b in (None, last)],
                of_vtrace: [(c, x, v, b, offsets, 0.99, 0.9, 1.0, 1.1) for b in (None, last)],
            }[one]
            for arguments in given:
                torch.testing.assert_close(other(*arguments), one(*arguments), rtol=1e-13, atol=1e-13)


def check(lengths, dtype, device, offsets, given):
    of_recurrence, of_gae, of_vtrace = DOUBLED if max(lengths) >= SIZES.long else LOOPS
    (x, w, c), (x64, w64, c64) = steps(lengths, dtype, device, 3)
    c, c64 = c.tanh(), c.tanh().double().cpu()
    bootstrap = random_values(len(lengths), seed=3).to(dtype)
    for reverse in (False, True):
        found = triton_scan.recurrence(x, c, given, reverse)
        assert_close(found, of_recurrence(x64, c64, offsets, reverse), dtype)
        found = triton_scan.recurrence(x, 0.97, given, reverse)
        assert_close(found, of_recurrence(x64, 0.97, offsets, reverse), dtype)
    for last in (None, bootstrap):
        last64 = None if last is None else last.double()
        last = None if last is None else last.to(device)
        found = triton_scan.lambda_returns(x, w, last, given, 0.99, 0.9, last is None)
        assert_close(found, of_gae(x64, w64, last64, offsets, 0.99, 0.9, last is None), dtype)
        expected = of_vtrace(c64, x64, w64, last64, offsets, 0.99, 0.9, 1.0, 1.1)
        for one, other in zip(triton_scan.vtrace(c, x, w, last, given, 0.99, 0.9, 1.0, 1.1), expected, strict=True):
            assert_close(one, other, dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in LENGTHS]
    + [(name, torch.float64) for name in ("around_a_block", "one_in_chunks")]
    + [("around_vectors", torch.bfloat16), ("one_in_chunks", torch.bfloat16), ("around_vectors", torch.float16)],
)
def test_every_scan_is_the_reference(device, poisoned_memory, name, dtype):
    lengths = LENGTHS[name]
    offsets = offsets_of(lengths)
    check(lengths, dtype, device, offsets, offsets.to(device))


@pytest.mark.parametrize("shape", [(3, 5), (2, BLOCK + 1), (4, 64), (2, SIZES.long + 1), (0, 4), (4, 0)])
def test_rows(device, poisoned_memory, shape):
    x, c = random_values(2, *shape, dtype=torch.float32).unbind(0)
    c = c.tanh()
    for reverse in (False, True):
        found = triton_scan.recurrence(x.to(device), c.to(device), None, reverse)
        assert_close(found, of_recurrence(x.double(), c.double(), None, reverse), torch.float32)
    bootstrap = x[:, :1].sum(-1)
    for one, other in zip(
        triton_scan.vtrace(c.to(device), x.to(device), x.to(device), bootstrap.to(device), None, 0.9, 0.8, 1.0, 1.0),
        of_vtrace(c.double(), x.double(), x.double(), bootstrap.double(), None, 0.9, 0.8, 1.0, 1.0),
        strict=True,
    ):
        assert_close(one, other, torch.float32)


@pytest.mark.parametrize("count", [3, 40])
def test_what_offsets_hold_may_be_anything(device, monkeypatch, count):
    """Unchecked offsets, in few trajectories and in many, must not lead out of the tensors."""
    num = 2 * SIZES.long
    wild = torch.randint(-3 * num, 3 * num, (count + 1,), generator=torch.Generator().manual_seed(count))
    frame = torch.full((num + 200,), float("nan"), device=device)
    monkeypatch.setattr(torch, "empty_like", lambda like: frame[100:-100])
    for offsets in (wild, wild.sort().values, wild.sort(descending=True).values):
        triton_scan.recurrence(torch.ones(num, device=device), 0.5, offsets.to(device), True)
        assert frame[:100].isnan().all() and frame[-100:].isnan().all()


@pytest.mark.parametrize("at", [0, SIZES.chunk - 1, SIZES.chunk, 2 * SIZES.long])
def test_nan_goes_through_chunks_and_no_further(device, at):
    lengths = [SIZES.long, 3 * SIZES.long, SIZES.long]
    x, c, v = torch.ones(sum(lengths)), torch.full((sum(lengths),), 0.9), torch.zeros(sum(lengths))
    place = lengths[0] + at
    x[place] = float("nan")
    x, c, v, offsets = (tensor.to(device) for tensor in (x, c, v, offsets_of(lengths)))
    step = torch.arange(sum(lengths), device=device)
    before = (step >= lengths[0]) & (step <= place)
    after = (step >= place) & (step < lengths[0] + lengths[1])
    assert torch.equal(triton_scan.recurrence(x, c, offsets, False).isnan(), after)
    assert torch.equal(triton_scan.recurrence(x, c, offsets, True).isnan(), before)
    for found in triton_scan.vtrace(v, x, v, None, offsets, 0.9, 1.0, 1.0, 1.0):
        assert torch.equal(found.isnan(), before)


@pytest.mark.parametrize("at", [SIZES.chunk - 1, SIZES.chunk, SIZES.chunk + 1, SIZES.long])
def test_products_in_chunks_may_leave_the_range(device, at):
    """The recurrence goes 0, 1, 1e20, 0, …; products of c are beyond float32, and meet a carry of 0 and a c of 0."""
    x, c = torch.zeros(2 * SIZES.long), torch.full((2 * SIZES.long,), 1e20)
    x[at], c[at + 1], c[at - 2] = 1.0, 0.0, 0.0
    for reverse, after in ((False, at + 1), (True, at - 1)):
        expected = torch.zeros_like(x)
        expected[at], expected[after] = 1.0, 1e20
        assert torch.equal(triton_scan.recurrence(x.to(device), c.to(device), None, reverse).cpu(), expected)


@pytest.mark.parametrize("steps", [3 * BLOCK, SIZES.long - 1, 10 * SIZES.long], ids=["blocks", "whole", "chunks"])
@pytest.mark.parametrize("coefficient", [0.5, 1e-30, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinity_goes_to_the_end(device, steps, coefficient, dtype):
    """Products of many c are below the smallest number, but times an infinity an infinity, as one after another."""
    x = torch.zeros(steps, dtype=dtype)
    x[0] = math.inf
    c = torch.full_like(x, coefficient)
    signs = torch.full_like(x, coefficient).sign().cumprod(0) * math.copysign(1.0, coefficient)
    for coefficients in (c.to(device), coefficient)[: 1 if coefficient < 0 else 2]:
        found = triton_scan.recurrence(x.to(device), coefficients, None, False)
        assert torch.equal(found.cpu(), signs * math.inf)
    if coefficient > 0:
        zero = torch.zeros_like(x).to(device)
        found = triton_scan.lambda_returns(x.flip(0).to(device), zero, None, None, coefficient, 1.0, False)
        assert (found == math.inf).all()


def test_what_has_faded_stays_so(device):
    """10²⁰ fades by 3000 factors of ½, and as many of 2, whose product overflows, do not bring it back."""
    c = torch.cat([torch.full((3000,), 0.5), torch.full((3000,), 2.0)])
    x = torch.zeros(6000)
    x[0] = 1e20
    found = triton_scan.recurrence(x.to(device), c.to(device), None, False).cpu()
    assert (found[3000:].abs() < 1e-20).all()
    c[2500] = 0.0
    x[0] = 1.0
    assert (triton_scan.recurrence(x.to(device), c.to(device), None, False).cpu()[2501:] == 0).all()


def test_what_has_faded_within_a_block_stays_so(device):
    x, c = torch.zeros(2 * BLOCK), torch.ones(2 * BLOCK)
    x[0] = 1.0
    c[BLOCK + 8 : BLOCK + 16], c[BLOCK + 16 : BLOCK + 24] = 1e-30, 1e30
    found = triton_scan.recurrence(x.to(device), c.to(device), None, False).cpu()
    assert (found[: BLOCK + 9] == 1).all()
    assert (found[BLOCK + 11 :].abs() < 1e-40).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_derivatives(device, reverse):
    """They are recurrences again; the rest of their tests has no backend of its own."""
    offsets = torch.tensor([0, 2, 2, 5], device=device)
    inputs = [random_values(5, seed=seed).to(device).requires_grad_() for seed in (0, 1)]

    def scan(x, c):
        return linear_recurrence(x, c, offsets, reverse=reverse, backend="triton")

    assert gradcheck(scan, inputs, check_forward_ad=True)
    assert gradgradcheck(scan, inputs)
    for function in (
        lambda r, v: gae(r, v, 0.9, 0.8, offsets, backend="triton"),
        lambda r, v: vtrace(r.tanh(), r, v, 0.9, offsets, backend="triton").advantages,
    ):
        followed = function(*inputs)
        assert followed.requires_grad
        torch.testing.assert_close(followed.detach(), function(*(x.detach() for x in inputs)), rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_beyond_int32(device):
    """More than 2³¹ elements, in rows and as one trajectory in chunks."""
    x = torch.ones((1 << 21) + 3, 1024, dtype=torch.bfloat16, device=device)
    x[-1] = 3.0
    for values in (x, x.view(-1)):
        out = triton_scan.recurrence(values, 0.5, None, True).view(-1)
        assert out[-1] == 3 and out[-20] == 6 and out[0] == 2 and out[-1500] == 2
        del out


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[50] * 300, [3 * SIZES.long, 100]])
def test_captured_in_a_graph(device, lengths):
    (r, v, c), _ = steps(lengths, torch.float32, device, 3)
    offsets = offsets_of(lengths).to(device)

    def scans():
        targets, advantages = triton_scan.vtrace(c, r, v, None, offsets, 0.99, 0.9, 1.0, 1.0)
        return targets, advantages, triton_scan.recurrence(r, 0.9, offsets, True)

    scans()  # chooses configurations
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scans()
    r.mul_(2), v.sub_(1)
    graph.replay()
    for one, other in zip(captured, scans(), strict=True):
        assert torch.equal(one, other)
