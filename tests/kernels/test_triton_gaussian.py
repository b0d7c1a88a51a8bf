"""The Triton kernels of Gaussian log-densities against automatic differentiation of their definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import grad, jvp

pytest.importorskip("triton")
from parl_core.kernels import triton_gaussian as kernels

# As multiples of the largest element of the exact result: a few roundings, in half precision the last one.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
BOUNDS = (-3.0, 1.0)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def example(shape, dtype, seed=0):
    """Actions within (−1, 1), means, log standard deviations, a tangent of each, and weights (T,)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(5, *shape, generator=generator, dtype=torch.float64) / 2
    drawn[0] = 0.9 * drawn[0].tanh()
    weights = torch.randn(2, shape[0], generator=generator, dtype=torch.float64)
    return [tensor.to(dtype) for tensor in (*drawn, weights[0], weights[1].abs())]


def rescaled(raw, bounds):
    return raw if bounds is None else bounds[0] + 0.5 * (bounds[1] - bounds[0]) * (torch.tanh(raw) + 1.0)


def density(actions, mean, log_std, squash, bounds=None):
    """The definition, (T,)."""
    log_std = rescaled(log_std, bounds)
    u = torch.zeros_like(mean) if actions is None else torch.atanh(actions) if squash else actions
    terms = -0.5 * ((u - mean) / log_std.exp()) ** 2 - 0.5 * math.log(2 * math.pi) - log_std
    return (terms - torch.log1p(-actions.square()) if squash and actions is not None else terms).sum(-1)


def exact(actions, mean, log_std, squash, tangents, weights, bounds=None):
    """Value, gradient, what is along the tangents, and the Hessian's product with them: in float64."""
    actions, mean, log_std, *tangents, weights = (
        None if tensor is None else tensor.double().cpu() for tensor in (actions, mean, log_std, *tangents, weights)
    )

    def value(mean, log_std):
        return density(actions, mean, log_std, squash, bounds)

    slope = grad(lambda *given: (weights * value(*given)).sum(), argnums=(0, 1))
    of_value, along = jvp(value, (mean, log_std), tuple(tangents))
    gradient, product = jvp(slope, (mean, log_std), tuple(tangents))
    return of_value, *gradient, along, *product


def close(ours, expected, dtype):
    assert ours.dtype == dtype
    assert ours.shape == expected.shape
    tolerance = TOLERANCE[dtype] * max(1.0, float(expected.abs().max())) if expected.numel() else 0.0
    torch.testing.assert_close(ours.double().cpu(), expected, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("taken", ["squashed", "plain", "none"])
def test_all_are_the_derivatives_of_the_definition(device, taken, dtype):
    squash = taken == "squashed"
    for shape in ((0, 3), (1, 1), (7, 3), (65, 8), (3, 257), (4, 0)):
        actions, mean, log_std, of_mean, of_log_std, weights, _ = (x.to(device) for x in example(shape, dtype))
        given = (None if taken == "none" else actions, mean, log_std, squash)
        expected = exact(*given, (of_mean, of_log_std), weights)
        ours = (
            kernels.log_prob(*given),
            *kernels.gradient(*given, weights),
            *kernels.second_order(*given, of_mean, of_log_std, weights),
        )
        for found, value in zip(ours, expected, strict=True):
            close(found, value, dtype)
        close(kernels.along(*given, of_mean, of_log_std), expected[3], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rescaled_deviations_and_the_fisher_matrix(device, dtype):
    """Into views of a layer's outputs, means and log standard deviations side by side."""
    shape = (9, 5)
    actions, mean, raw, of_mean, of_raw, weights, fisher = example(shape, dtype)
    expected = exact(actions, mean, raw, False, (of_mean, of_raw), weights, BOUNDS)
    log_std, moved = jvp(lambda x: rescaled(x, BOUNDS), (raw.double(),), (of_raw.double(),))
    slope = grad(lambda x: rescaled(x, BOUNDS).sum())(raw.double())
    information = fisher.double()[:, None]
    of_fisher = (information * torch.exp(-2 * log_std) * of_mean.double(), information * 2 * moved * slope)

    joined = torch.cat([mean, raw], 1).to(device)
    out = torch.full((2, 9, 10), math.nan, dtype=dtype, device=device)
    value = torch.full((2, 9), math.nan, dtype=dtype, device=device)
    given = (actions.to(device), joined[:, :5], joined[:, 5:], False)
    first = {"value": value[0], "by_mean": out[0, :, :5], "by_log_std": out[0, :, 5:]}
    second = {"value": value[1], "by_mean": out[1, :, :5], "by_log_std": out[1, :, 5:]}
    tangents = {"of_mean": of_mean.to(device), "of_log_std": of_raw.to(device)}
    kernels.launch(*given, bounds=BOUNDS, weights=weights.to(device), **first)
    kernels.launch(*given, bounds=BOUNDS, weights=weights.to(device), fisher=fisher.to(device), **tangents, **second)
    ours = (*first.values(), *second.values())
    wanted = (*expected[:4], *(a + b for a, b in zip(expected[4:], of_fisher, strict=True)))
    for found, exactly in zip(ours, wanted, strict=True):
        close(found, exactly, dtype)


def test_the_fisher_matrix_alone_and_rows_that_are_shared(device):
    """Log standard deviations of stride 0, means of columns that are apart."""
    actions, mean, log_std, of_mean, _, weights, fisher = (x.to(device) for x in example((6, 3), torch.float64))
    shared, apart = log_std[:1].expand(6, 3), mean.T.contiguous().T
    for found, expected in zip(
        kernels.gradient(actions, apart, shared, True, weights),
        exact(actions, mean, shared.contiguous(), True, (of_mean, of_mean), weights)[1:3],
        strict=True,
    ):
        close(found, expected, torch.float64)
    product = torch.full_like(mean, math.nan)
    kernels.launch(None, apart, shared, False, of_mean=of_mean, fisher=fisher, by_mean=product)
    close(product, (fisher[:, None] * torch.exp(-2 * shared) * of_mean).cpu(), torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_actions_on_the_boundary_are_taken_just_inside(device, dtype):
    edge = 1.0 - torch.finfo(dtype).eps
    actions = torch.tensor([[1.0, -1.0, 0.5], [0.0, 0.0, math.nan], [0.0, 0.0, 0.0]], dtype=dtype)
    zero = torch.zeros(3, 3, dtype=dtype)
    found = kernels.log_prob(actions.to(device), zero.to(device), zero.to(device), True)
    assert found.isnan().tolist() == [False, True, False]
    inside = actions.double()[::2].clamp(-edge, edge)
    close(found[::2], density(inside, zero.double()[::2], zero.double()[::2], True), dtype)
