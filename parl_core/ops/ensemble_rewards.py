"""Rewards of an ensemble of networks: leaky ReLU (slope .01) between the layers, tanh after the last.

Kernels have the signature of `reference` below, which is the specification. The native one takes blocks of rows through
all layers while they stay in the cache and keeps no activations: going backwards, it does each block's forward pass again.
A second derivative goes through the reference, and so does everything under torch.func and torch.compile.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .preference_loss import any_transformed
from .registry import Kernel, Op
from .segments import is_legacy_batched, is_traced, plain

LEAKY_SLOPE = 0.01
MAX_LAYERS = 16  # of the native kernel


def ensemble_rewards(
    inputs: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, backend: str | None = None
) -> Tensor:
    """Every member's rewards, differentiable at any order in all three.

    Args:
        inputs: (T, in), the same for all members, or (members, T, in); floating point.
        weights: of each layer (members, in, out), where the last has one output.
        biases: of each layer (members, 1, out).
        backend: see `available_backends()`; None: the innermost `with backend(…)`, or else the best.

    Returns:
        (members, T), in (−1, 1).

    Raises:
        BackendError: the backend asked for cannot be used here.
        TypeError, ValueError: tensors of a wrong dtype or shape.
    """
    _check(inputs, weights, biases)
    if is_traced(inputs):
        return reference(inputs, weights, biases)
    tensors = (inputs, *weights, *biases)
    name = _OP.select(inputs, backend)
    unsupported = _OP.requested(backend) is None and not _is_supported(inputs, weights, biases)
    if name == "reference" or unsupported or any_transformed(tensors):
        return reference(inputs, weights, biases)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _EnsembleRewards.apply(inputs, len(weights), *weights, *biases)
    return _OP.kernel(name)(inputs, weights, biases)


def reference(inputs: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The specification, on any device."""
    values = inputs if inputs.dim() == 3 else inputs.expand(weights[0].shape[0], *inputs.shape)
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        values = F.leaky_relu(torch.baddbmm(bias, values, weight), LEAKY_SLOPE)
    return torch.tanh(torch.baddbmm(biases[-1], values, weights[-1])).squeeze(-1)


def _check(inputs: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"weights and biases must be of the same layers, at least one, got {len(weights)} and {len(biases)}"
        )
    if not inputs.is_floating_point():
        raise TypeError(f"inputs must be of a floating-point dtype, got {inputs.dtype}")
    if weights[0].dim() != 3:
        raise ValueError(f"weights[0] must be of shape (members, in, out), got {tuple(weights[0].shape)}")
    members, width, _ = weights[0].shape
    if inputs.dim() not in (2, 3) or inputs.shape[-1] != width or (inputs.dim() == 3 and inputs.shape[0] != members):
        raise ValueError(
            f"inputs must be of shape (T, {width}) or ({members}, T, {width}), as weights[0] has it, "
            f"got {tuple(inputs.shape)}"
        )
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        out = 1 if layer == len(weights) - 1 else weight.shape[-1]
        if weight.shape != (members, width, out):
            raise ValueError(
                f"weights[{layer}] must be of shape ({members}, {width}, {out}), got {tuple(weight.shape)}"
            )
        if bias.shape != (members, 1, out):
            raise ValueError(f"biases[{layer}] must be of shape ({members}, 1, {out}), got {tuple(bias.shape)}")
        width = out


def _is_supported(inputs: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
    """Whether the native kernel takes these; a dtype that differs is left to the reference to refuse."""
    return (
        len(weights) <= MAX_LAYERS and all(p.dtype == inputs.dtype for p in (*weights, *biases)) and inputs.numel() > 0
    )


def widths(weights: Sequence[Tensor]) -> list[int]:
    """Of the inputs and of all layers."""
    return [weights[0].shape[1], *(weight.shape[2] for weight in weights)]


def _load_cpp() -> Kernel:
    native = importlib.import_module("parl_core._native")

    def cpp(inputs: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        members = weights[0].shape[0]
        rewards = inputs.new_empty(members, inputs.shape[-2])
        native.ensemble_forward(
            members,
            dense(weights),
            dense(biases),
            widths(weights),
            *dense([inputs]),
            rewards,
            torch.get_num_threads(),
        )
        return rewards

    return cpp


def dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each as the native kernel reads them."""
    return [plain(tensor) for tensor in tensors]


_OP = Op("ensemble_rewards", reference)
_OP.register("cpp", _load_cpp, device_types=frozenset({"cpu"}), dtypes=frozenset({torch.float32, torch.float64}))


class _EnsembleRewards(torch.autograd.Function):
    """The kernel under autograd. Its gradient is compiled as well, unless that is to be differentiated again."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, num_layers: int, *params: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, *params)
        ctx.num_layers = num_layers
        return _OP.kernel("cpp")(inputs, params[:num_layers], params[num_layers:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, *params = ctx.saved_tensors
        weights, biases = params[: ctx.num_layers], params[ctx.num_layers :]
        wants_inputs, _, *wanted = ctx.needs_input_grad
        differentiated = torch.is_grad_enabled()
        if differentiated or is_legacy_batched(gradient):
            asked = [inputs] * wants_inputs + [p for p, wants in zip(params, wanted, strict=True) if wants]
            with torch.enable_grad():
                rewards = reference(inputs, weights, biases)
            found = iter(torch.autograd.grad(rewards, asked, gradient, create_graph=differentiated))
            by_inputs = next(found) if wants_inputs else None
            return by_inputs, None, *(next(found) if wants else None for wants in wanted)
        native = importlib.import_module("parl_core._native")
        members = weights[0].shape[0]
        by_weights, by_biases = ([torch.empty(p.shape, dtype=p.dtype) for p in some] for some in (weights, biases))
        each = inputs.new_empty(members, *inputs.shape[-2:]) if wants_inputs else None
        native.ensemble_backward(
            members, dense(weights), dense(biases), widths(weights), *dense([inputs, gradient]), by_weights, by_biases,
            each, torch.get_num_threads(),
        )  # fmt: skip
        summed = each if each is None or inputs.dim() == 3 else each.sum(0)
        return summed, None, *by_weights, *by_biases
