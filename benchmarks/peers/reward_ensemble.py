"""Three reward networks of three hidden layers each: rewards, gradients, and steps of reward learning."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from parl_core.models.rewards import RewardEnsemble
from parl_core.ops import backend
from parl_core.ops.ensemble_rewards import reference
from parl_core.preference.reward_learning import PreferenceDataset, RewardLearner
from parl_core.preference.samplers import Queries
from parl_core.rl.rollout import Segments

OBS_DIM, ACT_DIM, MEMBERS = 24, 6, 3
SEGMENT = 50
Run = Callable[[], Any]


def make_ensemble(width: int, dtype: torch.dtype = torch.float32) -> RewardEnsemble:
    """The same for the same width."""
    torch.manual_seed(0)
    return RewardEnsemble(OBS_DIM, ACT_DIM, (width,) * 3, MEMBERS).to(dtype)


def make_inputs(steps: int) -> tuple[Tensor, Tensor]:
    """Inputs (T, do + da) and the weights (members, T) of the gradient."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(steps, OBS_DIM + ACT_DIM, generator=generator)
    return inputs, torch.randn(MEMBERS, steps, generator=generator)


def flops(width: int, steps: int, first: float, others: float) -> float:
    """Of `first` products for the first layer and `others` for each other one."""
    layers = list(pairwise((OBS_DIM + ACT_DIM, width, width, width, 1)))
    products = [first] + [others] * (len(layers) - 1)
    return sum(2.0 * MEMBERS * steps * a * b * n for (a, b), n in zip(layers, products, strict=True))


def gradient(ensemble: RewardEnsemble, inputs: Tensor, weights: Tensor, backend_name: str | None = None) -> Run:
    """Rewards and the gradient of their weighted sum, flat."""
    params = list(ensemble.parameters())
    observations, actions = inputs.split((OBS_DIM, ACT_DIM), dim=1)

    def run() -> Any:
        with backend(backend_name) if backend_name else nullcontext():
            return _flat(torch.autograd.grad(ensemble.member_rewards(observations, actions), params, weights))

    return run


def compiled_gradient(ensemble: RewardEnsemble, inputs: Tensor, weights: Tensor) -> Run:
    """torch.compile of the same, forward and backward."""
    params = list(ensemble.parameters())
    rewards = torch.compile(lambda *params: reference(inputs, params[::2], params[1::2]))
    return lambda: _flat(torch.autograd.grad(rewards(*params), params, weights))


def jax_gradient(ensemble: RewardEnsemble, inputs: Tensor, weights: Tensor) -> Run:
    """jit of grad; the members are batched products."""
    import jax
    import jax.numpy as jnp

    def total(params: Any, inputs: Any, weights: Any) -> Any:
        values = jnp.broadcast_to(inputs, (MEMBERS, *inputs.shape))
        layers = list(zip(params[::2], params[1::2], strict=True))
        for weight, bias in layers[:-1]:
            values = jax.nn.leaky_relu(values @ weight + bias, 0.01)
        return (jnp.tanh(values @ layers[-1][0] + layers[-1][1])[..., 0] * weights).sum()

    compute = jax.jit(lambda *data: jnp.concatenate([part.ravel() for part in jax.grad(total)(*data)]))
    params = [jnp.asarray(param.detach().numpy()) for param in ensemble.parameters()]
    data = jnp.asarray(inputs.numpy()), jnp.asarray(weights.numpy())
    return lambda: compute(params, *data)


def fit(width: int, pairs: int, backend_name: str | None = None) -> Run:
    """One epoch of `RewardLearner` from the same weights; the weights it ends in."""
    dataset = PreferenceDataset(pairs, SEGMENT, OBS_DIM, ACT_DIM)
    generator = torch.Generator().manual_seed(2)

    def segments() -> Segments:
        return Segments(
            torch.randn(pairs, SEGMENT, OBS_DIM, generator=generator),
            torch.rand(pairs, SEGMENT, ACT_DIM, generator=generator) * 2 - 1,
            torch.zeros(pairs, SEGMENT),
        )

    dataset.append(Queries(segments(), segments()), torch.rand(pairs, generator=generator).round())

    def run() -> Any:
        ensemble = make_ensemble(width)
        learner = RewardLearner(ensemble, generator=torch.Generator().manual_seed(3))
        with backend(backend_name) if backend_name else nullcontext():
            learner.fit(dataset, max_epochs=1, accuracy_target=1.0)
        return [param.detach() for param in ensemble.parameters()]

    return run


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
