"""What the derivatives of a categorical log-probability are made of: four ops, with their references.

With p = softmax(x) of a step's logits x (V,), e_a the unit vector of its action, t a tangent of x, F = diag(p) − p pᵀ:

    value      x_a − log Σ eˣ            along      t_a − p·t
    gradient   w (e_a − p)               fisher     s F t = s p ⊙ (t − p·t)

Where no actions are given, e_a is 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .accelerators import HALF_TO_DOUBLE, triton_devices
from .registry import Op, kernel_in
from .segments import dtype_of_sums, is_legacy_batched, plain_rows


def log_prob_of(logits: Tensor, actions: Tensor) -> Tensor:
    """(T, V), (T,) -> log softmax(logits)[action]: (T,), as torch differentiates it."""
    return F.log_softmax(logits, dim=-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def reference(logits: Tensor, actions: Tensor | None) -> tuple[Tensor, Tensor]:
    """(T, V), (T,) -> the value (T,), and log Σ eˣ (T,) in at least float32, from which the gradient starts."""
    logsumexp = torch.logsumexp(logits.to(dtype_of_sums(logits)), -1)
    return -logsumexp.to(logits.dtype) if actions is None else log_prob_of(logits, actions), logsumexp


def reference_gradient(logits: Tensor, logsumexp: Tensor, actions: Tensor | None, weights: Tensor) -> Tensor:
    """(T, V), (T,), (T,), (T,) -> w (e_a − p): (T, V)."""
    descent = -F.softmax(logits, dim=-1)
    if actions is not None:
        descent = descent + F.one_hot(actions, logits.shape[-1])
    return weights.unsqueeze(-1) * descent


def reference_along(logits: Tensor, actions: Tensor | None, tangent: Tensor) -> Tensor:
    """(T, V), (T,), (T, V) -> t_a − p·t: (T,)."""
    mean = (F.softmax(logits, dim=-1) * tangent).sum(-1)
    if actions is None:
        return -mean
    return tangent.gather(-1, actions.unsqueeze(-1)).squeeze(-1) - mean


def reference_fisher(
    logits: Tensor, actions: Tensor | None, tangent: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(T, V), (T,), (T, V), (T,) -> t_a − p·t (T,) and s F t (T, V); without a scale s is 1."""
    probs = F.softmax(logits, dim=-1)
    weighted = probs * tangent
    image = weighted - probs * weighted.sum(-1, keepdim=True)
    return reference_along(logits, actions, tangent), image if scale is None else scale.unsqueeze(-1) * image


VALUE = Op("categorical_log_prob", reference)
GRADIENT = Op("categorical_log_prob, gradient", reference_gradient)
ALONG = Op("categorical_log_prob, along a tangent", reference_along)
FISHER = Op("categorical_log_prob, second order", reference_fisher)
for _op, _name in ((VALUE, "log_prob"), (GRADIENT, "gradient"), (ALONG, "along"), (FISHER, "fisher")):
    _op.register(
        "triton",
        kernel_in("parl_core.kernels.triton_categorical", _name),
        device_types=triton_devices(),
        dtypes=HALF_TO_DOUBLE,
    )
KERNEL_DEVICES = triton_devices()
"""Where there are kernels."""


def run(op: Op, backend: str, logits: Tensor, *rest: Tensor | None) -> Any:
    """The kernel on tensors that are followed by nobody; of logits and tangents rows may be apart."""
    if any(tensor is not None and is_legacy_batched(tensor) for tensor in (logits, *rest)):
        backend = "reference"
    return op.kernel(backend)(*(None if t is None else plain_rows(t) for t in (logits, *rest)))
