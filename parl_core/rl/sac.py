"""Soft actor-critic (Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications").

How it differs from the paper and from its usual implementations:

1. The twin critics are one module with batched weights, so that both cost one matrix product a layer.
2. The standard deviation's logarithm is rescaled by tanh into [−5, 2], not clipped; weights start orthogonal
   and biases at zero, in actor and critics, as in PEBBLE (Lee, Smith and Abbeel 2021).
3. The temperature's gradient is written out: d/d(log α) of α·(H − H̄) is α·(H − H̄) itself.
4. Gradients are taken for the parameters that a step changes and for no others.

On the CPU an update is one native call, on a GPU the launch of one CUDA graph. `SAC.step` says what they compute.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.mlp import BatchedLinear
from ..models.policies import GaussianPolicy
from ..ops.registry import Op
from .native_sac import NativeCache
from .replay import Batch


@dataclass(frozen=True)
class SACConfig:
    """Hyperparameters of `SAC`."""

    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers, of actor and critics alike."""
    batch_size: int = 256
    """Transitions in one update."""
    actor_learning_rate: float = 3e-4
    """Adam's, for the actor."""
    critic_learning_rate: float = 3e-4
    """Adam's, for the critics."""
    temperature_learning_rate: float = 1e-4
    """Adam's, for the logarithm of the temperature."""
    initial_temperature: float = 0.1
    """α before the first update: the weight of the policy's entropy in the objective."""
    discount: float = 0.99
    """γ."""
    polyak: float = 0.005
    """How far the target critics move towards the critics, each time they do."""
    target_update_interval: int = 2
    """Updates between two moves of the target critics."""


