"""Reward models. Any `nn.Module` with `forward(observations, actions) -> (T,)` is a reward to the engine.

One whose forward has a parameter named `offsets` is given those of the trajectories, as policies are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.ensemble_rewards import LEAKY_SLOPE, ensemble_rewards
from .mlp import BatchedLinear
from .unchanged import change_of


class RewardEnsemble(nn.Module):
    """PEBBLE's reward model: `members` MLPs with leaky ReLU (slope .01) and a tanh output (Lee et al., ICML 2021).

    The members' parameters are batched, so that all of them cost one matrix product a layer. The reward is the mean of
    the members and lies in (−1, 1).

    Args:
        obs_dim, act_dim: sizes of an observation and an action; the input is their concatenation.
        hidden: widths of the hidden layers.
        members: how many independently initialised networks.
    """

    def __init__(self, obs_dim: int, act_dim: int, hidden: Sequence[int] = (256, 256, 256), members: int = 3) -> None:
        super().__init__()
        if members < 1:
            raise ValueError(f"members must be at least 1, got {members}")
        self.obs_dim, self.act_dim, self.num_members = obs_dim, act_dim, members
        sizes = (obs_dim + act_dim, *hidden, 1)
        self.layers = nn.ModuleList(BatchedLinear(members, a, b) for a, b in itertools.pairwise(sizes))

    def member_rewards(self, observations: Tensor, actions: Tensor) -> Tensor:
        """(T, do), (T, da) -> (members, T), or (members, T, do), … -> (members, T) with inputs of each member's own."""
        for name, tensor, size in (
            ("observations", observations, self.obs_dim),
            ("actions", actions, self.act_dim),
        ):
            if tensor.shape[-1] != size:
                raise ValueError(f"{name} must have {size} columns, got shape {tuple(tensor.shape)}")
        inputs = torch.cat((observations, actions), dim=-1)
        if plain := self.plain_layers():
            return ensemble_rewards(inputs, *plain)
        values = inputs if inputs.dim() == 3 else inputs.expand(self.num_members, *inputs.shape)
        for layer in self.layers[:-1]:
            values = F.leaky_relu(layer(values), LEAKY_SLOPE)
        return torch.tanh(self.layers[-1](values)).squeeze(-1)

    def plain_layers(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """Weights and biases of all layers, or None if calling a layer does more than they say: a hook, another module."""
        layers = [layer for layer in self.layers if type(layer) is BatchedLinear]
        if len(layers) < len(self.layers) or change_of(self.layers, "layers") is not None:
            return None
        return [layer.weight for layer in layers], [layer.bias for layer in layers]

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """(T, do), (T, da) -> (T,), the mean over members."""
        return self.member_rewards(observations, actions).mean(0)
