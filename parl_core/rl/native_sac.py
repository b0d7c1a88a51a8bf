"""One update of `SAC` as one native call on the CPU, in the very tensors of its networks and optimisers.

So the two ways to update may take turns, and checkpoints know nothing of it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.mlp import BatchedLinear
from ..models.policies import GaussianPolicy
from ..models.unchanged import change_of, params_of, parts
from ..optim import adam_state, is_plain_adam

if TYPE_CHECKING:
    from .graphed_sac import GraphedSAC
    from .replay import Batch
    from .sac import SAC


MAX_HIDDEN = 15  # layers; more are left to torch
REPORT = ("critic_loss", "actor_loss", "entropy", "temperature")


class NativeCache:
    """The kernels of one agent, bound to the places of its tensors, and bound anew when these have moved."""

    def __init__(self) -> None:
        self.updater: BoundSAC | None = None
        self.graphs: GraphedSAC | None = None
        self.actor: Any = None
        self.actor_params: list[Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeCache:
        return NativeCache()  # a copied agent has tensors of its own

    def __reduce__(self) -> tuple[type[NativeCache], tuple[()]]:
        return NativeCache, ()


def update(sac: SAC, batch: Batch) -> dict[str, Tensor]:
    """As `SAC.update`."""
    if not _is_plain(sac):
        return sac._reference_update(batch)
    updater = sac.native.updater
    if updater is None or not updater.is_current(sac):
        updater = sac.native.updater = BoundSAC(sac)
    return updater.update(sac, batch)


def act(sac: SAC, observation: np.ndarray, deterministic: bool) -> np.ndarray:
    """As `SAC.act`."""
    if not (len(sac.config.hidden) <= MAX_HIDDEN and _is_unchanged_actor(sac)):
        return sac._reference_act(observation, deterministic)
    actor = sac.native.actor
    params = params_of(sac.actor)
    if actor is None or not (_are_same(sac.native.actor_params, params) and actor.is_current()):
        native = importlib.import_module("parl_core._native")
        actor = sac.native.actor = native.Actor(params)
        sac.native.actor_params = params
    noise = None
    if not deterministic:
        rows = math.prod(np.shape(observation)[:-1])
        noise = torch.randn(rows, sac.actor.act_dim, generator=sac.generator, dtype=torch.float32)
    return actor.act(observation, noise)


def _is_plain(sac: SAC) -> bool:
    """Whether the native update knows these networks and optimisers."""
    if not (len(sac.config.hidden) <= MAX_HIDDEN and is_unchanged(sac)):
        return False
    groups = [*sac.actor_optimizer.param_groups, *sac.critic_optimizer.param_groups]
    if len({(*group["betas"], group["eps"]) for group in groups}) > 1:
        return False
    return is_plain_adam(sac.actor_optimizer) and is_plain_adam(sac.critic_optimizer)


def is_unchanged(sac: SAC) -> bool:
    """Whether the networks compute, and the optimisers move, what the constructor made, and no hook is called."""
    from .sac import TwinCritic

    if not _is_unchanged_actor(sac):
        return False
    for critic in (sac.critic, sac.target_critic):
        kinds = {type(part) for part in parts(critic)}
        if type(critic) is not TwinCritic or kinds != {TwinCritic, nn.ModuleList, BatchedLinear}:
            return False
        if change_of(critic, "the critic") is not None:
            return False
    groups = [*sac.actor_optimizer.param_groups, *sac.critic_optimizer.param_groups]
    learned: list[list[Tensor]] = [params_of(sac.actor), [sac.log_temperature], params_of(sac.critic)]
    # The reference updates the parameters it was made with, of which each optimiser's groups are a copy.
    kept: list[list[Tensor]] = [sac._actor_params, [sac.log_temperature], sac._critic_params]
    if len(groups) != 3:
        return False
    for group, params, known in zip(groups, learned, kept, strict=True):
        if not (_are_same(group["params"], params) and _are_same(known, params)):
            return False
        if any(not param.requires_grad or param._backward_hooks for param in params):
            return False
    return _are_same(sac._target_params, params_of(sac.target_critic))


def _is_unchanged_actor(sac: SAC) -> bool:
    actor, hidden = sac.actor, len(sac.config.hidden)
    if type(actor) is not GaussianPolicy or not actor.squash or actor.log_std_kind != "state":
        return False
    expected = [GaussianPolicy, nn.Sequential] + [nn.Linear, nn.ReLU] * hidden + [nn.Linear]
    return [type(part) for part in parts(actor)] == expected and change_of(actor, "the actor") is None


def _are_same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


class BoundSAC:
    """The native kernel with the places of one agent's tensors."""

    def __init__(self, sac: SAC) -> None:
        native = importlib.import_module("parl_core._native")
        actor, critic = sac.actor_optimizer, sac.critic_optimizer
        self._rule = native.SacRule
        dtype = sac.log_temperature.dtype
        kernel = native.SacFloat32 if dtype == torch.float32 else native.SacFloat64
        self._kernel = kernel(
            sac.actor.obs_dim,
            sac.actor.act_dim,
            list(sac.config.hidden),
            _lists(actor, sac.actor.parameters()),
            _lists(critic, sac.critic.parameters()),
            list(sac.target_critic.parameters()),
            _lists(actor, [sac.log_temperature]),
        )
        self._states = actor.state, critic.state
        self._params = _params(sac)

    def is_current(self, sac: SAC) -> bool:
        """Whether everything is still where it was when this was made."""
        actor, critic = self._states
        same_states = sac.actor_optimizer.state is actor and sac.critic_optimizer.state is critic
        return same_states and _are_same(self._params, _params(sac)) and self._kernel.is_current()

    def update(self, sac: SAC, batch: Batch) -> dict[str, Tensor]:
        config = sac.config
        shape, dtype = batch.actions.shape, batch.actions.dtype
        next_noise = torch.randn(shape, generator=sac.generator, dtype=dtype)
        noise = torch.randn(shape, generator=sac.generator, dtype=dtype)
        actor, temperature = sac.actor_optimizer.param_groups
        (critic,) = sac.critic_optimizer.param_groups
        rule = self._rule(
            config.discount,
            config.polyak,
            sac.moves_targets(),
            sac.target_entropy,
            actor["lr"],
            critic["lr"],
            temperature["lr"],
            *actor["betas"],
            actor["eps"],
        )
        report = self._kernel.update(batch, next_noise, noise, rule, torch.get_num_threads())
        sac.num_updates += 1
        scalars = torch.tensor(report, dtype=dtype).unbind()
        return dict(zip(REPORT, scalars, strict=True))


def _params(sac: SAC) -> list[Tensor]:
    modules = (sac.actor, sac.critic, sac.target_critic)
    return [sac.log_temperature, *(param for module in modules for param in params_of(module))]


def _lists(optimizer: torch.optim.Adam, params: Iterable[Tensor]) -> tuple[list[Any], ...]:
    """Parameters, gradients, and what Adam remembers of them, begun as Adam itself would begin it."""
    params = list(params)
    for param in params:
        if param.grad is None or not param.grad.is_contiguous():
            param.grad = torch.zeros_like(param, memory_format=torch.contiguous_format)
    remembered = zip(*(adam_state(optimizer, param) for param in params), strict=True)
    return params, [param.grad for param in params], *map(list, remembered)
