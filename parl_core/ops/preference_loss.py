"""The Bradley–Terry cross-entropy of labelled pairs of segments, from the rewards of their steps.

With R(τ) = Σ_h r_h over a segment's steps, undiscounted, and y the probability that the second is preferred:

    z = R(second) − R(first)                P(second preferred) = σ(z)                (Bradley and Terry 1952)
    loss = −y·log σ(z) − (1 − y)·log σ(−z)              d loss/dz = σ(z) − y

which every step of the second segment receives, and every step of the first with the other sign. Christiano et al. 2017,
"Deep Reinforcement Learning from Human Preferences", equation 1.

Kernels have the signature of `reference` below, which is the specification. They take the sums, the losses and how many
pairs are in order in one pass, and write the gradient in another. A second derivative goes through the reference, and so
does everything under torch.func and torch.compile.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.autograd.forward_ad import unpack_dual

from ..offsets import check_offset_values
from .accelerators import HALF_TO_DOUBLE, triton_devices
from .registry import Kernel, Op
from .segments import is_legacy_batched, is_traced, plain


class PairsLoss(NamedTuple):
    """What `preference_loss` returns, for rewards of one model or (members, …) of several."""

    loss: Tensor
    """() or (members,), mean over the pairs, in nats; with reduction "none" (M,) or (members, M)."""
    correct: Tensor
    """() or (members,), int64: how many of the pairs with a preference (label ≠ ½) are ordered as labelled; a tie of the
    rewards is not. Divided by their number it is the accuracy."""


def preference_loss(
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    first_offsets: Tensor | None = None,
    second_offsets: Tensor | None = None,
    *,
    reduction: str = "mean",
    backend: str | None = None,
) -> PairsLoss:
    """Cross-entropy of M labels under Bradley–Terry, and how many pairs are ordered as labelled.

    Differentiable at any order in the rewards and the labels; finite for all finite sums.

    Args:
        first, second: step rewards of the two segments of each pair, floating point, of one dtype: (M, L) where all
            segments have L steps, or, with offsets, (T,), the segments one after another. A leading axis holds several
            rewards of the same pairs: (members, M, L) or (members, T). The two may differ in length.
        labels: (M,) or (members, M), in [0, 1]: the probability that the second is preferred; ½ is no preference.
        first_offsets, second_offsets: (M+1,) int64, or None; segment m is first[..., offsets[m]:offsets[m+1]].
        reduction: "mean" over the pairs, or "none".
        backend: see `available_backends()`; None: the innermost `with backend(…)`, or else the device's best.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes or devices that do not fit, offsets that do not cover the steps, a wrong reduction.
        BackendError: the backend asked for cannot be used here.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    _check(first, second, labels, first_offsets, second_offsets)
    tensors = (first, second, labels)
    arguments = first, second, labels, first_offsets, second_offsets
    name = "reference"
    if not is_traced(first):  # else nobody may look at what the offsets hold
        for rewards, offsets in ((first, first_offsets), (second, second_offsets)):
            if offsets is not None:
                check_offset_values(offsets, rewards.shape[-1])
        name = _OP.select(first, backend)
    if name == "reference" or any_transformed(tensors):
        result = reference(*arguments)
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        result = PairsLoss(*_PreferenceLoss.apply(*arguments, name))
    else:
        loss, _, correct = _OP.kernel(name)(*arguments)
        result = PairsLoss(loss, correct)
    return result._replace(loss=result.loss.mean(-1)) if reduction == "mean" else result


def reference(
    first: Tensor, second: Tensor, labels: Tensor, first_offsets: Tensor | None, second_offsets: Tensor | None
) -> PairsLoss:
    """The specification, on any device: the loss of each pair, and how many are ordered as labelled."""
    logits = _logits(first, second, first_offsets, second_offsets)
    labels = labels.to(logits.dtype).expand_as(logits)
    correct = (logits.sign() == (labels - 0.5).sign()) & (labels != 0.5)
    return PairsLoss(F.binary_cross_entropy_with_logits(logits, labels, reduction="none"), correct.sum(-1))


def _logits(first: Tensor, second: Tensor, first_offsets: Tensor | None, second_offsets: Tensor | None) -> Tensor:
    """(M,) or (members, M): Σ second − Σ first."""
    return _segment_sums(second, second_offsets) - _segment_sums(first, first_offsets)


def _segment_sums(rewards: Tensor, offsets: Tensor | None) -> Tensor:
    if offsets is None:
        return rewards.sum(-1)
    lengths = offsets.diff()
    numbers = torch.arange(len(lengths), device=offsets.device)
    segment = numbers.repeat_interleave(lengths, output_size=rewards.shape[-1])  # (T,)
    return rewards.new_zeros(*rewards.shape[:-1], len(lengths)).index_add(-1, segment, rewards)


