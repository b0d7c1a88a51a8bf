"""The CUDA kernels' products against those of autograd, on a GPU or emulated on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import parl_core as parl
from parl_core.hypergrad.cuda_linearize import CudaChunk
from tests.hypergrad.native_policies import F64, HEADS, both, check_products, close, make_policy, make_steps

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def kernels(cuda_kernels):
    return cuda_kernels


def made(policy, trajectories, device):
    with parl.backend("cuda"):
        return parl.linearize(policy.to(device), trajectories.to(device))


def operator_of(linear, hessian=None, fisher=None, scores=None, damping=0.0):
    """The kernels' operator, and the stream to call it with."""
    chunk = linear._kept[0][1]
    assert type(chunk) is CudaChunk
    return chunk.operator((hessian, fisher, scores), damping), chunk._where()


@pytest.mark.parametrize("hidden", [(), (5,), (40, 33), (16, 64, 7)], ids=str)
@pytest.mark.parametrize("activation", ["tanh", "relu", "silu"])
@pytest.mark.parametrize("head", HEADS)
def test_products_are_those_of_autograd(device, head, activation, hidden):
    torch.manual_seed(0)
    policy = make_policy(head, hidden, activation)
    check_products(policy, make_steps(policy, (3, 0, 1, 33)), backend="cuda", device=device)


SHORT, LONG = (130, 0, 77, 1, 60, 0), (1030, 6)


@pytest.mark.parametrize(
    "head, lengths", [*((head, SHORT) for head in HEADS), ("state", LONG), ("categorical", LONG)], ids=str
)
def test_products_of_wide_layers_and_several_blocks(device, head, lengths):
    """Tiles are 64 units and 32 columns wide; trajectories of more than 512 steps on average go to larger blocks."""
    torch.manual_seed(0)
    policy = make_policy(head, (65, 70), "silu" if head == "state" else "tanh", obs_dim=67, act_dim=6)
    check_products(policy, make_steps(policy, lengths), backend="cuda", device=device)


@pytest.mark.parametrize("head", HEADS)
def test_small_networks_go_through_in_tiles(device, head):
    """More tiles than blocks: at most 64 steps, and two to each multiprocessor, of which the emulation has two."""
    torch.manual_seed(0)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    policy = make_policy(head, (9, 5), "silu" if head == "global" else "tanh", obs_dim=6, act_dim=3)
    trajectories = make_steps(policy, (4 * 64 * processors, 13))
    kernels, autograd = both(policy, trajectories, "cuda", device)
    w, v = torch.randn(trajectories.num_steps, dtype=F64), torch.randn(kernels.num_params, dtype=F64)
    there = w.to(device), v.to(device)
    for ours, expected in zip(kernels.jvp_and_hvp(*there), autograd.jvp_and_hvp(w, v), strict=True):
        close(ours, expected)
    close(kernels.fisher_vp(*there), autograd.fisher_vp(w, v))


@pytest.mark.parametrize("num_actions", [31, 32, 65])
def test_many_actions(device, num_actions):
    """From 32 outputs on a warp takes a step."""
    torch.manual_seed(0)
    for head in ("categorical", "global"):
        policy = make_policy(head, (9,), act_dim=num_actions)
        check_products(policy, make_steps(policy, (3, 40)), backend="cuda", device=device)


@pytest.mark.parametrize(
    "terms", [t for n in range(4) for t in itertools.combinations(("hessian", "fisher", "scores"), n)]
)
@pytest.mark.parametrize("head", HEADS)
def test_every_set_of_terms(device, head, terms):
    torch.manual_seed(0)
    policy = make_policy(head, (7, 9))
    trajectories = make_steps(policy, (3, 0, 60, 1))
    kernels, autograd = both(policy, trajectories, "cuda", device)
    weights = {term: torch.randn(trajectories.num_steps, dtype=F64) for term in terms}
    v = torch.randn(kernels.num_params, dtype=F64)
    expected = autograd.second_order(v, **weights)
    there = {term: numbers.to(device) for term, numbers in weights.items()}
    close(kernels.second_order(v.to(device), **there), expected)
    operator, stream = operator_of(kernels, **there, damping=0.5)
    out = torch.empty_like(v, device=device)
    along = torch.empty(trajectories.num_steps, dtype=F64, device=device)
    operator.apply(v.to(device), out, along, stream)
    close(out, expected + 0.5 * v)
    close(along, autograd.jvp(v))
    block = torch.stack((v, 2 * v)).to(device)
    images = torch.empty_like(block)
    operator.apply_block(block, images, stream)
    close(images[1], 2 * (expected + 0.5 * v))


