"""An update as a CUDA graph against the plain one. Without a GPU the graph is a tape, played on the CPU."""

from __future__ import annotations

import contextlib
import copy
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from parl_core.ops import accelerators, registry
from parl_core.rl import graphed_sac
from parl_core.rl.replay import Batch, ReplayBuffer
from parl_core.rl.sac import _UPDATE, SAC, SACConfig
from tests.host_reads import no_host_reads
from tests.rl.recorded import TapeRecorder

RECORDER = graphed_sac.Recorder


@pytest.fixture(autouse=True)
def recordings(device, monkeypatch):
    """How many graphs were recorded since the start of the test."""
    recorder = graphed_sac.Recorder if device.type == "cuda" else TapeRecorder
    counted = []

    class Counting(recorder):
        def record(self, *arguments):
            counted.append(1)
            return super().record(*arguments)

    monkeypatch.setattr(graphed_sac, "Recorder", Counting)
    return lambda: len(counted)


@pytest.fixture
def pair(device):
    """Two agents alike."""

    def make(**options) -> tuple[SAC, SAC]:
        config = SACConfig(hidden=(16, 16), **options)
        one, other = (SAC(5, 3, config, torch.Generator(device).manual_seed(1), device=device) for _ in range(2))
        return one, other

    return make


@pytest.fixture
def batch_of(device):
    """Batches as a replay buffer gives them: views of rows."""

    def make(seed: int, size: int = 32) -> Batch:
        rows = torch.randn(size, 15, generator=torch.Generator().manual_seed(1000 + seed)).to(device)
        observations, actions, others, next_observations = rows.split((5, 3, 2, 5), dim=1)
        actions.tanh_()
        others[:, 1] = (others[:, 1] > 0.8).to(rows.dtype)
        indices = torch.arange(size, device=device)
        return Batch(observations, actions, others[:, 0], next_observations, others[:, 1], indices)

    return make


def tensors(sac: SAC) -> dict[str, Tensor]:
    """Parameters with their gradients, targets, what Adam remembers, and the generator."""
    named = {"log_temperature": sac.log_temperature.detach(), "generator": sac.generator.get_state()}
    for which in ("actor", "critic", "target_critic"):
        named |= {f"{which}.{name}": value for name, value in getattr(sac, which).state_dict().items()}
    for number, param in enumerate(sac.learned_params()):
        if param.grad is not None:
            named[f"gradient.{number}"] = param.grad
    for which in ("actor_optimizer", "critic_optimizer"):
        for number, state in getattr(sac, which).state_dict()["state"].items():
            named |= {f"{which}.{number}.{name}": value for name, value in state.items()}
    return named


def assert_same(one: SAC | dict[str, Tensor], other: SAC | dict[str, Tensor]) -> None:
    """The very same on the CPU, where both compute by the same calls; on a GPU up to the libraries' choices."""
    found, expected = (tensors(each) if isinstance(each, SAC) else each for each in (one, other))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 2e-5 if value.is_cuda else 0.0
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_updates_are_those_of_torch(pair, batch_of, recordings, interval):
    graphed, plain = pair(target_update_interval=interval)
    for seed in range(9):
        batch = batch_of(seed)
        found, expected = graphed_sac.update(graphed, batch), plain.update(batch, backend="reference")
        assert_same(found, expected)
        assert_same(graphed, plain)
    assert graphed.num_updates == plain.num_updates == 9
    assert recordings() == (1 if interval == 1 else 2)


def test_an_update_asks_nothing_of_the_host(pair, batch_of):
    graphed, plain = pair()
    batch = batch_of(0)
    for _ in range(4):  # also the ones that run kernel by kernel, and those that record
        with no_host_reads():
            graphed_sac.update(graphed, batch)
            plain.step(batch, moves_targets=True)


def test_everything_is_on_the_agents_device(batch_of, monkeypatch):
    """Tensors without memory, on a device that is not the CPU: a number read or a tensor left on the CPU raises."""

    class Runner:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def run(self, body) -> None:
            body()

    monkeypatch.setattr(graphed_sac, "Recorder", Runner)
    monkeypatch.setattr(SAC, "_adam_options", lambda self: {"foreach": True})  # torch's fused one needs memory
    sac = SAC(5, 3, SACConfig(hidden=(16, 16)), torch.Generator(), device="meta")
    batch = Batch(*(part.to("meta") for part in batch_of(0)))
    for _ in range(2):  # with and without a move of the targets
        report = graphed_sac.update(sac, batch)
    assert {value.device.type for value in (*report.values(), *sac.learned_params())} == {"meta"}


