"""Differentiable operations on ragged trajectories, each with a plain reference and faster backends.

Ragged data is a flat tensor (T,) and `offsets` (N+1,) int64: trajectory n is values[offsets[n]:offsets[n+1]].
"""

from .f_divergence import f_divergence
from .f_divergence_bound import f_divergence_bound
from .f_divergence_closed import categorical_f_divergence, gaussian_f_divergence
from .registry import BackendError, available_backends, backend, support_table
from .scan import discounted_returns, prefix_sum

__all__ = [
    "BackendError",
    "available_backends",
    "backend",
    "categorical_f_divergence",
    "discounted_returns",
    "f_divergence",
    "f_divergence_bound",
    "gaussian_f_divergence",
    "prefix_sum",
    "support_table",
]
