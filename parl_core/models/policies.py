"""Policies whose log-probability can be differentiated twice.

Any `nn.Module` with `log_prob(observations, actions) -> (T,)` is a policy to the engine. A policy that also has

    distribution_params(observations) -> (T, k)            what the network says of each state's action distribution
    params_fisher(params, tangent) -> (T, k)               the Fisher matrix of these k numbers times a tangent (T, k)

gets its Fisher matrix in closed form over actions; otherwise it is estimated from the actions taken.

A recurrent network or a transformer needs to know where trajectories begin. If `log_prob` has a parameter named
`offsets`, as in log_prob(observations, actions, offsets), the engine passes the (N+1,) int64 offsets of the steps by
keyword: trajectory i, which may be empty, holds steps offsets[i] … offsets[i+1]−1. `distribution_params`, and a reward's
`forward`, get them in the same way. Such a policy is always called on whole trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.gaussian_log_prob import gaussian_log_prob, log_tanh_slope
from .categorical import categorical_fisher, categorical_log_prob
from .mlp import mlp
from .tokens import TokenPolicy

__all__ = ["CategoricalPolicy", "GaussianPolicy", "TokenPolicy"]

LOG_STD_BOUNDS = (-5.0, 2.0)


class GaussianPolicy(nn.Module):
    """Diagonal Gaussian, optionally squashed by tanh into (−1, 1).

    Args:
        obs_dim, act_dim: sizes of an observation and an action.
        hidden: widths of the hidden layers.
        activation: "tanh", "relu" or "silu".
        log_std: "state" (a second output of the network, rescaled by tanh into [−5, 2]), "global" (one free parameter
            per action, starting at 0), or a number (fixed).
        squash: actions are tanh(u), u Gaussian; log_prob then includes the change of variables (Haarnoja et al. 2018,
            "Soft Actor-Critic Algorithms and Applications", appendix C). Actions on the boundary are moved inside by
            one rounding unit before atanh.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden: Sequence[int] = (256, 256),
        activation: str = "tanh",
        log_std: str | float = "state",
        squash: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(log_std, str) and log_std not in ("state", "global"):
            raise ValueError(f"log_std must be 'state', 'global' or a number, got '{log_std}'")
        self.obs_dim, self.act_dim, self.squash, self.log_std_kind = obs_dim, act_dim, squash, log_std
        outputs = 2 * act_dim if log_std == "state" else act_dim
        self.network = mlp((obs_dim, *hidden, outputs), activation)
        if log_std == "global":
            self.log_std = nn.Parameter(torch.zeros(act_dim))
        elif log_std != "state":
            self.register_buffer("log_std", torch.full((act_dim,), float(log_std)))

    def mean_and_log_std(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """(T, do) -> mean (T, da) and log standard deviation (T, da), before squashing."""
        _check_observations(observations, self.obs_dim)
        output = self.network(observations)
        if self.log_std_kind != "state":
            return output, self.log_std.expand_as(output)
        mean, raw = output.chunk(2, dim=-1)
        low, high = LOG_STD_BOUNDS
        return mean, low + 0.5 * (high - low) * (torch.tanh(raw) + 1.0)

    def distribution_params(self, observations: Tensor) -> Tensor:
        """(T, 2·da): means, then log standard deviations."""
        return torch.cat(self.mean_and_log_std(observations), dim=-1)

    def params_log_prob(self, params: Tensor, actions: Tensor) -> Tensor:
        """(T, 2·da), (T, da) -> (T,)."""
        mean, log_std = params.chunk(2, dim=-1)
        return gaussian_log_prob(actions, mean, log_std, squash=self.squash)

    def params_fisher(self, params: Tensor, tangent: Tensor) -> Tensor:
        """The Fisher matrix of (mean, log std), diag(1/σ², 2), times `tangent`; squashing does not change it."""
        _, log_std = params.chunk(2, dim=-1)
        tangent_mean, tangent_log_std = tangent.chunk(2, dim=-1)
        return torch.cat((tangent_mean * torch.exp(-2.0 * log_std), 2.0 * tangent_log_std), dim=-1)

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """(T, do), (T, da) -> (T,), natural logarithm of the density."""
        return self.params_log_prob(self.distribution_params(observations), actions)

    def sample(self, observations: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Reparameterised actions (T, da) and their log-probabilities (T,)."""
        mean, log_std = self.mean_and_log_std(observations)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        unsquashed = mean + log_std.exp() * noise
        log_prob = (-0.5 * (noise * noise + math.log(2 * math.pi)) - log_std).sum(-1)
        if not self.squash:
            return unsquashed, log_prob
        return torch.tanh(unsquashed), log_prob - log_tanh_slope(unsquashed).sum(-1)

    def mode(self, observations: Tensor) -> Tensor:
        """(T, da): the mean action, squashed if the policy is."""
        mean, _ = self.mean_and_log_std(observations)
        return torch.tanh(mean) if self.squash else mean


class CategoricalPolicy(nn.Module):
    """Softmax over `num_actions`; with `hidden=()` and one-hot observations this is the tabular softmax policy.

    Actions are integers, (T,) or (T, 1).
    """

    def __init__(self, obs_dim: int, num_actions: int, hidden: Sequence[int] = (), activation: str = "tanh") -> None:
        super().__init__()
        self.obs_dim, self.num_actions = obs_dim, num_actions
        self.network = mlp((obs_dim, *hidden, num_actions), activation)

    def logits(self, observations: Tensor) -> Tensor:
        """(T, do) -> (T, A), unnormalised log-probabilities."""
        _check_observations(observations, self.obs_dim)
        return self.network(observations)

    def distribution_params(self, observations: Tensor) -> Tensor:
        """(T, A): the logits."""
        return self.logits(observations)

    def params_log_prob(self, params: Tensor, actions: Tensor) -> Tensor:
        """(T, A), (T,) or (T, 1) -> (T,)."""
        return categorical_log_prob(params, actions)

    def params_fisher(self, params: Tensor, tangent: Tensor) -> Tensor:
        """The Fisher matrix of the logits, diag(p) − p pᵀ, times `tangent`."""
        return categorical_fisher(params, tangent)

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """(T, do), (T,) or (T, 1) -> (T,), natural logarithm of the probability."""
        return self.params_log_prob(self.logits(observations), actions)

    def sample(self, observations: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Actions (T,) int64 and their log-probabilities (T,)."""
        logits = self.logits(observations)
        actions = torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator).squeeze(-1)
        return actions, self.params_log_prob(logits, actions)

    def mode(self, observations: Tensor) -> Tensor:
        """(T,) int64: the most probable action."""
        return self.logits(observations).argmax(dim=-1)


def _check_observations(observations: Tensor, obs_dim: int) -> None:
    if not observations.is_floating_point():
        raise TypeError(f"observations must be floating-point numbers, got {observations.dtype}")
    if observations.shape[-1:] != (obs_dim,):
        raise ValueError(f"observations must have shape (T, do) with do = {obs_dim}, got {tuple(observations.shape)}")