def _load_cpp() -> Kernel:
    native = importlib.import_module("parl_core._native")

    def cpp(
        first: Tensor, second: Tensor, labels: Tensor, first_offsets: Tensor | None, second_offsets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, logits and correct."""
        first, second, labels = plain(first), plain(second), plain(labels.to(first.dtype))
        members = first.shape[:-2] if first_offsets is None else first.shape[:-1]
        shape = (*members, labels.shape[-1])
        losses, logits = first.new_empty(shape), first.new_empty(shape)
        correct = torch.empty(members, dtype=torch.int64)
        native.preference_loss(
            first, _dense_offsets(first_offsets), second, _dense_offsets(second_offsets), labels, members.numel(), losses,
            logits, correct.view(-1),
        )  # fmt: skip
        return losses, logits, correct

    return cpp


def _load_triton() -> Kernel:
    triton = importlib.import_module("parl_core.kernels.triton_preference").preference_loss

    def kernel(
        first: Tensor, second: Tensor, labels: Tensor, first_offsets: Tensor | None, second_offsets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, logits and correct."""
        offsets = _dense_offsets(first_offsets), _dense_offsets(second_offsets)
        result: tuple[Tensor, Tensor, Tensor] = triton(plain(first), plain(second), plain(labels), *offsets)
        return result

    return kernel


def _dense_offsets(offsets: Tensor | None) -> Tensor | None:
    return None if offsets is None else offsets.contiguous()


_OP = Op("preference_loss", reference)
_OP.register("cpp", _load_cpp, device_types=frozenset({"cpu"}), dtypes=frozenset({torch.float32, torch.float64}))
_OP.register("triton", _load_triton, device_types=triton_devices(), dtypes=HALF_TO_DOUBLE)


class _PreferenceLoss(torch.autograd.Function):
    """The kernel under autograd. Its gradient is compiled as well, unless that is to be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        second: Tensor,
        labels: Tensor,
        first_offsets: Tensor | None,
        second_offsets: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        losses, logits, correct = _OP.kernel(backend)(first, second, labels, first_offsets, second_offsets)
        ctx.save_for_backward(first, second, labels, first_offsets, second_offsets, logits)
        ctx.mark_non_differentiable(correct)
        ctx.backend = backend
        return losses, correct

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
        first, second, labels, first_offsets, second_offsets, logits = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated, so it must know how it depends on all three
            logits = _logits(first, second, first_offsets, second_offsets)
        slopes = gradient * (torch.sigmoid(logits) - labels.to(logits.dtype))
        wanted = ctx.needs_input_grad
        label_gradient = (-gradient * logits).sum_to_size(labels.shape).to(labels.dtype) if wanted[2] else None
        return (
            _spread(-slopes, first, first_offsets, ctx.backend) if wanted[0] else None,
            _spread(slopes, second, second_offsets, ctx.backend) if wanted[1] else None,
            label_gradient,
            *(None,) * 3,
        )


def _spread(slopes: Tensor, rewards: Tensor, offsets: Tensor | None, backend: str) -> Tensor:
    """To every step what its segment receives: (members, M) -> the shape of `rewards`."""
    if torch.is_grad_enabled() or is_legacy_batched(slopes):
        slopes = slopes.to(rewards.dtype)
        if offsets is None:
            return slopes.unsqueeze(-1).expand_as(rewards)
        return slopes.repeat_interleave(offsets.diff(), -1, output_size=rewards.shape[-1])
    if backend == "triton":
        spread: Kernel = importlib.import_module("parl_core.kernels.triton_preference").spread
        out: Tensor = spread(plain(slopes), rewards, _dense_offsets(offsets))
        return out
    native = importlib.import_module("parl_core._native")
    steps = torch.empty_like(rewards, memory_format=torch.contiguous_format)
    members = slopes.shape[:-1].numel()
    native.spread_over_segments(plain(slopes), 1.0, _dense_offsets(offsets), members, steps)
    return steps


def any_transformed(tensors: Iterable[Tensor]) -> bool:
    """Whether torch.func or forward-mode differentiation looks at one of them."""
    # Without a level of forward mode nothing has a tangent; asking every tensor for its own takes longer than a kernel.
    forward = forward_ad._current_level >= 0
    return any(is_functorch_wrapped_tensor(t) or (forward and unpack_dual(t).tangent is not None) for t in tensors)


def _check(
    first: Tensor, second: Tensor, labels: Tensor, first_offsets: Tensor | None, second_offsets: Tensor | None
) -> None:
    for name, tensor in (("first", first), ("second", second), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of first, {first.device}, got {tensor.device}")
    if second.dtype != first.dtype:
        raise TypeError(f"second must have the dtype of first, {first.dtype}, got {second.dtype}")
    if labels.dim() not in (1, 2):
        raise ValueError(f"labels must be of shape (M,) or (members, M), got {tuple(labels.shape)}")
    num_pairs = labels.shape[-1]
    members = None
    for name, rewards, offsets in (("first", first, first_offsets), ("second", second, second_offsets)):
        if offsets is None:
            if rewards.dim() not in (2, 3) or rewards.shape[-2] != num_pairs:
                raise ValueError(
                    f"{name} must be of shape (M, L) or (members, M, L) with M = {num_pairs}, as there are labels, or be "
                    f"given {name}_offsets, got {tuple(rewards.shape)}"
                )
            found = rewards.shape[:-2]
        else:
            if not isinstance(offsets, Tensor):
                raise TypeError(f"{name}_offsets must be a Tensor or None, got {type(offsets).__name__}")
            if offsets.dtype != torch.int64 or offsets.shape != (num_pairs + 1,) or offsets.device != first.device:
                raise ValueError(
                    f"{name}_offsets must be int64 of shape (M+1,) = ({num_pairs + 1},) on {first.device}, "
                    f"got {offsets.dtype} of {tuple(offsets.shape)} on {offsets.device}"
                )
            if rewards.dim() not in (1, 2):
                raise ValueError(
                    f"{name} must be of shape (T,) or (members, T) beside offsets, got {tuple(rewards.shape)}"
                )
            found = rewards.shape[:-1]
        if members is not None and found != members:
            raise ValueError(
                f"second must have as many members as first, {tuple(members)}, got shape {tuple(rewards.shape)}"
            )
        members = found
    if labels.dim() == 2 and labels.shape[:-1] != members:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} must have as many members as the rewards, {tuple(members or ())}"
        )
