"""The emulation of CUDA on the host: it runs right kernels rightly, and reports wrong ones."""

import functools
import importlib.util
import os
import re

import pytest
import torch


@pytest.fixture
def emulated():
    """The module compiled for the host, with the order of its threads reset."""
    path = os.environ.get("PARL_CUDA_EMULATED")
    if path is None:
        pytest.skip("the CUDA kernels are not built for the CPU; do that with: make emulated")
    module = load(path)
    module.seed(0)
    module.resident_blocks(1)
    yield module
    module.resident_blocks(1)


@functools.cache
def load(path):
    spec = importlib.util.spec_from_file_location("_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def integers(*shape):
    return torch.full(shape, -1, dtype=torch.int32)


@pytest.mark.parametrize("threads", [1, 2, 31, 32, 33, 100, 1024])
def test_a_barrier_in_any_order(emulated, threads):
    values = torch.arange(3 * threads, dtype=torch.int32)
    expected = values.view(3, threads).flip(1).flatten()
    for seed in range(4):
        emulated.seed(seed)
        out = integers(3 * threads)
        emulated.examples.reverse_blocks(values.data_ptr(), out.data_ptr(), 3, threads, True)
        assert torch.equal(out, expected)


def test_a_missing_barrier_shows(emulated):
    values = torch.arange(1, 129, dtype=torch.int32)
    expected, results = values.flip(0), set()
    for seed in range(4):
        emulated.seed(seed)
        out = integers(128)
        emulated.examples.reverse_blocks(values.data_ptr(), out.data_ptr(), 1, 128, False)
        assert not torch.equal(out, expected)
        assert ((out == expected) | (out == -1)).all()  # shared memory holds nothing of the launch before
        results.add(tuple(out.tolist()))
    assert len(results) == 4  # each seed has an order of its own


def test_a_seed_repeats_its_order(emulated):
    values, results = torch.arange(1, 129, dtype=torch.int32), []
    for _ in range(2):
        emulated.seed(7)
        results.append(integers(128))
        emulated.examples.reverse_blocks(values.data_ptr(), results[-1].data_ptr(), 1, 128, False)
    assert torch.equal(*results)


def expected_shuffle(kind, argument, width, lane):
    """By the programming guide: lanes in groups of `width`; beyond a group's end a lane keeps its own value."""
    first, within = lane - lane % width, lane % width
    if kind == 0:
        return first + argument % width
    if kind == 1:
        return lane if within < argument else lane - argument
    if kind == 2:
        return lane if within + argument >= width else lane + argument
    return lane if (lane ^ argument) >= first + width else lane ^ argument


@pytest.mark.parametrize("width", [2, 8, 32])
@pytest.mark.parametrize("argument", [0, 1, 3, 16, 31])
@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_shuffles(emulated, kind, argument, width):
    out = integers(32)
    emulated.examples.shuffle_lanes(kind, argument, width, 0xFFFFFFFF, out.data_ptr())
    assert out.tolist() == [expected_shuffle(kind, argument, width, lane) for lane in range(32)]


def test_what_an_ended_lane_gives_is_poison(emulated):
    out = integers(32)
    emulated.examples.shuffle_lanes(2, 1, 32, 0x0000FFFF, out.data_ptr())
    assert out.tolist() == [*range(1, 16), *[-1] * 17]


@pytest.mark.parametrize("threads", [32, 64, 50])
def test_votes(emulated, threads):
    for flags in (
        torch.arange(threads) % 5 == 0,
        torch.ones(threads),
        torch.zeros(threads),
        torch.arange(threads) < 32,
    ):
        flags = flags.int()
        out = integers(threads, 6)
        emulated.examples.votes(flags.data_ptr(), out.data_ptr(), threads)
        total = int(flags.sum())
        for lane, row in enumerate(out.tolist()):
            warp = flags[lane - lane % 32 :][:32].tolist()
            ballot = sum(flag << i for i, flag in enumerate(warp))
            expected = [any(warp), all(warp), ballot, total > 0, total == threads, total]
            assert row == [int(x) if x < 2**31 else x - 2**32 for x in expected]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (
            "barrier and warp",
            r"wait for each other for ever: 32 .* __syncthreads at .*examples.cu:\d+; 32 .* __syncwarp",
        ),
        ("two barriers", r"different barriers, __syncthreads at .*:\d+ and __syncthreads at .*:\d+"),
        ("two shuffles", r"different warp functions, __shfl_sync at"),
        ("mask without itself", r"thread \(\d+, 0, 0\): __shfl_sync with a mask that does not name the lane itself"),
    ],
)
def test_divergence_is_reported(emulated, which, message):
    for seed in range(4):
        emulated.seed(seed)
        with pytest.raises(RuntimeError, match=message):
            emulated.examples.divergent(which)
    emulated.examples.divergent("early end")  # and what comes after is not disturbed


def test_alignment(emulated):
    values = torch.arange(8.0)
    out = torch.zeros(1)
    emulated.examples.fourth_of_four(values.data_ptr(), out.data_ptr())
    assert out.item() == 3.0
    with pytest.raises(RuntimeError, match=r"misaligned access to '.*float4.*' at .*examples.cu:\d+, .* 4 modulo 16"):
        emulated.examples.fourth_of_four(values[1:].data_ptr(), out.data_ptr())


def test_dynamic_shared_memory_is_nan_at_first(emulated):
    out = torch.zeros(1)
    emulated.examples.launch_with(1, 1, 100_000, out.data_ptr())
    assert out.isnan().all()


def test_a_smaller_launch_leaves_the_limit_of_shared_memory(emulated):
    """A larger one of another thread may be about to begin."""
    out = torch.zeros(1)
    for size in (100_000, 60_000, 150_000, 100_000):
        emulated.examples.launch_with(1, 1, size, out.data_ptr())


@pytest.mark.parametrize("resident", [1, 2, 7])
def test_blocks_that_take_turns(emulated, resident):
    """Some wait for others that have begun before them; each has its own shared memory."""
    emulated.resident_blocks(resident)
    for seed in range(4):
        emulated.seed(seed)
        sums, ticket, flags = integers(50), integers(1) + 1, integers(50) + 1
        values = torch.arange(50, dtype=torch.int32)
        pointers = [tensor.data_ptr() for tensor in (ticket, values, sums, flags)]
        emulated.examples.sum_by_chain(*pointers, 50)
        assert torch.equal(sums, values.cumsum(0).int())
        out = integers(9 * 32)
        emulated.examples.sums_of_shared(out.data_ptr(), 9)
        assert torch.equal(out.view(9, 32), (2 * torch.arange(9).int())[:, None].expand(9, 32))


def test_sleeping_for_ever_is_reported(emulated):
    """The first block waits for one that never comes."""
    ticket, values, sums, flags = integers(1) + 2, *(integers(50) + 1 for _ in range(3))
    pointers = [tensor.data_ptr() for tensor in (ticket, values, sums, flags)]
    with pytest.raises(RuntimeError, match=r"block \(\d, 0, 0\): threads sleep, and what they wait for does not come"):
        emulated.examples.sum_by_chain(*pointers, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 32, 4), "an empty grid"),
        ((2**31, 32, 4), "a grid that is too large"),
        ((1, 1025, 4), "a block of 1025 threads, of 1 to 1024"),
        ((1, 0, 4), "a block of 0 threads"),
        ((1, 32, 228 * 1024), "233472 bytes of dynamic shared memory, of at most 232448"),
    ],
)
def test_launches_that_cuda_refuses(emulated, arguments, message):
    out = torch.zeros(1)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        emulated.examples.launch_with(*arguments, out.data_ptr())
