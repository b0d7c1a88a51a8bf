"""Differentiable operations on ragged trajectories, each with a plain reference and faster backends.

Ragged data is a flat tensor (T,) and `offsets` (N+1,) int64: trajectory n is values[offsets[n]:offsets[n+1]].
"""

from .ensemble_rewards import ensemble_rewards
from .preference_loss import PairsLoss, preference_loss
from .registry import BackendError, available_backends, backend, support_table
from .scan import discounted_returns, prefix_sum

__all__ = [
    "BackendError",
    "PairsLoss",
    "available_backends",
    "backend",
    "discounted_returns",
    "ensemble_rewards",
    "preference_loss",
    "prefix_sum",
    "support_table",
]
