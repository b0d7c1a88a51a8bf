"""PEBBLE as it is commonly written: SAC in one file, a list of reward networks, and NumPy around them, all of it eager.

Modules, distributions and optimisers are torch's own, used in the plain way; networks, batches and schedules are whatever
the configuration says, as are the numbers of updates, labels and epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parl_core.envs.interface import Environment
from parl_core.training.config import TrainConfig

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
POOL_RATIO, RELABEL_CHUNK = 10, 1000
Query = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Two segments: the inputs (L, do + da) and the true rewards (L,) of each."""


def mlp(sizes: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers with an activation between any two."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """A Gaussian squashed by tanh."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.body = mlp((obs_dim, *hidden), nn.ReLU)
        self.mean, self.log_std = nn.Linear(hidden[-1], act_dim), nn.Linear(hidden[-1], act_dim)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        values = F.relu(self.body(observations))
        log_std = torch.tanh(self.log_std(values))
        return self.mean(values), LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (log_std + 1)

    def sample(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self(observations)
        normal = torch.distributions.Normal(mean, log_std.exp())
        raw = normal.rsample()
        action = torch.tanh(raw)
        log_prob = normal.log_prob(raw) - torch.log(1 - action.pow(2) + 1e-6)
        return action, log_prob.sum(1, keepdim=True)


class Critic(nn.Module):
    """One action-value network."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.net = mlp((obs_dim + act_dim, *hidden, 1), nn.ReLU)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat([observations, actions], 1))


class Replay:
    """Arrays that are written in turn."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int) -> None:
        self.observations, self.next_observations = (np.zeros((capacity, obs_dim), np.float32) for _ in range(2))
        self.actions = np.zeros((capacity, act_dim), np.float32)
        self.rewards, self.terminated = (np.zeros((capacity, 1), np.float32) for _ in range(2))
        self.size = self.position = 0

    def add(self, observation: Any, action: Any, reward: float, next_observation: Any, terminated: bool) -> None:
        row = self.position
        self.observations[row], self.actions[row], self.rewards[row] = observation, action, reward
        self.next_observations[row], self.terminated[row] = next_observation, terminated
        self.position = (row + 1) % len(self.rewards)
        self.size = max(self.size, row + 1)

    def sample(self, batch_size: int) -> list[Tensor]:
        rows = np.random.randint(0, self.size, batch_size)
        arrays = self.observations, self.actions, self.rewards, self.next_observations, self.terminated
        return [torch.as_tensor(array[rows]) for array in arrays]


class PreferenceLoop:
    """PEBBLE without its exploration phase: the first session follows the random actions."""

    def __init__(self, config: TrainConfig, env: Environment, eval_env: Environment, first_labels: int) -> None:
        self.config, self.env, self.eval_env, self.first_labels = config, env, eval_env, first_labels
        sac, sizes = config.sac, (env.obs_dim, env.act_dim)
        np.random.seed(config.seed)
        torch.manual_seed(config.seed)
        self.actor = Actor(*sizes, sac.hidden)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=sac.actor_learning_rate)
        self.reset_critics()
        self.log_alpha = torch.tensor(np.log(sac.initial_temperature), dtype=torch.float32, requires_grad=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=sac.temperature_learning_rate)
        self.members = [
            nn.Sequential(mlp((sum(sizes), *config.reward.hidden, 1), nn.LeakyReLU), nn.Tanh())
            for _ in range(config.reward.members)
        ]
        params = chain.from_iterable(member.parameters() for member in self.members)
        self.reward_optimizer = torch.optim.Adam(params, lr=config.reward.learning_rate)
        self.replay = Replay(100_000, *sizes)
        self.episodes: list[tuple[np.ndarray, np.ndarray]] = []
        self.current: list[tuple[np.ndarray, float]] = []
        self.queries: list[Query] = []
        self.labels: list[int] = []
        self.steps = self.updates = self.sessions = self.epochs = self.evaluations = 0
        self.observation = env.reset()

    def reset_critics(self) -> None:
        sac, sizes = self.config.sac, (self.env.obs_dim, self.env.act_dim)
        self.critics = [Critic(*sizes, sac.hidden) for _ in range(2)]
        self.targets = [Critic(*sizes, sac.hidden) for _ in range(2)]
        for critic, target in zip(self.critics, self.targets, strict=True):
            target.load_state_dict(critic.state_dict())
        params = chain.from_iterable(critic.parameters() for critic in self.critics)
        self.critic_optimizer = torch.optim.Adam(params, lr=sac.critic_learning_rate)

    def advance(self, until: int) -> None:
        config = self.config
        while self.steps < until:
            if self.steps < config.random_steps:
                action = np.random.uniform(-1, 1, self.env.act_dim).astype(np.float32)
            else:
                with torch.no_grad():
                    action = self.actor.sample(torch.as_tensor(self.observation).unsqueeze(0))[0].numpy()[0]
            step = self.env.step(action)
            inputs = np.concatenate([self.observation, action])
            self.replay.add(self.observation, action, self.reward(inputs[None])[0], step.observation, step.terminated)
            self.current.append((inputs, step.reward))
            self.observation = step.observation
            self.steps += 1
            if step.terminated or step.truncated:
                self.episodes.append((np.array([i for i, _ in self.current]), np.array([r for _, r in self.current])))
                self.episodes, self.current = self.episodes[-config.reward.pool_episodes :], []
                self.observation = self.env.reset()
            if self.steps > config.random_steps:
                self.update()
            if self.steps >= config.random_steps and not self.steps % config.reward.session_interval:
                self.session()
            if not self.steps % config.eval_interval:
                self.evaluate()

    def update(self) -> None:
        sac = self.config.sac
        observations, actions, rewards, next_observations, terminated = self.replay.sample(sac.batch_size)
        alpha = self.log_alpha.exp().item()
        with torch.no_grad():
            next_actions, next_log_prob = self.actor.sample(next_observations)
            next_values = torch.min(*(target(next_observations, next_actions) for target in self.targets))
            wanted = rewards + (1 - terminated) * sac.discount * (next_values - alpha * next_log_prob)
        critic_loss = sum(F.mse_loss(critic(observations, actions), wanted) for critic in self.critics)
        assert isinstance(critic_loss, Tensor)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()

        new_actions, log_prob = self.actor.sample(observations)
        values = torch.min(*(critic(observations, new_actions) for critic in self.critics))
        actor_loss = (alpha * log_prob - values).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()

        alpha_loss = (-self.log_alpha.exp() * (log_prob.detach() - self.env.act_dim)).mean()
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()

        self.updates += 1
        if self.updates % sac.target_update_interval == 0:
            for critic, target in zip(self.critics, self.targets, strict=True):
                for param, slow in zip(critic.parameters(), target.parameters(), strict=True):
                    slow.data.copy_(sac.polyak * param.data + (1 - sac.polyak) * slow.data)

    def reward(self, inputs: np.ndarray) -> np.ndarray:
        """(n, do + da) -> (n,), the mean over the members."""
        with torch.no_grad():
            return torch.stack([member(torch.as_tensor(inputs)) for member in self.members]).mean(0).numpy()[:, 0]

    def session(self) -> None:
        first = self.sessions == 0
        count = self.first_labels if first else self.config.reward.labels_per_session
        queries = [(self.segment(), self.segment()) for _ in range(count if first else POOL_RATIO * count)]
        if not first:
            with torch.no_grad():
                probs = torch.stack([torch.softmax(self.returns(m, queries), 1)[:, 1] for m in self.members])
            queries = [queries[index] for index in probs.std(0).topk(count).indices]
        self.queries += queries
        self.labels += [int(second.sum() > first.sum()) for (_, first), (_, second) in queries]
        self.fit()
        for start in range(0, self.replay.size, RELABEL_CHUNK):
            rows = slice(start, min(start + RELABEL_CHUNK, self.replay.size))
            inputs = np.concatenate([self.replay.observations[rows], self.replay.actions[rows]], axis=1)
            self.replay.rewards[rows, 0] = self.reward(inputs)
        self.sessions += 1
        if first:
            self.reset_critics()
            for _ in range(self.config.updates_after_reset):
                self.update()

    def segment(self) -> tuple[np.ndarray, np.ndarray]:
        inputs, rewards = self.episodes[np.random.randint(len(self.episodes))]
        length = self.config.reward.segment_length
        start = np.random.randint(len(rewards) - length + 1)
        return inputs[start : start + length], rewards[start : start + length]

    def returns(self, member: nn.Module, queries: Sequence[Query]) -> Tensor:
        """(M, 2), what a member makes of both segments."""
        inputs = torch.as_tensor(np.stack([[first, second] for (first, _), (second, _) in queries]))
        return member(inputs).sum(2).squeeze(-1)

    def fit(self) -> None:
        config = self.config.reward
        for _ in range(config.max_epochs):
            orders = [np.random.permutation(len(self.labels)) for _ in self.members]
            correct = 0
            for start in range(0, len(self.labels), config.batch_size):
                losses = []
                for member, order in zip(self.members, orders, strict=True):
                    rows = order[start : start + config.batch_size]
                    labels = torch.tensor([self.labels[row] for row in rows])
                    logits = self.returns(member, [self.queries[row] for row in rows])
                    losses.append(F.cross_entropy(logits, labels))
                    correct += int((logits.argmax(1) == labels).sum())
                self.reward_optimizer.zero_grad()
                sum(losses, torch.zeros(())).backward()
                self.reward_optimizer.step()
            self.epochs += 1
            if correct / len(self.labels) / len(self.members) > config.accuracy_target:
                return

    def evaluate(self) -> None:
        for _ in range(self.config.eval_episodes):
            observation, done = self.eval_env.reset(), False
            while not done:
                with torch.no_grad():
                    mean, _ = self.actor(torch.as_tensor(observation).unsqueeze(0))
                step = self.eval_env.step(torch.tanh(mean).numpy()[0])
                observation, done = step.observation, step.terminated or step.truncated
        self.evaluations += 1
