"""The categorical distribution given by logits, as policies over integer actions use it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def categorical_log_prob(logits: Tensor, actions: Tensor) -> Tensor:
    """(T, A), (T,) or (T, 1) integers -> (T,), natural logarithm of the probability."""
    if actions.is_floating_point() or actions.is_complex():
        raise TypeError(f"actions must be integers, got {actions.dtype}")
    index = actions.reshape(-1, 1)
    if index.shape[0] != logits.shape[0]:
        raise ValueError(
            f"actions must have shape (T,) or (T, 1) with T = {logits.shape[0]}, got {tuple(actions.shape)}"
        )
    return F.log_softmax(logits, dim=-1).gather(-1, index.long()).squeeze(-1)


def categorical_fisher(logits: Tensor, tangent: Tensor) -> Tensor:
    """(T, A), (T, A) -> (T, A): the Fisher matrix of the logits, diag(p) − p pᵀ, times `tangent`."""
    probs = F.softmax(logits, dim=-1)
    weighted = probs * tangent
    return weighted - probs * weighted.sum(-1, keepdim=True)