def test_reports_are_not_overwritten(pair, batch_of):
    sac, _ = pair()
    reports = [graphed_sac.update(sac, batch_of(seed)) for seed in range(6)]
    losses = torch.stack([report["critic_loss"] for report in reports])
    assert len(losses.unique()) == 6 and losses.isfinite().all()


def test_graphs_and_plain_updates_take_turns(pair, batch_of, recordings):
    turns, plain = pair()
    for seed in range(16):
        batch = batch_of(seed)
        turns._reference_update(batch) if seed % 5 == 3 else graphed_sac.update(turns, batch)
        plain._reference_update(batch)
        assert_same(turns, plain)
    assert recordings() == 2


def move_parameters(sac):
    for param in sac.actor.parameters():
        param.data = param.data.clone()


def reload_optimizer(sac):
    sac.actor_optimizer.load_state_dict(copy.deepcopy(sac.actor_optimizer.state_dict()))


def reload(sac):
    sac.load_state_dict(copy.deepcopy(sac.state_dict()))


def learn_faster(sac):
    sac.actor_optimizer.param_groups[0]["lr"] = 1e-2


def decay(sac):
    sac.critic_optimizer.param_groups[0]["weight_decay"] = 0.1


def discount_more(sac):
    sac.config = SACConfig(hidden=(16, 16), discount=0.5)


def want_more_entropy(sac):
    sac.target_entropy = 1.0


def other_generator(sac):
    state = sac.generator.get_state()
    sac.generator = torch.Generator(sac.device)
    sac.generator.set_state(state)


