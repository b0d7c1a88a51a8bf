"""The scans in CUDA C++, by warps and by tiles, against the references in double precision: on a GPU, or emulated."""

import functools
import importlib
import itertools
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parl_core.ops import backend, discounted_returns, gae, linear_recurrence, td_lambda, vtrace

recurrence_reference, returns_reference, vtrace_reference = (
    importlib.import_module(f"parl_core.ops.{name}").reference for name in ("recurrence", "gae", "vtrace")
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)
# Chunks are of 4 or 8 steps, rows of 32 chunks, tiles of 1024 to 4096 steps.
LENGTHS = {
    "one step": [1],
    "short": [3, 1, 0, 7, 8, 9, 0, 0, 2, 5, 1, 63, 1, 4],
    "long among short": [5, 0, 0, 63, 1000, 1, 2, 0],
    "rows of chunks": [127, 128, 129, 255, 256, 257],
    "at the ends of tiles": [1023, 1, 1024, 2049, 0],
    "over three tiles": [1, 5000, 2],
    "one for each step": [1] * 70,
    "empty ones first and last": [0, 0, 40, 0],
}


@functools.cache
def exact(lengths, seed=0):
    """Rewards, links, log-ratios, values, bootstrap and offsets, in double precision but representable in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    x, ratios, values, bootstrap = (torch.randn(n, generator=generator) for n in (*[sum(lengths)] * 3, len(lengths)))
    links = torch.rand(sum(lengths), generator=generator) * 1.02
    tensors = [tensor.bfloat16().double() for tensor in (x, links, ratios, values, bootstrap)]
    return *tensors, torch.tensor([0, *itertools.accumulate(lengths)])


@functools.cache
def expected_results(lengths):
    """Of every op, by the references, in the order of `Kernels.results`."""
    x, links, ratios, values, bootstrap, offsets = exact(lengths)
    results = [recurrence_reference(x, c, offsets, reverse) for c in (0.97, links) for reverse in (False, True)]
    for add_values, boot in ((False, bootstrap), (True, None)):
        results.append(returns_reference(x, values, boot, offsets, 0.97, 0.9, add_values))
    for clips, boot in (((1.0, 1.1), bootstrap), ((2.0, 0.5), None)):
        results += vtrace_reference(ratios, x, values, boot, offsets, 0.97, 0.9, *clips)
    return results


def shifted(tensor, margin):
    """The same numbers, `margin` elements behind the beginning of an allocation."""
    return torch.cat([tensor.new_zeros(margin), tensor])[margin:]


class Kernels:
    """The kernels with poisoned outputs, and a poisoned workspace if `tiled`."""

    def __init__(self, module, tiled):
        self.module, self.tiled = module, tiled

    def call(self, name, like, *arguments, outputs=1):
        outs = [torch.full_like(like, float("nan")) for _ in range(outputs)]
        workspace = None
        if self.tiled:
            size = self.module.tiled_scan_workspace(like.numel())
            workspace = torch.full((size,), 255, dtype=torch.uint8, device=like.device)
        stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
        before, after = arguments
        getattr(self.module, name)(*before, *outs, *after, workspace, stream)
        return [out.double().cpu() for out in outs]

    def recurrence(self, x, links, offsets, reverse):
        if isinstance(links, float):
            return self.call("discounted_scan", x, (x, links, offsets), (reverse,))[0]
        return self.call("linear_recurrence", x, (x, links, offsets), (reverse,))[0]

    def lambda_returns(self, rewards, values, bootstrap, offsets, *numbers):
        return self.call("lambda_returns", rewards, (rewards, values, bootstrap, offsets), numbers)[0]

    def vtrace(self, ratios, rewards, values, bootstrap, offsets, *numbers):
        tensors = (ratios, rewards, values, bootstrap, offsets)
        return self.call("vtrace", rewards, tensors, numbers, outputs=2)

    def results(self, x, links, ratios, values, bootstrap, offsets):
        results = [self.recurrence(x, c, offsets, reverse) for c in (0.97, links) for reverse in (False, True)]
        for add_values, boot in ((False, bootstrap), (True, None)):
            results.append(self.lambda_returns(x, values, boot, offsets, 0.97, 0.9, add_values))
        for clips, boot in (((1.0, 1.1), bootstrap), ((2.0, 0.5), None)):
            results += self.vtrace(ratios, x, values, boot, offsets, 0.97, 0.9, *clips)
        return results


@pytest.fixture(params=["warps", "tiles"])
def kernels(request, cuda_kernels):
    return Kernels(cuda_kernels, request.param == "tiles")


def check_all(kernels, lengths, dtype, device, margin=0):
    *tensors, offsets = exact(lengths)
    there = [shifted(tensor.to(device, dtype), margin) for tensor in tensors]
    for found, expected in zip(kernels.results(*there, offsets.to(device)), expected_results(lengths), strict=True):
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_against_the_references(kernels, lengths, dtype, device):
    check_all(kernels, tuple(lengths), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("margin", [1, 3])
def test_arrays_that_are_not_aligned(kernels, dtype, device, margin):
    check_all(kernels, (40, 1, 300, 2), dtype, device, margin=margin)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12), dtype=st.sampled_from(DTYPES))
def test_any_lengths(kernels, device, lengths, dtype):
    if sum(lengths):
        check_all(kernels, tuple(lengths), dtype, device)


@pytest.mark.parametrize("shape", [(1,), (70,), (1, 1), (5, 3), (3, 70), (40, 33)])
def test_rows(kernels, shape, device):
    x, links, values = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    there = x.to(device), links.to(device), values.to(device)
    for reverse in (False, True):
        found = kernels.recurrence(there[0], there[1], None, reverse)
        torch.testing.assert_close(found, recurrence_reference(x, links, None, reverse), rtol=1e-12, atol=1e-12)
    found = kernels.lambda_returns(there[0], there[2], None, None, 0.9, 0.8, True)
    expected = returns_reference(x, values, None, None, 0.9, 0.8, True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("lengths", [[2, 3, 4], [40, 21, 70], [2000, 3000, 2000]])
def test_what_is_not_finite_stays_in_its_trajectory(kernels, lengths, bad, device):
    x, offsets = torch.ones(sum(lengths)), torch.tensor([0, *itertools.accumulate(lengths)])
    start, at, stop = lengths[0], lengths[0] + 1, lengths[0] + lengths[1]
    x[at] = bad
    x, step = x.to(device), torch.arange(sum(lengths))
    for links in (0.9, torch.full_like(x, 0.9)):
        backwards = kernels.recurrence(x, links, offsets.to(device), True)
        assert torch.equal(~backwards.isfinite(), (step >= start) & (step <= at))
        forwards = kernels.recurrence(x, links, offsets.to(device), False)
        assert torch.equal(~forwards.isfinite(), (step >= at) & (step < stop))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("coefficient", [0.5, 1e-30])
@pytest.mark.parametrize("reverse", [False, True])
def test_infinity_goes_to_the_end(kernels, coefficient, reverse, dtype, device):
    """Products of many coefficients are below the smallest number, but times an infinity an infinity, as step by step."""
    x = torch.zeros(20_000, dtype=dtype)
    x[-1 if reverse else 0] = float("inf")
    for links in (torch.full_like(x, coefficient).to(device), coefficient):
        assert (kernels.recurrence(x.to(device), links, None, reverse) == float("inf")).all()


def test_what_has_faded_stays_so(kernels, device):
    """10²⁰ fades by 3000 factors of ½, and as many of 2, whose product overflows, do not bring it back."""
    links = torch.cat([torch.full((3000,), 0.5), torch.full((3000,), 2.0)])
    x = torch.zeros(6000)
    x[0] = 1e20
    found = kernels.recurrence(x.to(device), links.to(device), None, False)
    assert (found[3000:].abs() < 1e-20).all()


def test_unused_links_may_be_anything(kernels, device):
    x, links = torch.ones(12), torch.full((12,), 0.5)
    offsets = torch.tensor([0, 5, 12])
    links[[4, 11]] = float("nan")
    for reverse in (False, True):
        found = kernels.recurrence(x.to(device), links.to(device), offsets.to(device), reverse)
        assert torch.equal(found, recurrence_reference(x.double(), links.nan_to_num().double(), offsets, reverse))


@pytest.mark.parametrize(
    ("link", "first"),
    [(10.0, 0.0), (10.0, 1e-30), (0.5, 1e38), (-1e20, 0.0), (1e30, 1e-38)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_links_that_leave_the_range(kernels, link, first, dtype, device):
    """They would, in single precision, long before the results do; in double precision also for x = 0."""
    x = torch.zeros(600, dtype=dtype)
    x[0] = first
    links = torch.full_like(x, link)
    offsets = torch.tensor([0, 600])
    expected = recurrence_reference(x.double(), links.double(), offsets, False).to(dtype).double()
    found = kernels.recurrence(x.to(device), links.to(device), offsets.to(device), False)
    smallest = torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=smallest)
    assert not found.isnan().any()


@pytest.mark.parametrize(
    "offsets", [[5, 3, 1], [0, -7, 40], [0, 999, 40], [-(2**62), 2**62, 2**62], [2**40, 2**40 + 1, 2**41], [40, 0, 40]]
)
def test_offsets_of_any_content_stay_in_bounds(kernels, offsets, device):
    """What comes out means nothing, but the neighbours in memory are whole."""
    memory = torch.arange(3 * 64, dtype=torch.float32, device=device)
    whole = memory.clone()
    x, ratios, bootstrap = memory[64:104], memory[:40].clone(), memory[:2].clone()
    out = memory[128:168]
    there = torch.tensor(offsets, device=device)
    workspace = None
    if kernels.tiled:
        workspace = torch.empty(kernels.module.tiled_scan_workspace(40), dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
    for reverse in (False, True):
        kernels.module.linear_recurrence(x, ratios, there, out, reverse, workspace, stream)
    kernels.module.lambda_returns(x, ratios, bootstrap, there, out, 0.9, 0.9, True, workspace, stream)
    memory[128:168] = whole[128:168]
    assert torch.equal(memory, whole)


@pytest.mark.parametrize(("order", "tiles"), [("one long", 2100), ("resets", 1100)])
def test_carries_over_many_tiles(order, tiles):
    """Over all three levels, with blocks that take turns: what the tiles before compose to, in one order for all runs."""
    path = os.environ.get("PARL_CUDA_EMULATED")
    if path is None:
        pytest.skip("the CUDA kernels are not built for the CPU; do that with: make emulated")
    emulated = importlib.import_module("tests.csrc.test_emulation").load(path)
    generator = torch.Generator().manual_seed(1)
    a = torch.rand(tiles, generator=generator, dtype=torch.float64) * 1.05
    b = torch.randn(tiles, generator=generator, dtype=torch.float64)
    resets = torch.zeros(tiles, dtype=torch.int32)
    if order == "resets":
        resets[torch.rand(tiles, generator=generator) < 0.01] = 1
        a[resets == 1] = 0
    expected, y = [], 0.0
    for tile in range(tiles):
        expected.append(y)
        y = b[tile].item() + (0.0 if resets[tile] else a[tile].item() * y)
    results = []
    for seed, resident in ((0, 1), (1, 20)):
        emulated.seed(seed)
        emulated.resident_blocks(resident)
        flags, maps = torch.zeros(2 * tiles + 4, dtype=torch.int32), torch.full((3 * tiles, 2), float("nan")).double()
        out = torch.full((tiles,), float("nan"), dtype=torch.float64)
        pointers = [tensor.data_ptr() for tensor in (flags, maps, a, b, resets, out)]
        emulated.examples.carries_of_tiles(*pointers, tiles)
        results.append(out)
    emulated.resident_blocks(1)
    torch.testing.assert_close(results[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize(("steps", "count", "tiled"), [(0, 0, 0), (1000, 1, 0), (2**20, 2**14, 0), (3000, 1, 1)])
def test_workspace_is_asked_for_where_tiles_are_better(cuda_kernels, steps, count, tiled):
    size = cuda_kernels.scan_workspace(steps, count)
    assert size == (cuda_kernels.tiled_scan_workspace(steps) if tiled else 0)
    assert cuda_kernels.scan_workspace(2**20 + 1, 2**14) == cuda_kernels.tiled_scan_workspace(2**20 + 1)


def test_what_is_wrong_is_refused(cuda_kernels, device):
    x = torch.zeros(4, device=device)
    offsets = torch.tensor([0, 4], device=device)
    few = torch.empty(8, dtype=torch.uint8, device=device)

    def scan(values=x, offsets=offsets, out=None, workspace=None):
        out = torch.empty_like(x) if out is None else out
        cuda_kernels.discounted_scan(values, 0.9, offsets, out, True, workspace, 0)

    for call, error, message in [
        (lambda: scan(values=[1.0]), TypeError, "values must be a Tensor, got list"),
        (lambda: scan(values=x.half()), TypeError, "values must be of dtype .* got torch.float16"),
        (lambda: scan(values=x.long(), out=x.long() + 1), TypeError, "values must be float32, .* got int64"),
        (lambda: scan(values=torch.zeros(8, device=device)[::2]), ValueError, "values must be contiguous"),
        (lambda: scan(out=x.double()), TypeError, "out must be of dtype float32, got float64"),
        (lambda: scan(out=x[:3]), ValueError, "out must have 4 elements, got 3"),
        (lambda: scan(out=x), ValueError, "out must not share memory with values"),
        (lambda: scan(offsets=offsets.int()), TypeError, "offsets must be of dtype int64, got int32"),
        (lambda: scan(offsets=offsets[:0]), ValueError, "offsets must have at least one element"),
        (lambda: scan(workspace=few), ValueError, r"workspace must have at least \d+ elements, got 8"),
        (lambda: scan(workspace=x), TypeError, "workspace must be of dtype uint8, got float32"),
        (lambda: scan(values=x.to("meta")), TypeError, "values must be on .* got a tensor on meta"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_the_ops_take_them(cuda_kernels, device):
    """By name, at first and second order, on trajectories that a warp takes and on such as go by tiles."""
    for lengths in ((5, 0, 9), (2100, 3)):
        x, links, ratios, values, bootstrap, offsets = (tensor.to(device) for tensor in exact(lengths))
        results = []
        for name in ("cuda", "reference"):
            with backend(name):
                plain = [discounted_returns(x, 0.9, offsets), gae(x, values, 0.9, 0.8, offsets, bootstrap=bootstrap)]
                plain += [td_lambda(x, values, 0.9, 0.8, offsets), *vtrace(ratios, x, values, 0.9, offsets)]
                leaves = [tensor.clone().requires_grad_() for tensor in (x, links)]
                loss = linear_recurrence(*leaves, offsets).square().sum()
                first = torch.autograd.grad(loss, leaves, create_graph=True)
                second = torch.autograd.grad(first[0].square().sum() + first[1].sum(), leaves)
                results.append([*plain, *first, *second])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
def test_scans_are_captured(cuda_kernels, device):
    """A graph replays on new numbers, and gives the same bits every time."""
    for lengths in ((50,) * 100, (300_000,)):
        x, links, *_, offsets = exact(lengths)
        kernels = Kernels(cuda_kernels, len(lengths) == 1)
        x, links, there = x.float().to(device), links.float().to(device), offsets.to(device)
        out = torch.empty_like(x)
        size = cuda_kernels.tiled_scan_workspace(x.numel())
        workspace = torch.empty(size, dtype=torch.uint8, device=device) if kernels.tiled else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stream = torch.cuda.current_stream().cuda_stream
            cuda_kernels.linear_recurrence(x, links, there, out, True, workspace, stream)
        for seed in range(3):
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            expected = kernels.recurrence(x, links, there, True)
            assert torch.equal(out.double().cpu(), expected)
