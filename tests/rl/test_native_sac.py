"""The native update and action against the plain ones in torch, which tests/rl/test_sac.py holds to a rewrite."""

from __future__ import annotations

import copy
from threading import Thread

import numpy as np
import pytest
import torch
from torch import Tensor

from parl_core.ops import backend
from parl_core.rl.replay import Batch, ReplayBuffer
from parl_core.rl.sac import SAC, SACConfig

native = pytest.importorskip("parl_core._native")


@pytest.fixture
def dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def random_batch(seed: int, size: int, obs_dim: int = 5, act_dim: int = 3) -> Batch:
    """As a replay buffer gives it: views of rows."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rows = torch.randn(size, 2 * obs_dim + act_dim + 2, generator=generator)
    observations, actions, others, next_observations = rows.split((obs_dim, act_dim, 2, obs_dim), dim=1)
    actions.tanh_()
    others[:, 1] = (others[:, 1] > 0.8).to(rows.dtype)
    return Batch(observations, actions, others[:, 0], next_observations, others[:, 1], torch.arange(size))


def pair(seed: int = 1, hidden: tuple[int, ...] = (16, 16), **options: float) -> tuple[SAC, SAC]:
    """Two agents alike."""
    config = SACConfig(hidden=hidden, **options)  # type: ignore[arg-type]
    one, other = (SAC(5, 3, config, torch.Generator().manual_seed(seed)) for _ in range(2))
    return one, other


def tensors(sac: SAC) -> dict[str, Tensor]:
    """Parameters, targets, temperature, and what Adam remembers."""
    named = {
        f"{which}.{name}": value
        for which in ("actor", "critic", "target_critic")
        for name, value in getattr(sac, which).state_dict().items()
    }
    named["log_temperature"] = sac.log_temperature.detach()
    for which in ("actor_optimizer", "critic_optimizer"):
        for number, state in getattr(sac, which).state_dict()["state"].items():
            named |= {f"{which}.{number}.{name}": value for name, value in state.items()}
    return named


def assert_same(one: SAC, other: SAC, tolerance: float) -> None:
    found, expected = tensors(one), tensors(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


SHAPES = [((), 5), ((33,), 7), ((16, 16), 32), ((20, 40, 30), 300), ((64, 64), 256)]


# Adam divides each gradient by its own size, so that the first steps in float32 magnify rounding of small gradients.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)], indirect=["dtype"])
@pytest.mark.parametrize(("hidden", "size"), SHAPES, ids=str)
def test_updates_are_those_of_torch(isa, threads, dtype, tolerance, hidden, size):
    fast, plain = pair(hidden=hidden)
    for seed in range(3):
        batch = random_batch(seed, size)
        found, expected = fast.update(batch, backend="cpp"), plain.update(batch, backend="reference")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=10 * tolerance, atol=10 * tolerance)
    assert fast.num_updates == plain.num_updates == 3
    assert_same(fast, plain, tolerance)
    assert torch.equal(fast.generator.get_state(), plain.generator.get_state())


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
def test_each_gradient_is_autograd(dtype):
    """After one update the gradients left behind are those of torch, relative to each one's largest entry."""
    fast, plain = pair(hidden=(40, 20))
    batch = random_batch(3, 64)
    fast.update(batch, backend="cpp")
    plain.update(batch, backend="reference")
    for module in ("actor", "critic"):
        for one, other in zip(getattr(fast, module).parameters(), getattr(plain, module).parameters(), strict=True):
            scale = other.grad.abs().max()
            assert scale > 0
            torch.testing.assert_close(one.grad / scale, other.grad / scale, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast.log_temperature.grad, plain.log_temperature.grad, rtol=1e-12, atol=0)


