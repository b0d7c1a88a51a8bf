"""Differentiable operations on ragged trajectories, each with a plain reference and faster backends.

Ragged data is a flat tensor (T,) and `offsets` (N+1,) int64: trajectory n is values[offsets[n]:offsets[n+1]].
Trajectories of one length may come as rows (N, H) instead.
"""

from .categorical_log_prob import categorical_fisher, categorical_log_prob
from .ensemble_rewards import ensemble_rewards
from .f_divergence import f_divergence
from .f_divergence_bound import f_divergence_bound
from .f_divergence_closed import categorical_f_divergence, gaussian_f_divergence
from .gae import gae
from .gaussian_log_prob import gaussian_log_prob
from .preference_loss import PairsLoss, preference_loss
from .recurrence import linear_recurrence
from .registry import BackendError, available_backends, backend, support_table
from .scan import discounted_returns, prefix_sum
from .td_lambda import td_lambda
from .vtrace import VTrace, vtrace

__all__ = [
    "BackendError",
    "PairsLoss",
    "VTrace",
    "available_backends",
    "backend",
    "categorical_f_divergence",
    "categorical_fisher",
    "categorical_log_prob",
    "discounted_returns",
    "ensemble_rewards",
    "f_divergence",
    "f_divergence_bound",
    "gae",
    "gaussian_f_divergence",
    "gaussian_log_prob",
    "linear_recurrence",
    "preference_loss",
    "prefix_sum",
    "support_table",
    "td_lambda",
    "vtrace",
]
