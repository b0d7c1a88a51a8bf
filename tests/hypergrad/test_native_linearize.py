"""The kernels' products against those of autograd."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import parl_core as parl
from tests.hypergrad.native_policies import (
    F64,
    HEADS,
    LENGTHS,
    both,
    check_products,
    close,
    make_policy,
    make_steps,
)

native = pytest.importorskip("parl_core._native")


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("hidden", [(), (5,), (40, 33), (16, 64, 7)], ids=str)
@pytest.mark.parametrize("activation", ["tanh", "relu", "silu"])
@pytest.mark.parametrize("head", HEADS)
def test_products_are_those_of_autograd(isa, head, activation, hidden):
    torch.manual_seed(0)
    policy = make_policy(head, hidden, activation)
    check_products(policy, make_steps(policy, (3, 0, 1, 33)))


@pytest.mark.parametrize("lengths", [LENGTHS, (50,) * 6 + (0, 49, 50, 0, 50, 51)], ids=["long", "short"])
@pytest.mark.parametrize("head", HEADS)
def test_products_of_several_blocks_and_threads(isa, threads, head, lengths):
    torch.manual_seed(0)
    policy = make_policy(head, (16, 64), "silu" if head == "state" else "tanh", obs_dim=24, act_dim=6)
    trajectories = make_steps(policy, lengths)
    num_params = sum(p.numel() for p in policy.parameters())
    assert trajectories.num_steps * num_params > 2**18  # enough for the second thread
    check_products(policy, trajectories)


@pytest.mark.parametrize(
    "terms", [t for n in range(4) for t in itertools.combinations(("hessian", "fisher", "scores"), n)]
)
@pytest.mark.parametrize("head", HEADS)
def test_every_set_of_terms(head, terms):
    torch.manual_seed(0)
    policy = make_policy(head, (7, 9))
    trajectories = make_steps(policy, (3, 0, 120, 1))
    kernels, autograd = both(policy, trajectories)
    weights = {term: torch.randn(trajectories.num_steps, dtype=F64) for term in terms}
    v = torch.randn(kernels.num_params, dtype=F64)
    expected = autograd.second_order(v, **weights)
    close(kernels.second_order(v, **weights), expected)
    out = torch.empty_like(v)
    along = torch.empty(trajectories.num_steps, dtype=F64)
    operator = kernels.native_operator(**weights, damping=0.5)
    operator.apply(v, out, along, 1)
    close(out, expected + 0.5 * v)
    close(along, autograd.jvp(v))
    assert autograd.native_operator(**weights) is None


@pytest.mark.parametrize("head", HEADS)
def test_float32(isa, head):
    torch.manual_seed(0)
    policy = make_policy(head, (64, 64), obs_dim=24, act_dim=6, dtype=torch.float32)
    trajectories = make_steps(policy, (50, 50, 120), torch.float32)
    check_products(policy, trajectories, tolerance=2e-5)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    torch.manual_seed(0)
    sizes = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 31, 33, 63, 65])
    head = data.draw(st.sampled_from(HEADS))
    hidden = tuple(data.draw(st.lists(sizes, max_size=3)))
    policy = make_policy(
        head, hidden, data.draw(st.sampled_from(["tanh", "relu", "silu"])), data.draw(sizes), data.draw(sizes)
    )
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 2, 13, 14, 15, 63, 113, 250]), min_size=1, max_size=4))
    check_products(policy, make_steps(policy, lengths), chunk_steps=data.draw(st.sampled_from([None, 29])))


@pytest.mark.parametrize("head", HEADS)
def test_hvp_is_the_derivative_of_vjp(head):
    """By central differences, which know nothing of autograd."""
    torch.manual_seed(0)
    policy = make_policy(head, (6, 5), "silu")
    trajectories = make_steps(policy, (3, 9))
    w, v = torch.randn(12, dtype=F64), torch.randn(sum(p.numel() for p in policy.parameters()), dtype=F64)
    image = parl.linearize(policy, trajectories).hvp(w, v)
    theta = nn.utils.parameters_to_vector(policy.parameters()).detach()
    moved = []
    for step in (1e-5, -1e-5):
        nn.utils.vector_to_parameters(theta + step * v, policy.parameters())
        moved.append(parl.linearize(policy, trajectories).vjp(w))
    torch.testing.assert_close(image, (moved[0] - moved[1]) / 2e-5, rtol=1e-6, atol=1e-6)


def test_the_operator_is_symmetric_and_blocks_are_its_rows():
    torch.manual_seed(0)
    policy = make_policy("state", (20, 30))
    trajectories = make_steps(policy)
    weights = {term: torch.randn(trajectories.num_steps, dtype=F64) for term in ("hessian", "fisher", "scores")}
    linear = parl.linearize(policy, trajectories)
    operator = linear.native_operator(**weights, damping=0.1)
    block = torch.randn(4, linear.num_params, dtype=F64)
    images = torch.empty_like(block)
    operator.apply_block(block, images, 1)
    products = block @ images.T
    close(products, products.T)
    for row, image in zip(block, images, strict=True):
        close(image, linear.second_order(row, **weights) + 0.1 * row)


def test_scores_of_all_trajectories_sum_to_the_vjp():
    torch.manual_seed(0)
    policy = make_policy("global", (16, 48))
    trajectories = make_steps(policy)
    linear = parl.linearize(policy, trajectories)
    w = torch.randn(trajectories.num_steps, dtype=F64)
    close(linear.scores(w).sum(0), linear.vjp(w))
    assert not linear.scores()[trajectories.lengths == 0].any()


def test_results_are_the_same_bit_for_bit(threads):
    torch.manual_seed(0)
    policy = make_policy("state", (64, 64), obs_dim=24, act_dim=6, dtype=torch.float32)
    trajectories = make_steps(policy, dtype=torch.float32)
    w, f, g = torch.randn(3, trajectories.num_steps)
    v = torch.randn(sum(p.numel() for p in policy.parameters()))

    def results():
        linear = parl.linearize(policy, trajectories)
        return [linear.vjp(w), linear.jvp(v), linear.second_order(v, hessian=w, fisher=f, scores=g), linear.scores()]

    first = results()
    for _ in range(5):
        assert all(map(torch.equal, first, results()))


def test_no_steps():
    policy = make_policy("state")
    linear = parl.linearize(policy, make_steps(policy, (0, 0)))
    v, none = torch.ones(linear.num_params, dtype=F64), torch.zeros(0, dtype=F64)
    assert not linear.second_order(v, hessian=none, fisher=none, scores=none).any()
    assert linear.scores().shape == (2, linear.num_params)


def test_numbers_that_are_not_finite_are_named():
    policy = make_policy("state")
    policy.network[2].bias.data[0] = float("nan")
    with pytest.raises(parl.NonFiniteError, match=r"policy\.log_prob"):
        parl.linearize(policy, make_steps(policy))
    policy = make_policy("state")
    trajectories = make_steps(policy)
    w = torch.ones(trajectories.num_steps, dtype=F64)
    w[3] = float("nan")
    assert parl.linearize(policy, trajectories).vjp(w).isnan().any()


def test_weights_and_vectors_of_other_layouts_are_taken():
    torch.manual_seed(0)
    policy = make_policy("state")
    trajectories = make_steps(policy, (5, 4))
    kernels, autograd = both(policy, trajectories)
    w = torch.randn(9, 2, dtype=F64)[:, 0].requires_grad_()
    v = torch.randn(2 * kernels.num_params, dtype=F64)[::2]
    close(kernels.hvp(w, v), autograd.hvp(w, v))
    close(kernels.vjp(w.detach().float()), autograd.vjp(w.detach().float().double()))


def test_native_module_checks_its_arguments():
    def made(**changes):
        arguments = {
            "widths": [3, 2],
            "activation": "tanh",
            "head": "global",
            "squash": False,
            "params": torch.zeros(10),
            "log_std": None,
            "observations": torch.zeros(4, 3),
            "actions": torch.zeros(4, 2),
            "offsets": torch.tensor([0, 1, 4]),
            "num_threads": 1,
        }
        return native.linearize_mlp(**{**arguments, **changes})

    for error, name, changes in [
        (ValueError, "widths", {"widths": [3]}),
        (ValueError, "widths", {"widths": [3, 0]}),
        (ValueError, "widths", {"widths": [3, 3], "head": "state"}),
        (ValueError, "activation", {"activation": "gelu"}),
        (ValueError, "head", {"head": "beta"}),
        (ValueError, "params", {"params": torch.zeros(9)}),
        (TypeError, "params", {"params": torch.zeros(10, dtype=torch.int64)}),
        (TypeError, "params", {"params": torch.zeros(10, device="meta")}),
        (ValueError, "log_std", {"log_std": torch.zeros(2)}),
        (ValueError, "log_std", {"head": "fixed", "params": torch.zeros(8)}),
        (ValueError, "observations", {"observations": torch.zeros(4, 4)}),
        (ValueError, "observations", {"observations": torch.zeros(12)}),
        (ValueError, "observations", {"observations": torch.zeros(4, 6)[:, ::2]}),
        (TypeError, "observations", {"observations": torch.zeros(4, 3, dtype=F64)}),
        (ValueError, "actions", {"actions": torch.zeros(3, 2)}),
        (TypeError, "actions", {"head": "categorical", "params": torch.zeros(8), "actions": torch.zeros(4)}),
        (
            ValueError,
            "actions",
            {"head": "categorical", "params": torch.zeros(8), "actions": torch.tensor([0, 1, 2, 0])},
        ),
        (ValueError, "offsets", {"offsets": torch.tensor([0, 4, 3])}),
        (ValueError, "offsets", {"offsets": torch.tensor([1, 4])}),
        (ValueError, "offsets", {"offsets": torch.zeros(0, dtype=torch.int64)}),
        (TypeError, "offsets", {"offsets": torch.zeros(2)}),
        (ValueError, "num_threads", {"num_threads": 0}),
    ]:
        with pytest.raises(error, match=name):
            made(**changes)
    linear = made()
    steps, params = torch.zeros(4), torch.zeros(10)
    for error, name, call in [
        (ValueError, "v must have 10", lambda: linear.jvp(steps, steps, 1)),
        (ValueError, "out must have 4", lambda: linear.jvp(params, params, 1)),
        (TypeError, "w must be of dtype float32, got float64", lambda: linear.vjp(steps.double(), params, 1)),
        (ValueError, "out must be contiguous", lambda: linear.vjp(steps, torch.zeros(20)[::2], 1)),
        (ValueError, "out must have two", lambda: linear.scores(steps, torch.zeros(20), 1)),
        (ValueError, "scores must have 4", lambda: linear.curvature(None, None, params, 0.0, 1)),
        (ValueError, "num_threads", lambda: linear.log_prob(steps) or linear.jvp(params, steps, -1)),
    ]:
        with pytest.raises(error, match=name):
            call()
    operator = linear.curvature(steps, None, None, 0.0, 1)
    with pytest.raises(ValueError, match="out must not share memory with v"):
        operator.apply(params, params, None, 1)
    room = torch.zeros(14)
    for v, out, along, message in [
        (room[:10], room[4:], None, "out must not share memory with v"),
        (room[:10], params, room[9:13], "along must not share memory with v"),
        (params, room[4:], room[:5][1:], "along must not share memory with out"),
    ]:
        with pytest.raises(ValueError, match=message):
            operator.apply(v, out, along, 1)
    with pytest.raises(ValueError, match="out must not share memory with v"):
        linear.jvp(room[:10], room[9:13], 1)
    with pytest.raises(TypeError, match="v must be a Tensor, got NoneType"):
        operator.apply_block(None, torch.zeros(3, 10), 1)
    with pytest.raises(ValueError, match="v must have 30 elements"):
        operator.apply_block(torch.zeros(3, 9), torch.zeros(3, 10), 1)


THREADS = """
import os, sys, torch, parl_core as parl
tasks = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(int(sys.argv[1]))
large = torch.randn(512, 512)
large @ large  # torch's pool is up
policy = parl.policies.GaussianPolicy(24, 6, (64, 64))
data = parl.Trajectories(torch.randn(1600, 24), torch.randn(1600, 6), torch.arange(0, 1601, 50))
with parl.backend("reference"):
    parl.linearize(policy, data).vjp(torch.ones(1600))
before = tasks()
linear = parl.linearize(policy, data)
v = torch.randn(linear.num_params)
linear.hvp(torch.ones(1600), v), linear.vjp(torch.ones(1600)), linear.scores()
assert tasks() == before, (before, tasks())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_the_threads_are_torchs_own(threads):
    """With one, none is started; with two, those of torch's pool serve."""
    subprocess.run([sys.executable, "-c", THREADS, threads], check=True)
