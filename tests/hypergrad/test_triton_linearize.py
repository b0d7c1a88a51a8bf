"""Products by Triton kernels between torch's matrix products, against those of autograd."""

from __future__ import annotations

import itertools

import pytest
import torch

import parl_core as parl
from parl_core.hypergrad.triton_linearize import TritonChunk
from tests.hypergrad.native_policies import F64, HEADS, close, make_policy, make_steps

pytest.importorskip("triton")
pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def both(policy, trajectories, **options):
    """The kernels' linearization, and autograd's."""
    with parl.backend("triton"):
        kernels = parl.linearize(policy, trajectories, **options)
    if trajectories.num_steps and "chunk_steps" not in options:
        assert isinstance(kernels._kept[0][1], TritonChunk)
    with parl.backend("reference"):
        return kernels, parl.linearize(policy, trajectories, **options)


def check_products(policy, trajectories, tolerance=1e-12, **options):
    kernels, autograd = both(policy, trajectories, **options)
    like = autograd.log_prob
    w, f, g = torch.randn(3, trajectories.num_steps, dtype=like.dtype).to(like.device)
    v = torch.randn(autograd.num_params, dtype=like.dtype).to(like.device)
    close(kernels.log_prob, autograd.log_prob, tolerance)
    close(kernels.jvp(v), autograd.jvp(v), tolerance)
    close(kernels.vjp(w), autograd.vjp(w), tolerance)
    close(kernels.fisher_vp(f, v), autograd.fisher_vp(f, v), tolerance)
    for ours, expected in zip(kernels.jvp_and_hvp(w, v), autograd.jvp_and_hvp(w, v), strict=True):
        close(ours, expected, tolerance)
    close(kernels.scores(w), autograd.scores(w), tolerance)
    terms = {"hessian": w, "fisher": f, "scores": g}
    close(kernels.second_order(v, **terms), autograd.second_order(v, **terms), tolerance)


def example(head, hidden, activation, lengths, device, dtype=F64, **sizes):
    torch.manual_seed(0)
    policy = make_policy(head, hidden, activation, dtype=dtype, **sizes)
    trajectories = make_steps(policy, lengths, dtype)
    return policy.to(device), trajectories.to(device)


@pytest.mark.parametrize(
    ("hidden", "activation"), [((), "tanh"), ((5,), "silu"), ((16, 33, 7), "tanh"), ((9, 4), "relu")]
)
@pytest.mark.parametrize("head", HEADS)
def test_products_are_those_of_autograd(head, hidden, activation, device):
    check_products(*example(head, hidden, activation, (3, 0, 1, 33), device))


@pytest.mark.parametrize("head", ["state", "global"])
def test_more_elements_than_a_program_takes(head, device):
    check_products(*example(head, (31, 31), "silu", (70,), device, obs_dim=24, act_dim=6))


@pytest.mark.parametrize("head", HEADS)
def test_float32(head, device):
    policy, trajectories = example(head, (16, 16), "tanh", (20, 30), device, torch.float32, obs_dim=8, act_dim=3)
    check_products(policy, trajectories, tolerance=5e-5)


@pytest.mark.parametrize("head", ["squashed", "categorical"])
def test_steps_in_chunks_and_no_steps(head, device):
    check_products(*example(head, (6,), "tanh", (5, 0, 8), device), chunk_steps=4)
    check_products(*example(head, (6,), "tanh", (0,), device))


@pytest.mark.parametrize(
    "terms", [t for n in range(4) for t in itertools.combinations(("hessian", "fisher", "scores"), n)]
)
def test_every_set_of_terms(terms, device):
    kernels, autograd = both(*example("state", (7, 9), "silu", (3, 0, 20, 1), device))
    weights = {term: torch.randn(24, dtype=F64).to(device) for term in terms}
    v = torch.randn(kernels.num_params, dtype=F64).to(device)
    close(kernels.second_order(v, **weights), autograd.second_order(v, **weights))


def test_other_policies_are_refused_by_name(device):
    policy, trajectories = example("state", (5,), "tanh", (4,), device)
    policy.network[1] = torch.nn.GELU()
    with parl.backend("triton"), pytest.raises(parl.ops.BackendError, match="backend 'triton' cannot be used"):
        parl.linearize(policy, trajectories)


def test_a_hypergradient_is_the_same(device):
    policy, trajectories = example("state", (5,), "tanh", (4, 6), device)
    reward = parl.rewards.RewardEnsemble(3, 2, (4,)).to(device, F64)
    pairs = parl.PreferencePairs(trajectories, trajectories, torch.tensor([0.2, 0.9], dtype=F64, device=device))
    totals = []
    for name in ("triton", "reference"):
        with parl.backend(name):
            result = parl.hypergradient(
                policy, reward, trajectories, pairs, loss=parl.PreferenceLoss(), discount=0.9,
                curvature=parl.Fisher(0.1, damping=0.1), solver=parl.CG(rtol=1e-12),
            )  # fmt: skip
        totals.append(result.total)
    close(*totals, 1e-9)