def round_products(sac):
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.fixture
def matmul_precision():
    """As it was, after the test."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("matmul_precision")
@pytest.mark.parametrize(
    "change",
    [
        SAC.reset_critic,
        move_parameters,
        reload_optimizer,
        reload,
        learn_faster,
        decay,
        discount_more,
        want_more_entropy,
        other_generator,
        round_products,
    ],
)
def test_graphs_are_recorded_anew_when_what_they_hold_has_changed(pair, batch_of, recordings, change):
    graphed, plain = pair()
    for seed in range(12):
        batch = batch_of(seed)
        if seed == 6:
            for agent in (graphed, plain):
                change(agent)
        graphed_sac.update(graphed, batch)
        plain._reference_update(batch)
        assert_same(graphed, plain)
    assert recordings() == 4


def test_another_size_of_batch(pair, batch_of):
    graphed, plain = pair()
    for seed, size in enumerate((32, 32, 32, 7, 7, 7, 32, 32, 32)):
        graphed_sac.update(graphed, batch_of(seed, size))
        plain._reference_update(batch_of(seed, size))
        assert_same(graphed, plain)


def hook_actor(sac):
    sac.actor.network[0].register_forward_hook(lambda module, args, output: 0.5 * output)


def hook_parameter(sac):
    next(sac.critic.parameters()).register_hook(lambda gradient: 0.0 * gradient)


def hook_optimizer(sac):
    sac.steps = []
    sac.critic_optimizer.register_step_post_hook(lambda *_: sac.steps.append(sac.num_updates))


def schedule(sac):
    sac.scheduler = torch.optim.lr_scheduler.ExponentialLR(sac.critic_optimizer, 0.5)


@pytest.mark.parametrize("change", [hook_actor, hook_parameter, hook_optimizer, schedule])
def test_what_runs_on_the_host_keeps_the_plain_update(pair, batch_of, change):
    graphed, plain = pair()
    for seed in range(9):
        if seed == 5:
            for agent in (graphed, plain):
                change(agent)
        graphed_sac.update(graphed, batch_of(seed))
        plain._reference_update(batch_of(seed))
        assert_same(graphed, plain)
    assert change is not hook_optimizer or graphed.steps == plain.steps == [5, 6, 7, 8]


@pytest.fixture
def autocast():
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)


@pytest.fixture
def captured(monkeypatch):
    monkeypatch.setattr(graphed_sac, "is_capturing", lambda: True)


@pytest.mark.parametrize("state", ["autocast", "captured"])
def test_under_autocast_and_within_a_capture_updates_are_plain(pair, batch_of, recordings, request, state):
    graphed, plain = pair()
    request.getfixturevalue(state)
    for seed in range(5):
        graphed_sac.update(graphed, batch_of(seed))
        plain._reference_update(batch_of(seed))
        assert_same(graphed, plain)
    assert recordings() == 0


def test_a_loaded_agent_continues(pair, batch_of):
    graphed, other = pair()
    for seed in range(5):
        graphed_sac.update(graphed, batch_of(seed))
    state = copy.deepcopy(graphed.state_dict())
    for seed in range(3):
        graphed_sac.update(other, batch_of(20 + seed))
    other.load_state_dict(state)
    for seed in range(5, 10):
        graphed_sac.update(graphed, batch_of(seed))
        other._reference_update(batch_of(seed))
        assert_same(graphed, other)


def test_a_copied_agent_has_graphs_of_its_own(pair, batch_of):
    sac, _ = pair()
    for seed in range(4):
        graphed_sac.update(sac, batch_of(seed))
    twin = copy.deepcopy(sac)
    before = {name: value.clone() for name, value in tensors(sac).items()}
    for seed in range(4):
        graphed_sac.update(twin, batch_of(seed))
    assert_same(sac, before)


def test_the_state_of_another_type_of_device_is_refused(pair):
    sac, other = pair()
    state = other.state_dict() | {"generator": torch.zeros(3, dtype=torch.uint8)}
    before = copy.deepcopy(tensors(sac))
    with pytest.raises(ValueError, match=f"from an agent on a device of type {sac.device.type}: .* has 3 bytes"):
        sac.load_state_dict(state)
    assert_same(sac, before)


def test_a_batch_on_another_device_is_refused(pair, batch_of):
    sac, _ = pair()
    with pytest.raises(ValueError, match=f"batch must be on the agent's device, {sac.device}, got meta"):
        sac.update(Batch(*(part.to("meta") for part in batch_of(0))))


def test_graphs_are_the_best_on_a_gpu(monkeypatch):
    monkeypatch.setattr(accelerators, "_why_no_gpu", lambda: None)
    with FakeTensorMode():
        assert _UPDATE.select(torch.empty(3, device="cuda"), None) == "graph"
    assert _UPDATE.select(torch.empty(3), None) != "graph"
    assert "graph" in registry.available_backends()


def test_other_threads_are_no_part_of_a_recording(monkeypatch):
    modes = []

    class Graph:
        def register_generator_state(self, generator):
            pass

        def replay(self):
            pass

    @contextlib.contextmanager
    def graph(graph, *, stream, capture_error_mode):
        modes.append(capture_error_mode)
        yield

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(device=None))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    RECORDER(torch.device("cpu")).record(lambda: None, torch.Generator())
    assert modes == ["thread_local"]


@pytest.mark.gpu
def test_another_thread_may_ask_for_memory_while_a_graph_is_recorded(device):
    number, anew = torch.zeros((), device=device), []

    def body():
        worker = threading.Thread(target=lambda: anew.append(torch.empty(2**28, dtype=torch.uint8, device=device)))
        worker.start()
        worker.join()
        number.add_(1)

    RECORDER(device).record(body, torch.Generator(device))()
    assert number.item() == len(anew) == 1


@pytest.mark.gpu
def test_an_update_can_be_part_of_a_graph_of_the_callers(pair, batch_of):
    sac, plain = pair(target_update_interval=1)
    batch = batch_of(0)
    for agent in (sac, plain):
        agent.update(batch, backend="reference")
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(sac.generator)
    with torch.cuda.graph(graph):
        sac.update(batch)
    for _ in range(3):
        graph.replay()
        plain.update(batch, backend="reference")
        assert_same(sac, plain)


@pytest.mark.gpu
def test_on_a_gpu_nobody_waits(pair, device):
    """From the replay buffer to the report, with actions in between, and no number read but the action."""
    sac, plain = pair()
    replay = ReplayBuffer(100, 5, 3, device=device)
    rng = np.random.default_rng(0)
    for _ in range(80):
        replay.add(rng.normal(size=5), np.tanh(rng.normal(size=3)), rng.normal(), rng.normal(size=5), False)
    for _ in range(6):
        assert sac.act(np.ones(5)).shape == (3,)
        plain.act(np.ones(5))
        batch, same = (replay.sample(32, agent.generator) for agent in (sac, plain))
        torch.cuda.set_sync_debug_mode("error" if sac.num_updates >= 4 else "default")
        sac.update(batch)
        torch.cuda.set_sync_debug_mode("default")
        plain.update(same, backend="reference")
        assert_same(sac, plain)