@pytest.mark.parametrize("head", HEADS)
def test_float32(device, head):
    torch.manual_seed(0)
    policy = make_policy(head, (64, 64), obs_dim=24, act_dim=6, dtype=torch.float32)
    trajectories = make_steps(policy, (50, 50, 60), torch.float32)
    check_products(policy, trajectories, 2e-5, "cuda", device)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(device, data):
    torch.manual_seed(0)
    sizes = st.sampled_from([1, 2, 6, 31, 33, 63, 65])
    head = data.draw(st.sampled_from(HEADS))
    hidden = tuple(data.draw(st.lists(sizes, max_size=2)))
    policy = make_policy(
        head, hidden, data.draw(st.sampled_from(["tanh", "relu", "silu"])), data.draw(sizes), data.draw(sizes)
    )
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 63]), min_size=1, max_size=4))
    chunk_steps = data.draw(st.sampled_from([None, 29]))
    check_products(policy, make_steps(policy, lengths), backend="cuda", device=device, chunk_steps=chunk_steps)


def test_the_operator_is_symmetric(device):
    torch.manual_seed(0)
    policy = make_policy("state", (20, 30))
    trajectories = make_steps(policy, (40, 1, 30))
    linear = made(policy, trajectories, device)
    weights = {term: torch.randn(71, dtype=F64, device=device) for term in ("hessian", "fisher", "scores")}
    block = torch.randn(4, linear.num_params, dtype=F64, device=device)
    products = block @ torch.stack([linear.second_order(row, **weights) for row in block]).T
    close(products, products.T)


def test_results_are_the_same_bit_for_bit(device, kernels):
    """Whatever order threads and blocks run in."""
    torch.manual_seed(0)
    policy = make_policy("state", (33, 20), obs_dim=5, act_dim=3, dtype=torch.float32)
    trajectories = make_steps(policy, (50, 0, 90), torch.float32)
    w, f, g = torch.randn(3, 140, device=device)
    v = torch.randn(sum(p.numel() for p in policy.parameters()), device=device)

    def results():
        linear = made(policy, trajectories, device)
        return [linear.vjp(w), linear.jvp(v), linear.second_order(v, hessian=w, fisher=f, scores=g), linear.scores()]

    first = results()
    for _ in range(3):
        assert all(map(torch.equal, first, results()))


def test_operators_of_one_linearization_take_turns(device):
    """Each keeps what depends on its weights; what they share is written anew by every product."""
    torch.manual_seed(0)
    policy = make_policy("squashed", (12, 7))
    trajectories = make_steps(policy, (9, 20))
    kernels, autograd = both(policy, trajectories, "cuda", device)
    v = torch.randn(kernels.num_params, dtype=F64)
    weights = [{"hessian": torch.randn(29, dtype=F64)}, {"fisher": torch.rand(29, dtype=F64)}]
    weights.append({"hessian": torch.randn(29, dtype=F64), "scores": torch.randn(29, dtype=F64)})
    there = [{name: w.to(device) for name, w in each.items()} for each in weights]
    operators = [operator_of(kernels, **each, damping=1e-3) for each in there]
    for _ in range(2):
        for each, (operator, stream) in zip(weights, operators, strict=True):
            out = torch.empty_like(v, device=device)
            operator.apply(v.to(device), out, None, stream)
            close(out, autograd.second_order(v, **each) + 1e-3 * v)


