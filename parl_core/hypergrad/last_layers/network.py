"""What the last two layers of a policy compute, and the derivatives of its log-probability by its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.policies import LOG_STD_BOUNDS
from ..native_linearize import MlpPolicy


class Layers(NamedTuple):
    """The last two layers of a policy and where they are in its flat parameters."""

    inputs: Tensor  # (T, i) of the layer before the output, a 1 at the end for its bias
    hidden: Tensor  # (T, h)
    slope: Tensor  # (T, h) φ'
    bend: Tensor  # (T, h) φ''
    outputs: Tensor  # (T, k)
    weight: Tensor  # (k, h) of the output layer
    places: dict[str, slice]  # of each parameter, by its name, in flat order
    names: tuple[str, str]  # of the two layers, "network.2" and "network.4"
    free: str | None  # the name of the parameter that is one more distribution parameter in each state


def read_layers(mlp: MlpPolicy, params: dict[str, Tensor], observations: Tensor) -> Layers:
    """Run the policy's network on the observations (T, do), at `params`."""
    linear = [f"network.{2 * index}" for index in range(len(mlp.widths) - 1)]
    activation = _ACTIVATIONS[mlp.activation]
    places, start = {}, 0
    for name, value in params.items():
        places[name] = slice(start, start + value.numel())
        start += value.numel()
    values = observations
    for name in linear[:-2]:
        values = activation(torch.addmm(params[f"{name}.bias"], values, params[f"{name}.weight"].T))[0]
    before, last = linear[-2:]
    inner = torch.addmm(params[f"{before}.bias"], values, params[f"{before}.weight"].T)
    hidden, slope, bend = activation(inner)
    weight = params[f"{last}.weight"]
    outputs = torch.addmm(params[f"{last}.bias"], hidden, weight.T)
    free = "log_std" if "log_std" in params else None
    return Layers(with_ones(values), hidden, slope, bend, outputs, weight, places, (before, last), free)


def _tanh(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = torch.tanh(x)
    slope = 1.0 - value * value
    return value, slope, -2.0 * value * slope


def _relu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.clamp_min(0.0), (x > 0).to(x.dtype), torch.zeros_like(x)


def _silu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate = torch.sigmoid(x)
    fall = gate * (1.0 - gate)
    return x * gate, gate + x * fall, fall * (2.0 + x * (1.0 - 2.0 * gate))


_ACTIVATIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "tanh": _tanh,
    "relu": _relu,
    "silu": _silu,
}
"""Value, first and second derivative."""


class Head(NamedTuple):
    """Derivatives by the k outputs of the network, and the free parameters after them."""

    gradient: Tensor  # (T, k) hessian_t ∂ log π_t
    curvature: Tensor  # (T, k + f, k + f) hessian_t ∂² log π_t + fisher_t F_t


def head_derivatives(
    mlp: MlpPolicy,
    layers: Layers,
    log_std: Tensor | None,
    actions: Tensor,
    hessian: Tensor | None,
    fisher: Tensor | None,
) -> Head:
    """The derivatives for weights (T,) or None for none; `log_std` (da,) where the network does not give it."""
    zero = layers.outputs.new_zeros(len(layers.outputs))
    hessian, fisher = zero if hessian is None else hessian, zero if fisher is None else fisher
    if mlp.head == "categorical":
        return _categorical_head(layers.outputs, actions, hessian, fisher)
    return _gaussian_head(mlp, layers.outputs, log_std, actions, hessian, fisher)


def _categorical_head(logits: Tensor, actions: Tensor, hessian: Tensor, fisher: Tensor) -> Head:
    p = torch.softmax(logits, dim=-1)
    taken = F.one_hot(actions.reshape(-1), logits.shape[-1]).to(p)
    matrix = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return Head(hessian[:, None] * (taken - p), (fisher - hessian)[:, None, None] * matrix)


def _gaussian_head(
    mlp: MlpPolicy, outputs: Tensor, own: Tensor | None, actions: Tensor, hessian: Tensor, fisher: Tensor
) -> Head:
    """log π = −y²/2 − log σ for each action, y = (action − mean) / σ, where log σ is an output, a parameter or a number."""
    size, (w, f) = outputs.shape[1] // (1 if own is not None else 2), (hessian[:, None], fisher[:, None])
    mean, slope, bend = outputs[:, :size], torch.ones_like(outputs[:, :size]), torch.zeros_like(outputs[:, :size])
    if own is None:
        low, high = LOG_STD_BOUNDS
        rising = torch.tanh(outputs[:, size:])
        log_std = low + 0.5 * (high - low) * (rising + 1.0)
        slope = 0.5 * (high - low) * (1.0 - rising * rising)
        bend = -2.0 * rising * slope
    else:
        log_std = own.expand_as(mean)
    if mlp.squash:
        edge = 1.0 - torch.finfo(mean.dtype).eps
        actions = torch.atanh(actions.clamp(-edge, edge))
    inverse = torch.exp(-log_std)
    y = (actions - mean) * inverse
    by_mean, by_std = w * y * inverse, w * (y * y - 1.0)
    mean_mean = torch.diag_embed((f - w) * inverse * inverse)
    if mlp.head == "fixed":
        return Head(by_mean, mean_mean)
    mean_std = torch.diag_embed(-2.0 * w * y * inverse * slope)
    std_std = torch.diag_embed((2.0 * f - 2.0 * w * y * y) * slope * slope + by_std * bend)
    curvature = torch.cat((torch.cat((mean_mean, mean_std), 2), torch.cat((mean_std, std_std), 2)), 1)
    return Head(torch.cat((by_mean, by_std * slope), 1) if own is None else by_mean, curvature)


def with_ones(rows: Tensor) -> Tensor:
    """(T, n) -> (T, n + 1): what a bias is multiplied with."""
    return torch.cat((rows, rows.new_ones(len(rows), 1)), dim=1)
