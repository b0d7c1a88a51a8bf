"""Segmented scans over (N trajectories × H steps), float32: every backend, and torch.cumsum as the peer.

Every case asserts its result before it is timed. Run with `make bench`, compare the medians.
"""

from __future__ import annotations

import pytest
import torch

from parl_core.ops import available_backends, discounted_returns, prefix_sum

SHAPES = [(64, 1000), (4096, 50)]
DISCOUNT = 0.99


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def case(request):
    """values (N·H,), offsets (N+1,), N, H."""
    num_trajectories, horizon = request.param
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(num_trajectories * horizon, generator=generator)
    return values, torch.arange(num_trajectories + 1) * horizon, num_trajectories, horizon


def assert_is_scan(scanned, values, shape, discount, reverse):
    """Against a float64 loop over time."""
    columns = values.double().reshape(shape).unbind(1)
    carry, expected = torch.zeros(shape[0], dtype=torch.float64), []
    for column in reversed(columns) if reverse else columns:
        carry = column + discount * carry
        expected.append(carry)
    dense = torch.stack(expected[::-1] if reverse else expected, dim=1).reshape(-1)
    torch.testing.assert_close(scanned.double(), dense, rtol=1e-4, atol=1e-4)


def group(case, name):
    return f"{name} {case[2]}x{case[3]}"


@pytest.mark.parametrize("backend", available_backends())
def test_discounted_returns(benchmark, case, backend):
    values, offsets, *shape = case
    benchmark.group = group(case, "discounted_returns")
    scanned = discounted_returns(values, DISCOUNT, offsets, backend=backend)
    assert_is_scan(scanned, values, shape, DISCOUNT, reverse=True)
    benchmark(discounted_returns, values, DISCOUNT, offsets, backend=backend)


@pytest.mark.parametrize("backend", available_backends())
def test_discounted_returns_and_gradient(benchmark, case, backend):
    values, offsets, *shape = case
    benchmark.group = group(case, "discounted_returns, forward and backward")
    values.requires_grad_()
    weights = torch.ones_like(values)

    def run():
        out = discounted_returns(values, DISCOUNT, offsets, backend=backend)
        return torch.autograd.grad(out, values, weights)[0]

    assert_is_scan(run(), weights, shape, DISCOUNT, reverse=False)
    benchmark(run)


@pytest.mark.parametrize("backend", [*available_backends(), "torch.cumsum"])
def test_prefix_sum(benchmark, case, backend):
    values, offsets, *shape = case
    benchmark.group = group(case, "prefix_sum")
    if backend == "torch.cumsum":
        dense = values.reshape(shape)
        assert_is_scan(dense.cumsum(1).reshape(-1), values, shape, 1.0, reverse=False)
        benchmark(dense.cumsum, 1)
    else:
        scanned = prefix_sum(values, offsets, backend=backend)
        assert_is_scan(scanned, values, shape, 1.0, reverse=False)
        benchmark(prefix_sum, values, offsets, backend=backend)