def test_weights_that_change_in_place_are_seen(device):
    torch.manual_seed(0)
    policy = make_policy("state")
    trajectories = make_steps(policy, (5, 4))
    kernels, autograd = both(policy, trajectories, "cuda", device)
    w, v = torch.randn(9, dtype=F64), torch.randn(kernels.num_params, dtype=F64)
    there = w.to(device).clone()
    close(kernels.hvp(there, v.to(device)), autograd.hvp(w, v))
    there.mul_(2)
    close(kernels.hvp(there, v.to(device)), autograd.hvp(2 * w, v))
    with torch.inference_mode():
        close(kernels.hvp(there * 2, v.to(device)), autograd.hvp(4 * w, v))


def test_no_steps(device):
    policy = make_policy("state")
    linear = made(policy, make_steps(policy, (0, 0)), device)
    v, none = torch.ones(linear.num_params, dtype=F64, device=device), torch.zeros(0, dtype=F64, device=device)
    assert not linear.second_order(v, hessian=none, fisher=none, scores=none).any()
    assert not linear.vjp(none).any()
    assert linear.scores().shape == (2, linear.num_params)


def test_not_a_number_goes_through(device):
    policy = make_policy("state", (9,))
    trajectories = make_steps(policy, (30, 4))
    linear = made(policy, trajectories, device)
    w, v = torch.ones(34, dtype=F64, device=device), torch.ones(linear.num_params, dtype=F64, device=device)
    w[3] = float("nan")
    assert linear.vjp(w).isnan().all()
    assert linear.hvp(w, v).isnan().all()
    assert linear.scores(w).isnan().all(1).tolist() == [True, False]


def test_deep_networks_are_left_to_autograd(device):
    policy = make_policy("state", (2,) * 15)
    check_products(policy, make_steps(policy, (3, 5)), backend="cuda", device=device)
    deeper = make_policy("state", (2,) * 16)
    with pytest.raises(parl.ops.BackendError, match="more than 16 layers"):
        made(deeper, make_steps(deeper, (3, 5)), device)


