"""Soft actor-critic: one update against a plain rewrite, identical continuation, and that it learns."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from parl_core.models.mlp import BatchedLinear
from parl_core.rl.replay import Batch, ReplayBuffer
from parl_core.rl.sac import SAC, SACConfig

SMALL = SACConfig(hidden=(16, 16), batch_size=32, target_update_interval=2)


def make(seed: int = 0, config: SACConfig = SMALL) -> SAC:
    return SAC(3, 2, config, torch.Generator().manual_seed(seed))


def random_batch(seed: int, size: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    states, next_states = torch.randn(2, size, 3, generator=generator)
    actions = 2 * torch.rand(size, 2, generator=generator) - 1
    rewards = torch.randn(size, generator=generator)
    terminated = (torch.rand(size, generator=generator) < 0.3).float()
    return Batch(states, actions, rewards, next_states, terminated, torch.arange(size))


def parameters(sac: SAC) -> list[Tensor]:
    modules = (sac.actor, sac.critic, sac.target_critic)
    return [p.detach() for module in modules for p in module.parameters()] + [sac.log_temperature.detach()]


def test_initial_weights_are_orthogonal_biases_zero_and_the_seed_decides():
    sac = make()
    for module in (*sac.actor.modules(), *sac.critic.modules()):
        if isinstance(module, nn.Linear | BatchedLinear):
            assert not module.bias.any()
            for weight in module.weight.detach().reshape(-1, *module.weight.shape[-2:]):
                tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
                torch.testing.assert_close(tall.T @ tall, torch.eye(tall.shape[1]), atol=1e-5, rtol=0)
    first, second = next(sac.critic.parameters())
    assert not torch.allclose(first, second)
    torch.manual_seed(99)  # the global generator has no say
    assert all(torch.equal(a, b) for a, b in zip(parameters(sac), parameters(make()), strict=True))
    assert sac.temperature == pytest.approx(0.1)


def q_values(layers: list[tuple[Tensor, Tensor]], observations: Tensor, actions: Tensor) -> Tensor:
    values = torch.cat((observations, actions), 1)
    for weight, bias in layers[:-1]:
        values = torch.relu(values @ weight + bias)
    return (values @ layers[-1][0] + layers[-1][1]).squeeze(1)


def split_members(critic: nn.Module) -> list[list[tuple[Tensor, Tensor]]]:
    params = [p.detach().clone() for p in critic.parameters()]
    return [
        [
            (w[m].clone().requires_grad_(), b[m].clone().requires_grad_())
            for w, b in zip(params[::2], params[1::2], strict=True)
        ]
        for m in range(2)
    ]


def test_one_update_against_a_plain_rewrite():
    """The textbook, with separate critics and one loss at a time; in two updates the targets move once."""
    config = SMALL
    sac, batch = make(), random_batch(1)
    actor = copy.deepcopy(sac.actor)
    critics, targets = split_members(sac.critic), split_members(sac.target_critic)
    log_alpha = torch.tensor(math.log(0.1), requires_grad=True)
    flat = [tensor for critic in critics for pair in critic for tensor in pair]
    critic_adam = torch.optim.Adam(flat, lr=config.critic_learning_rate)
    actor_adam = torch.optim.Adam(actor.parameters(), lr=config.actor_learning_rate)
    alpha_adam = torch.optim.Adam([log_alpha], lr=config.temperature_learning_rate)
    generator = torch.Generator()
    generator.set_state(sac.generator.get_state())

    for _ in range(2):
        logged = sac.update(batch)
        alpha = log_alpha.exp().item()
        with torch.no_grad():
            next_actions, next_log_prob = actor.sample(batch.next_observations, generator)
            q = torch.minimum(*(q_values(t, batch.next_observations, next_actions) for t in targets))
            y = batch.rewards + 0.99 * (1 - batch.terminated) * (q - alpha * next_log_prob)
        q_both = torch.stack([q_values(c, batch.observations, batch.actions) for c in critics])
        critic_loss = ((q_both - y) ** 2).mean(1).sum()
        critic_adam.zero_grad()
        critic_loss.backward()
        critic_adam.step()
        actions, log_prob = actor.sample(batch.observations, generator)
        q = torch.minimum(*(q_values(c, batch.observations, actions) for c in critics))
        actor_loss = (alpha * log_prob - q).mean()
        actor_adam.zero_grad()
        actor_loss.backward()
        actor_adam.step()
        alpha_loss = (log_alpha.exp() * (-log_prob - (-2.0)).detach()).mean()
        alpha_adam.zero_grad()
        alpha_loss.backward()
        alpha_adam.step()
        assert logged["critic_loss"].item() == pytest.approx(critic_loss.item(), rel=1e-5)
        assert logged["actor_loss"].item() == pytest.approx(actor_loss.item(), rel=1e-5)
        assert logged["entropy"].item() == pytest.approx(-log_prob.mean().item(), rel=1e-5)
        assert logged["temperature"].item() == pytest.approx(alpha, rel=1e-6)
    with torch.no_grad():
        for critic, target in zip(critics, targets, strict=True):
            for pair, target_pair in zip(critic, target, strict=True):
                for source, moved in zip(pair, target_pair, strict=True):
                    moved += 0.005 * (source - moved)

    def close(module: nn.Module, members: list[list[tuple[Tensor, Tensor]]]) -> None:
        for batched, *separate in zip(module.parameters(), *([t for p in m for t in p] for m in members), strict=True):
            torch.testing.assert_close(batched.detach(), torch.stack(separate).detach(), rtol=1e-4, atol=1e-6)

    close(sac.critic, critics)
    close(sac.target_critic, targets)
    for mine, plain in zip(sac.actor.parameters(), actor.parameters(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sac.log_temperature, log_alpha, rtol=1e-6, atol=0)


def test_the_actor_step_leaves_no_gradient_at_the_critics():
    sac = make()
    before = [p.detach().clone() for p in sac.critic.parameters()]
    sac.update(random_batch(1))
    critic_gradients = [p.grad.clone() for p in sac.critic.parameters() if p.grad is not None]
    assert len(critic_gradients) == len(before)
    assert all(p.grad is None for p in sac.target_critic.parameters())
    # Adam's first step is lr·sign(gradient) wherever the gradient is not tiny: that of the critic loss alone.
    for old, new, gradient in zip(before, sac.critic.parameters(), critic_gradients, strict=True):
        large = gradient.abs() > 1e-4
        torch.testing.assert_close((new - old)[large], -3e-4 * gradient.sign()[large], rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_targets_remember_no_graph(backend):
    sac = make()
    for seed in range(4):
        sac.update(random_batch(seed), backend=backend)
    assert not any(param.requires_grad or param.grad_fn for param in sac.target_critic.parameters())
    copy.deepcopy(sac).update(random_batch(4), backend=backend)


def test_resetting_the_critic_keeps_actor_and_temperature():
    sac = make()
    for seed in range(3):
        sac.update(random_batch(seed))
    before = copy.deepcopy(sac.state_dict())
    sac.reset_critic()
    after = sac.state_dict()
    for name in ("actor", "target_critic", "critic"):
        same = all(torch.equal(before[name][key], after[name][key]) for key in before[name])
        assert same == (name == "actor")
    assert all(torch.equal(after["critic"][key], after["target_critic"][key]) for key in after["critic"])
    assert torch.equal(before["log_temperature"], after["log_temperature"])
    assert after["critic_optimizer"]["state"] == {}
    assert len(after["actor_optimizer"]["state"]) == len(list(sac.actor.parameters())) + 1
    fresh = copy.deepcopy(after["critic"])
    sac.update(random_batch(5))  # the new optimiser moves the critic that is there now
    after = sac.critic.state_dict()
    assert not torch.equal(fresh["layers.0.weight"], after["layers.0.weight"])


@pytest.mark.parametrize("num_updates", [0, 3])
def test_a_loaded_agent_continues_bit_for_bit(num_updates):
    sac, other = make(0), make(1)
    other.update(random_batch(9))
    for seed in range(num_updates):
        sac.update(random_batch(seed))
    state = sac.state_dict()
    snapshot = copy.deepcopy(state)
    other.load_state_dict(state)
    observation = np.ones(3, np.float32)
    for seed in range(10, 14):
        one, two = sac.update(random_batch(seed)), other.update(random_batch(seed))
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert np.array_equal(sac.act(observation), other.act(observation))
    assert all(torch.equal(a, b) for a, b in zip(parameters(sac), parameters(other), strict=True))
    other.load_state_dict(snapshot)
    assert other.num_updates == num_updates


def test_actions():
    sac = make()
    observation = np.array([0.1, -2.0, 3.0], dtype=np.float64)
    action = sac.act(observation, deterministic=True)
    assert action.dtype == np.float32 and action.shape == (2,)
    expected = sac.actor.mode(torch.tensor(observation, dtype=torch.float32).unsqueeze(0))
    torch.testing.assert_close(torch.from_numpy(action), expected[0].detach())
    twin = make()
    sampled = np.stack([sac.act(observation) for _ in range(5)])
    assert np.abs(sampled).max() <= 1 and len(np.unique(sampled[:, 0])) == 5
    noise_source = twin.generator
    with torch.no_grad():
        same = [twin.actor.sample(torch.tensor(observation).float().unsqueeze(0), noise_source)[0] for _ in range(5)]
    torch.testing.assert_close(torch.from_numpy(sampled), torch.cat(same))


class PointMass:
    """x' = x + v/10, v' = v + a/10, reward −x² − v²/10; from x in [−1, 1] at rest, 50 steps."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def reset(self) -> np.ndarray:
        self.state = np.array([self.rng.uniform(-1, 1), 0.0], np.float32)
        return self.state

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float]:
        x, v = self.state
        self.state = np.array([x + 0.1 * v, v + 0.1 * action[0]], np.float32)
        return self.state, float(-(x**2) - 0.1 * v**2)


