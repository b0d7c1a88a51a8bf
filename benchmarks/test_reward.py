"""The reward ensemble: the gradient of weighted rewards, and an epoch of reward learning; 3 members, 3 hidden layers."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import against, gemm_floor, moved_alike
from benchmarks.peers import reward_ensemble as peers

WIDTHS = pytest.mark.parametrize("width", [128, 256], ids=lambda width: f"h{width}")


@WIDTHS
def test_gradient(contest, width):
    """Forward and backward over 3200 steps."""
    steps = 3200
    inputs, weights = peers.make_inputs(steps)
    ensemble, exact = peers.make_ensemble(width), peers.make_ensemble(width, torch.float64)
    expected = peers.gradient(exact, inputs.double(), weights.double(), "reference")()
    contest(
        against(expected, rtol=3e-4, blocks=[param.numel() for param in ensemble.parameters()]),
        ours={
            "parl-core": lambda: peers.gradient(ensemble, inputs, weights),
            "parl-core, torch": lambda: peers.gradient(ensemble, inputs, weights, "reference"),
        },
        peers={
            "torch.compile": lambda: peers.compiled_gradient(ensemble, inputs, weights),
            "JAX jit": lambda: peers.jax_gradient(ensemble, inputs, weights),
        },
        floor=gemm_floor(peers.flops(width, steps, 2, 3), 1600, width),
    )


@WIDTHS
def test_fit(contest, width):
    """One epoch on 128 pairs of 50-step segments, which is one step: sums, loss, gradient and Adam."""
    pairs = 128
    contest(
        moved_alike(list(peers.make_ensemble(width).parameters()), peers.fit(width, pairs, "reference")(), rtol=2e-2),
        ours={
            "parl-core": lambda: peers.fit(width, pairs),
            "parl-core, torch": lambda: peers.fit(width, pairs, "reference"),
        },
        floor=gemm_floor(peers.flops(width, 2 * peers.SEGMENT * pairs, 2, 3), 1600, width),
    )