@pytest.mark.parametrize(
    "head, curvature, solver",
    [("state", "fisher", parl.CG), ("categorical", "fisher", parl.MINRES), ("state", "hessian", parl.CG)],
)
def test_a_whole_hypergradient(device, head, curvature, solver):
    torch.manual_seed(0)
    policy = make_policy(head, (8, 8)).to(device)
    reward = nn.Sequential(nn.Linear(5 if head == "state" else 4, 6), nn.Tanh(), nn.Linear(6, 1)).double().to(device)

    class Reward(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = reward

        def forward(self, observations, actions):
            actions = actions.reshape(len(actions), -1).to(observations)
            return self.network(torch.cat((observations, actions), -1)).squeeze(-1)

    lower = make_steps(policy, (9, 0, 14, 20)).to(device)
    upper = parl.Trajectories(lower.observations.clone(), lower.actions.clone(), lower.offsets.clone())
    arguments = {
        "loss": parl.TrajectoryLoss(lambda r, t: t.sum_steps(r(t.observations, t.actions))),
        "discount": 0.9,
        "curvature": parl.Fisher(0.3, 0.05)
        if curvature == "fisher"
        else parl.ScoreHessian(temperature=0.3, damping=1000.0),
        "solver": solver(rtol=1e-11, max_iterations=200),
    }
    results = []
    for backend in ("cuda", "reference"):
        with parl.backend(backend):
            results.append(parl.hypergradient(policy, Reward(), lower, upper, **arguments))
    assert results[0].solution.status == results[1].solution.status
    close(results[0].total, results[1].total, 1e-9)


def test_native_module_checks_its_arguments(device, kernels):
    def tensor(*shape, **options):
        return torch.zeros(*shape, device=device, **options)

    def linearize(**changes):
        arguments = {
            "widths": [3, 2],
            "activation": "tanh",
            "head": "global",
            "squash": False,
            "params": tensor(10),
            "log_std": None,
            "observations": tensor(4, 3),
            "actions": tensor(4, 2),
            "offsets": torch.tensor([0, 1, 4], device=device),
            "allow_tf32": False,
            "allocate": tensor,
            "stream": 0,
        }
        return kernels.linearize_mlp(**{**arguments, **changes})

    for error, name, changes in [
        (ValueError, "widths", {"widths": [3]}),
        (ValueError, "widths", {"widths": [3, 0]}),
        (ValueError, "widths", {"widths": [3, 3], "head": "state"}),
        (ValueError, "16 layers", {"widths": [3] + 17 * [2], "params": tensor(2 + 8 + 16 * 6)}),
        (ValueError, "activation", {"activation": "gelu"}),
        (ValueError, "head", {"head": "beta"}),
        (ValueError, "params", {"params": tensor(9)}),
        (TypeError, "params", {"params": tensor(10, dtype=torch.int64)}),
        (TypeError, "params", {"params": torch.zeros(10, device="meta")}),
        (ValueError, "log_std", {"log_std": tensor(2)}),
        (ValueError, "log_std", {"head": "fixed", "params": tensor(8)}),
        (ValueError, "observations", {"observations": tensor(4, 4)}),
        (ValueError, "observations", {"observations": tensor(4, 6)[:, ::2]}),
        (TypeError, "observations", {"observations": tensor(4, 3, dtype=F64)}),
        (ValueError, "actions", {"actions": tensor(3, 2)}),
        (TypeError, "actions", {"head": "categorical", "params": tensor(8), "actions": tensor(4)}),
        (ValueError, "offsets", {"offsets": tensor(0, dtype=torch.int64)}),
        (TypeError, "offsets", {"offsets": tensor(2)}),
        (ValueError, "allocate", {"allocate": lambda size: tensor(size - 1)}),
    ]:
        with pytest.raises(error, match=name):
            linearize(**changes)
    linear = linearize()
    steps, params = tensor(4), tensor(10)
    for error, name, call in [
        (ValueError, "v must have 10", lambda: linear.jvp(steps, steps, 0)),
        (ValueError, "out must have 4", lambda: linear.jvp(params, params, 0)),
        (TypeError, "w must be of dtype float32, got float64", lambda: linear.vjp(steps.double(), params, 0)),
        (ValueError, "out must be contiguous", lambda: linear.vjp(steps, tensor(20)[::2], 0)),
        (ValueError, "out must have 20", lambda: linear.scores(steps, tensor(10), 0)),
        (ValueError, "scores must have 4", lambda: linear.curvature(None, None, params, 0.0, tensor, 0)),
    ]:
        with pytest.raises(error, match=name):
            call()
    operator = linear.curvature(steps, None, None, 0.0, tensor, 0)
    room = tensor(14)
    for v, out, along, message in [
        (params, params, None, "out must not share memory with v"),
        (room[:10], room[4:], None, "out must not share memory with v"),
        (room[:10], params, room[9:13], "along must not share memory with v"),
        (params, room[4:], room[:5][1:], "along must not share memory with out"),
    ]:
        with pytest.raises(ValueError, match=message):
            operator.apply(v, out, along, 0)


@pytest.mark.gpu
def test_products_can_be_captured_in_a_graph(device):
    torch.manual_seed(0)
    policy = make_policy("state", (64, 65), obs_dim=24, act_dim=6, dtype=torch.float32)
    linear = made(policy, make_steps(policy, (50, 50, 60), torch.float32), device)
    w, f, g = torch.randn(3, 160, device=device)
    v = torch.randn(linear.num_params, device=device)
    operator, _ = operator_of(linear, hessian=w, fisher=f, scores=g, damping=0.1)
    out = torch.empty_like(v)

    def product():
        operator.apply(v, out, None, torch.cuda.current_stream().cuda_stream)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        product()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product()
    for _ in range(2):
        v.normal_()
        graph.replay()
        replayed = out.clone()
        product()
        assert torch.equal(replayed, out)