def mean_return(act, episodes: int = 30) -> float:
    env, total = PointMass(seed=100), 0.0
    for _ in range(episodes):
        observation = env.reset()
        for _ in range(50):
            observation, reward = env.step(act(observation))
            total += reward
    return total / episodes


def test_it_learns_to_hold_a_point_mass():
    config = SACConfig(hidden=(32, 32), batch_size=64, actor_learning_rate=1e-3, critic_learning_rate=1e-3)
    generator = torch.Generator().manual_seed(0)
    sac, replay, env = SAC(2, 1, config, generator), ReplayBuffer(10_000, 2, 1), PointMass(0)
    rng = np.random.default_rng(0)
    for episode in range(60):
        observation = env.reset()
        for _ in range(50):
            action = rng.uniform(-1, 1, 1) if episode < 10 else sac.act(observation)
            next_observation, reward = env.step(action)
            replay.add(observation, action, reward, next_observation, False)
            observation = next_observation
            if episode >= 10:
                sac.update(replay.sample(config.batch_size, generator))
    learned = mean_return(lambda observation: sac.act(observation, deterministic=True))
    random = mean_return(lambda _: rng.uniform(-1, 1, 1))
    idle = mean_return(lambda _: np.zeros(1))
    assert learned > 0.5 * idle > random / 2, (learned, idle, random)