class TwinCritic(nn.Module):
    """Two action-value networks of one shape."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        sizes = (obs_dim + act_dim, *hidden, 1)
        self.layers = nn.ModuleList(BatchedLinear(2, a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """(B, do), (B, da) -> (2, B)."""
        values = torch.cat((observations, actions), dim=-1).expand(2, -1, -1)
        for layer in self.layers[:-1]:
            values = F.relu(layer(values))
        return self.layers[-1](values).squeeze(-1)


class SAC:
    """An actor, twin critics with their targets, and a temperature, trained off-policy.

    Args:
        obs_dim, act_dim: sizes of an observation and an action; actions lie in [−1, 1].
        config: hyperparameters.
        generator: draws the initial weights and all exploration noise, on `device`.
        device: where everything lives; None: where the generator draws.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        config: SACConfig,
        generator: torch.Generator,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        device = generator.device if device is None else torch.device(device)
        self.config, self.generator = config, generator
        self.target_entropy = -float(act_dim)
        actor = GaussianPolicy(obs_dim, act_dim, config.hidden, activation="relu", log_std="state", squash=True)
        self.actor = actor.to(device)
        self.critic = TwinCritic(obs_dim, act_dim, config.hidden).to(device)
        self.target_critic = TwinCritic(obs_dim, act_dim, config.hidden).requires_grad_(False).to(device)
        self.log_temperature = torch.tensor(math.log(config.initial_temperature), device=device, requires_grad=True)
        self.num_updates = 0
        self.native = NativeCache()

        _initialize(self.actor, generator)
        self._actor_params: list[Tensor] = list(self.actor.parameters())
        self.actor_optimizer = torch.optim.Adam(
            [
                {"params": self._actor_params, "lr": config.actor_learning_rate},
                {"params": [self.log_temperature], "lr": config.temperature_learning_rate},
            ],
            **self._adam_options(),
        )
        self._critic_params: list[Tensor] = list(self.critic.parameters())
        self._target_params: list[Tensor] = list(self.target_critic.parameters())
        self.reset_critic()

    @property
    def device(self) -> torch.device:
        """Where everything lives."""
        return self.log_temperature.device

    @property
    def temperature(self) -> float:
        """α, read from the device."""
        return math.exp(self.log_temperature.item())

    def reset_critic(self) -> None:
        """Start critics, targets and their optimiser anew, as after a change of reward; the rest stays."""
        _initialize(self.critic, self.generator)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.critic_optimizer = torch.optim.Adam(
            self._critic_params, lr=self.config.critic_learning_rate, **self._adam_options()
        )

    def _adam_options(self) -> dict[str, Any]:
        # Without `capturable` torch refuses to record Adam's step, though the fused one is the same.
        return {"fused": True, "capturable": self.device.type == "cuda"}

    def act(self, observation: np.ndarray, *, deterministic: bool = False) -> np.ndarray:
        """(do,) -> (da,) or (n, do) -> (n, da), in [−1, 1], float32: samples of the policy, or its mean actions."""
        return _ACT.kernel(_ACT.select(self.log_temperature, None))(self, observation, deterministic)

    @torch.inference_mode()
    def _reference_act(self, observation: np.ndarray, deterministic: bool) -> np.ndarray:
        observations = torch.from_numpy(np.asarray(observation, dtype=np.float32)).to(self.device)
        mean, log_std = self.actor.mean_and_log_std(observations.reshape(-1, observations.shape[-1]))
        if not deterministic:
            noise = torch.randn(mean.shape, generator=self.generator, dtype=mean.dtype, device=mean.device)
            mean = mean + log_std.exp() * noise
        return torch.tanh(mean).reshape(*observations.shape[:-1], -1).cpu().numpy()

    def update(self, batch: Batch, *, backend: str | None = None) -> dict[str, Tensor]:
        """One step of critics, actor and temperature, and of the targets when due. Returns scalars to log.

        Args:
            batch: the transitions, on the agent's device.
            backend: "reference" for the plain update in torch, kernel by kernel; on the CPU "cpp" for the same numbers up
                to rounding from one native call; on a GPU "graph" for the same numbers from one CUDA graph of the same
                kernels, for which nothing may be captured already. None: the innermost `with backend(…)`, or else the
                best. All work on the same tensors and may take turns.

        Raises:
            ValueError: the batch is on another device.
            BackendError: the backend asked for cannot be used here.
        """
        if batch.observations.device != self.device:
            raise ValueError(f"batch must be on the agent's device, {self.device}, got {batch.observations.device}")
        return _UPDATE.kernel(_UPDATE.select(batch.observations, backend))(self, batch)

    def moves_targets(self) -> bool:
        """Whether the next update moves the target critics."""
        return (self.num_updates + 1) % self.config.target_update_interval == 0

    def learned_params(self) -> list[Tensor]:
        """All that the optimisers move: actor, temperature, critics."""
        return [*self._actor_params, self.log_temperature, *self._critic_params]

    def _reference_update(self, batch: Batch) -> dict[str, Tensor]:
        report = self.step(batch, self.moves_targets())
        self.num_updates += 1
        return report

    def step(self, batch: Batch, moves_targets: bool) -> dict[str, Tensor]:
        """The computations of `update`, kernel by kernel: no number is read from the device, none is counted."""
        config, generator = self.config, self.generator
        temperature = self.log_temperature.detach().exp()

        with torch.no_grad():
            next_actions, next_log_prob = self.actor.sample(batch.next_observations, generator)
            next_values = self.target_critic(batch.next_observations, next_actions).amin(0)
            soft_values = next_values - temperature * next_log_prob
            targets = batch.rewards + config.discount * (1.0 - batch.terminated) * soft_values
        values = self.critic(batch.observations, batch.actions)
        critic_loss = 2.0 * F.mse_loss(values, targets.expand_as(values))
        _set_gradients(self._critic_params, torch.autograd.grad(critic_loss, self._critic_params))
        self.critic_optimizer.step()

        actions, log_prob = self.actor.sample(batch.observations, generator)
        actor_values = torch.minimum(*self.critic(batch.observations, actions))
        actor_loss = (temperature * log_prob - actor_values).mean()
        _set_gradients(self._actor_params, torch.autograd.grad(actor_loss, self._actor_params))
        entropy = -log_prob.detach().mean()
        self.log_temperature.grad = temperature * (entropy - self.target_entropy)
        self.actor_optimizer.step()

        if moves_targets:
            with torch.no_grad():
                torch._foreach_lerp_(self._target_params, self._critic_params, config.polyak)
        return {
            "critic_loss": critic_loss.detach(),
            "actor_loss": actor_loss.detach(),
            "entropy": entropy,
            "temperature": temperature,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything an identical continuation needs: networks, optimisers, temperature, generator, count."""
        return {
            "actor": self.actor.state_dict(),
            "critic": self.critic.state_dict(),
            "target_critic": self.target_critic.state_dict(),
            "log_temperature": self.log_temperature.detach(),
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "num_updates": self.num_updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, from an agent of the same sizes on a device of the same type.

        Raises:
            ValueError: a generator on a device of another type, whose stream this one cannot go on with.
        """
        if len(state["generator"]) != len(self.generator.get_state()):
            raise ValueError(
                f"state must come from an agent on a device of type {self.device.type}: "
                f"its generator has {len(state['generator'])} bytes, this one {len(self.generator.get_state())}"
            )
        self.actor.load_state_dict(state["actor"])
        self.critic.load_state_dict(state["critic"])
        self.target_critic.load_state_dict(state["target_critic"])
        with torch.no_grad():
            self.log_temperature.copy_(state["log_temperature"])
        # The optimisers would keep the very tensors they are given, and then change them in place.
        self.actor_optimizer.load_state_dict(copy.deepcopy(state["actor_optimizer"]))
        self.critic_optimizer.load_state_dict(copy.deepcopy(state["critic_optimizer"]))
        self.generator.set_state(state["generator"])
        self.num_updates = int(state["num_updates"])


_ACT = Op("SAC.act", SAC._reference_act)
_ACT.register(
    "cpp",
    lambda: importlib.import_module("parl_core.rl.native_sac").act,
    device_types=frozenset({"cpu"}),
    dtypes=frozenset({torch.float32}),
)
_UPDATE = Op("SAC.update", SAC._reference_update)
_UPDATE.register(
    "cpp",
    lambda: importlib.import_module("parl_core.rl.native_sac").update,
    device_types=frozenset({"cpu"}),
    dtypes=frozenset({torch.float32, torch.float64}),
)
_UPDATE.register(
    "graph",
    lambda: importlib.import_module("parl_core.rl.graphed_sac").update,
    device_types=frozenset({"cuda"}),
)


@torch.no_grad()
def _initialize(module: nn.Module, generator: torch.Generator) -> None:
    """Orthogonal weights, each member of a batch of layers by itself; zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | BatchedLinear):
            for weight in layer.weight.reshape(-1, *layer.weight.shape[-2:]):
                nn.init.orthogonal_(weight, generator=generator)
            layer.bias.zero_()


def _set_gradients(params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient
