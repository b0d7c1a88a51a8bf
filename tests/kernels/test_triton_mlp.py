"""What lies between a perceptron's matrix products, in Triton, against automatic differentiation in float64."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad

pytest.importorskip("triton")
from parl_core.kernels import triton_mlp as kernels

TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "silu": torch.nn.functional.silu}
EVERY = [
    pytest.mark.parametrize("activation", ACTIVATIONS),
    pytest.mark.parametrize("dtype", TOLERANCE, ids=str),
    pytest.mark.usefixtures("poisoned_memory"),
]


def every(test):
    for mark in EVERY:
        test = mark(test)
    return test


def example(count, dtype, device):
    """z, ż, g, ġ; among the z very small, large and, for the largest count, all between."""
    generator = torch.Generator().manual_seed(count)
    drawn = torch.randn(4, count, generator=generator, dtype=torch.float64)
    special = torch.tensor([0.0, 1e-5, -1e-5, 0.049, 0.051, -0.05, 12.0, -12.0, 80.0, -80.0], dtype=torch.float64)
    drawn[0, : len(special)] = special[:count]
    return [tensor.to(device) for tensor in drawn.to(dtype)]


def kept_of(z, activation):
    """a, or z: rounded to the dtype."""
    return z if activation == "silu" else ACTIVATIONS[activation](z.double()).to(z.dtype)


def derivatives(kept, activation):
    """φ′ and φ″ in float64 at what is kept."""
    kept = kept.double().cpu()
    if activation == "tanh":  # of a, since a = 1 has no z
        return 1 - kept**2, -2 * kept * (1 - kept**2)
    slope = grad(lambda z: ACTIVATIONS[activation](z).sum())
    return slope(kept), grad(lambda z: slope(z).sum())(kept)


def close(ours, expected, dtype):
    assert ours.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(ours.double().cpu(), expected, rtol=tolerance, atol=tolerance)


@every
@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025])
def test_activate(device, count, dtype, activation):
    z = example(count, dtype, device)[0]
    before = z.clone()
    a, kept = kernels.activate(z, activation)
    close(a, ACTIVATIONS[activation](before.double().cpu()), dtype)
    if activation == "tanh":  # to the last digits also where it is small
        torch.testing.assert_close(a.double().cpu(), before.double().cpu().tanh(), rtol=3 * TOLERANCE[dtype], atol=0.0)
    assert kept is z
    assert torch.equal(kept, before if activation == "silu" else a)


@every
def test_push(device, dtype, activation):
    z, dot, _, _ = example(1100, dtype, device)
    kept = kept_of(z, activation)
    slope, bend = (derivative * dot.double().cpu() for derivative in derivatives(kept, activation))
    bent = dot.clone()
    close(kernels.push(kept, bent, activation, bends=True), slope, dtype)
    close(bent, bend, dtype)
    moved = dot.clone()
    assert kernels.push(kept, moved, activation, bends=False) is moved
    close(moved, slope, dtype)


@every
def test_pull(device, dtype, activation):
    z, bent, cotangent, moved = example(1100, dtype, device)
    kept = kept_of(z, activation)
    slope, _ = derivatives(kept, activation)
    of_bent, of_cotangent, of_moved = (tensor.double().cpu().clone() for tensor in (bent, cotangent, moved))
    both = cotangent.clone(), moved.clone()
    kernels.pull(kept, *both, bent, activation)
    close(both[0], slope * of_cotangent, dtype)
    close(both[1], slope * of_moved + of_bent * of_cotangent, dtype)
    kernels.pull(kept, cotangent, None, None, activation)
    close(cotangent, slope * of_cotangent, dtype)
    kernels.pull(kept, None, moved, None, activation)
    close(moved, slope * of_moved, dtype)


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=str)
def test_half_precision_is_rounded_at_the_end(device, dtype, step):
    """φ′ġ + φ″ż g = −(1 + 2ε) + (1 + ε)² = ε², which a rounded product would miss."""
    kept, bent, cotangent, moved = (
        torch.tensor([value], dtype=dtype, device=device) for value in (0.0, 1 + step, 1 + step, -(1 + 2 * step))
    )
    kernels.pull(kept, cotangent, moved, bent, "tanh")
    assert moved.item() == step**2