def test_a_hundred_updates_stay_close():
    fast, plain = pair(hidden=(32, 32), actor_learning_rate=1e-3, critic_learning_rate=1e-3)
    for seed in range(100):
        batch = random_batch(seed, 64)
        fast.update(batch, backend="cpp")
        plain.update(batch, backend="reference")
    start, _ = pair(hidden=(32, 32))
    for module in ("actor", "critic", "target_critic"):
        for one, other, first in zip(
            *(getattr(agent, module).parameters() for agent in (fast, plain, start)), strict=True
        ):
            moved = (other - first).norm()
            assert (one - other).norm() < 0.02 * moved, module


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
def test_the_two_take_turns(dtype):
    turns, plain = pair(hidden=(16, 16))
    for seed in range(8):
        batch = random_batch(seed, 32)
        turns.update(batch, backend="reference" if seed % 3 == 1 else "cpp")
        plain.update(batch, backend="reference")
        if seed == 4:  # as after a query session
            for agent in (turns, plain):
                agent.reset_critic()
    assert_same(turns, plain, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
def test_moved_tensors_are_found_again(dtype):
    fast, plain = pair()
    batch = random_batch(0, 32)
    for agent, name in ((fast, "cpp"), (plain, "reference")):
        agent.update(batch, backend=name)
        state = copy.deepcopy(agent.state_dict())
        agent.update(batch, backend=name)
        agent.load_state_dict(state)
        agent.update(batch, backend=name)
        for param in agent.actor.parameters():
            param.data = param.data.clone()
        agent.actor_optimizer.load_state_dict(copy.deepcopy(agent.actor_optimizer.state_dict()))
        agent.update(batch, backend=name)
        agent.actor_optimizer.param_groups[0]["lr"] = 1e-2
        agent.update(batch, backend=name)
    assert_same(fast, plain, 1e-10)
    twin = copy.deepcopy(fast)
    before = copy.deepcopy(tensors(fast))
    twin.update(batch, backend="cpp")
    assert all(torch.equal(before[name], value) for name, value in tensors(fast).items())


def test_bit_identical_for_a_thread_count(threads):
    one, other = pair(hidden=(128, 128))
    for seed in range(3):
        batch = random_batch(seed, 256)
        one.update(batch, backend="cpp")
        other.update(batch, backend="cpp")
    assert_same(one, other, 0.0)


def test_nan_in_nan_out():
    sac, _ = pair()
    batch = random_batch(0, 32)
    batch.rewards[3] = torch.nan
    report = sac.update(batch, backend="cpp")
    assert report["critic_loss"].isnan()
    assert all(param.isnan().any() for param in sac.critic.parameters())


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
def test_equal_values_share_the_gradient(dtype):
    """Twin critics alike to the last bit: torch.minimum gives each half."""
    fast, plain = pair()
    for agent in (fast, plain):
        with torch.no_grad():
            for param in (*agent.critic.parameters(), *agent.target_critic.parameters()):
                param[1] = param[0]
    batch = random_batch(0, 32)
    fast.update(batch, backend="cpp")
    plain.update(batch, backend="reference")
    assert_same(fast, plain, 1e-10)


def test_the_backend_context_decides(monkeypatch):
    sac, _ = pair(hidden=(4,) * 20)  # more layers than the kernel takes
    sac.update(random_batch(0, 32))
    sac, _ = pair()
    monkeypatch.setattr(native, "SacFloat32", lambda *_: pytest.fail("the native update was taken"))
    monkeypatch.setattr(native, "Actor", lambda *_: pytest.fail("the native action was taken"))
    with backend("reference"):
        sac.update(random_batch(0, 32))
        sac.act(np.zeros(5))


@pytest.mark.parametrize("hidden", [(), (33,), (64, 64), (7, 100)], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_actions_are_those_of_torch(isa, hidden, deterministic):
    fast, plain = pair(hidden=hidden)
    for seed in range(20):
        observation = np.random.default_rng(seed).normal(size=5) * 3
        found = fast.act(observation, deterministic=deterministic)
        with backend("reference"):
            expected = plain.act(observation, deterministic=deterministic)
        assert found.dtype == np.float32 and found.shape == (3,)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    assert torch.equal(fast.generator.get_state(), plain.generator.get_state())


@pytest.mark.parametrize("name", ["cpp", "reference"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_of_observations_give_rows_of_actions(isa, name, deterministic):
    sac, other = pair(hidden=(33, 20))
    observations = np.random.default_rng(0).normal(size=(6, 5)) * 3
    with backend(name):
        found = sac.act(observations, deterministic=deterministic)
        assert found.dtype == np.float32 and found.shape == (6, 3)
        # One row draws what a single observation draws.
        assert np.array_equal(
            sac.act(observations[:1], deterministic=deterministic)[0],
            _after(other, observations, deterministic).act(observations[0], deterministic=deterministic),
        )
        if deterministic:
            expected = np.stack([sac.act(observation, deterministic=True) for observation in observations])
            np.testing.assert_allclose(found, expected, rtol=0, atol=0 if name == "cpp" else 2e-6)
    with backend("reference"):
        np.testing.assert_allclose(found, pair(hidden=(33, 20))[0].act(observations, deterministic=deterministic),
                                   rtol=0, atol=2e-6)  # fmt: skip


def _after(sac: SAC, observations: np.ndarray, deterministic: bool) -> SAC:
    """An agent that has acted once on all of these."""
    sac.act(observations, deterministic=deterministic)
    return sac


def test_an_action_sees_the_latest_parameters():
    sac, _ = pair()
    observation = np.ones(5)
    before = sac.act(observation, deterministic=True)
    sac.update(random_batch(0, 32))
    updated = sac.act(observation, deterministic=True)
    assert not np.array_equal(before, updated)
    for param in sac.actor.parameters():
        param.data = torch.zeros_like(param)
    assert np.array_equal(sac.act(observation, deterministic=True), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"observation must be of shape \(5,\) or \(n, 5\), got \(4,\)"):
        sac.act(np.ones(4))
    with pytest.raises(ValueError, match=r"\(n, 5\), got \(2, 4\)"):
        sac.act(np.ones((2, 4)))


def test_a_batch_that_does_not_fit_is_named():
    sac, _ = pair()
    good = random_batch(0, 32)
    for changes, error, message in [
        ({"observations": torch.zeros(32, 4)}, ValueError, r"observations must be of shape \(32, 5\), got"),
        ({"actions": torch.zeros(32, 3).double()}, TypeError, "actions must have the dtype of the networks"),
        ({"rewards": torch.zeros(32, 1)}, ValueError, r"rewards must be of shape \(32,\)"),
        ({"rewards": torch.zeros(())}, ValueError, r"observations must be of shape \(1, 5\)"),
        ({"rewards": None}, TypeError, "rewards must be a Tensor, got NoneType"),
        ({"terminated": np.zeros(32)}, TypeError, "terminated must be a Tensor, got numpy.ndarray"),
        ({"next_observations": torch.zeros(5, 32).T}, ValueError, "next_observations must have contiguous rows"),
        ({"terminated": torch.zeros(31)}, ValueError, r"terminated must be of shape \(32,\)"),
    ]:
        with pytest.raises(error, match=message):
            sac.update(good._replace(**changes), backend="cpp")
    assert sac.num_updates == 0


def test_replayed_rows_need_no_copy():
    """What `ReplayBuffer.sample` returns is updated on as it is, and as its contiguous copy is."""
    replay = ReplayBuffer(100, 5, 3)
    rng = np.random.default_rng(0)
    for _ in range(80):
        replay.add(
            rng.normal(size=5), np.tanh(rng.normal(size=3)), rng.normal(), rng.normal(size=5), rng.random() < 0.1
        )
    views = replay.sample(32, torch.Generator().manual_seed(0))
    copies = Batch(*(tensor.contiguous() for tensor in views))
    one, other = pair()
    one.update(views, backend="cpp")
    other.update(copies, backend="cpp")
    assert_same(one, other, 0.0)


def test_threads_take_turns_with_one_agent():
    """Batches of sizes that differ by far, so that memory changes hands at every update."""
    sac, _ = pair(hidden=(256, 256))
    sac.update(random_batch(0, 8), backend="cpp")
    kernel = sac.native.updater._kernel
    rule = native.SacRule(0.99, 0.005, True, -3.0, 1e-3, 1e-3, 1e-3, 0.9, 0.999, 1e-8)
    reports = []

    def run(size: int, threads: int) -> None:
        batch, noise = random_batch(size, size), torch.zeros(size, 3)
        for _ in range(20):
            reports.append(kernel.update(batch, noise, noise, rule, threads))

    runs = [Thread(target=run, args=arguments) for arguments in ((8, 1), (1024, 2), (9, 1))]
    for each in runs:
        each.start()
    for each in runs:
        each.join()
    assert len(reports) == 60 and np.isfinite(reports).all()
    (step,) = {int(state["step"]) for state in sac.critic_optimizer.state.values()}
    assert step == 61
    with pytest.raises(ValueError, match="num_threads must be 1 to 1024, got -1"):
        kernel.update(random_batch(0, 8), torch.zeros(8, 3), torch.zeros(8, 3), rule, -1)


def test_a_transposed_weight_is_refused():
    first, last = torch.zeros(5, 3), torch.zeros(4, 5)
    native.Actor([first, torch.zeros(5), last, torch.zeros(4)])
    for params, message in [
        ([first.T.contiguous(), torch.zeros(5), last, torch.zeros(4)], r"\(5, 3\), got torch.Size\(\[3, 5\]\)"),
        ([first, torch.zeros(5), last.T.contiguous(), torch.zeros(4)], r"\(4, 5\), got torch.Size\(\[5, 4\]\)"),
        ([first, torch.zeros(1, 5), last, torch.zeros(4)], r"\(5,\), got torch.Size\(\[1, 5\]\)"),
    ]:
        with pytest.raises(ValueError, match="params must be of shape " + message):
            native.Actor(params)


def slower_critic(sac):
    sac.critic_optimizer.param_groups[0]["betas"] = (0.5, 0.9)


def coarser_temperature(sac):
    sac.actor_optimizer.param_groups[1]["eps"] = 1e-2


def decayed(sac):
    sac.critic_optimizer.param_groups[0]["weight_decay"] = 0.1


def maximized(sac):
    sac.actor_optimizer.param_groups[0]["maximize"] = True


def tanh_actor(sac):
    sac.actor.network[1] = torch.nn.Tanh()


def hooked_actor(sac):
    sac.actor.network[0].register_forward_hook(lambda module, args, output: 0.5 * output)


def hooked_critic(sac):
    sac.critic.layers[0].register_forward_hook(lambda module, args, output: 0.5 * output)


def hooked_parameter(sac):
    next(sac.critic.parameters()).register_hook(lambda gradient: 0.0 * gradient)


CHANGES = [
    slower_critic,
    coarser_temperature,
    decayed,
    maximized,
    tanh_actor,
    hooked_actor,
    hooked_critic,
    hooked_parameter,
]


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_networks_and_optimisers_are_followed(dtype, change):
    changed, plain = pair()
    batch = random_batch(0, 32)
    changed.update(batch)  # the change comes when the kernels are already bound
    plain.update(batch, backend="reference")
    for agent in (changed, plain):
        change(agent)
    for seed in range(3):
        changed.update(random_batch(seed, 32))
        plain.update(random_batch(seed, 32), backend="reference")
    assert_same(changed, plain, 1e-10)


@pytest.mark.parametrize("change", [tanh_actor, hooked_actor])
def test_an_action_follows_a_changed_actor(change):
    sac, plain = pair()
    observation = np.ones(5)
    before = sac.act(observation, deterministic=True)
    for agent in (sac, plain):
        change(agent)
    with backend("reference"):
        expected = plain.act(observation, deterministic=True)
    found = sac.act(observation, deterministic=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    assert not np.allclose(found, before, rtol=0, atol=1e-3)


def test_a_frozen_or_replaced_actor_is_refused_as_in_torch():
    sac, other = pair()
    sac.update(random_batch(0, 32))
    sac.actor.network[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):
        sac.update(random_batch(0, 32))
    sac, _ = pair()
    observation = np.ones(5)
    sac.act(observation, deterministic=True)
    sac.actor = copy.deepcopy(other.actor)
    with torch.no_grad():
        sac.actor.network[-1].bias += 1.0
    assert np.array_equal(
        sac.act(observation, deterministic=True), copy.deepcopy(sac).act(observation, deterministic=True)
    )
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        sac.update(random_batch(0, 32))


def test_another_default_dtype_later_changes_nothing():
    sac, plain = pair()
    observation, batch = np.ones(5), random_batch(0, 32)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = sac.act(observation)
        with backend("reference"):
            expected = plain.act(observation)
        sac.update(batch)
        plain.update(batch, backend="reference")
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    assert_same(sac, plain, 2e-5)
