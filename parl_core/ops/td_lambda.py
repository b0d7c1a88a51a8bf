"""λ-returns, the value targets of TD(λ): generalized advantage estimates (`gae.py`) plus the values."""

from __future__ import annotations

from torch import Tensor

from .gae import lambda_returns
from .segments import check_fraction


def td_lambda(
    rewards: Tensor,
    values: Tensor,
    discount: float,
    trace_lambda: float,
    offsets: Tensor | None = None,
    *,
    bootstrap: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """λ-returns: G_h = r_h + discount · ((1 − trace_lambda) · V(s_{h+1}) + trace_lambda · G_{h+1}).

    Beyond a trajectory's last step both V and G are `bootstrap`. Sutton & Barto, Reinforcement Learning (2018),
    equation 12.18. Differentiable in `rewards`, `values` and `bootstrap`, at any order; as the targets of a value
    function they are used detached.

    Args:
        rewards: (T,), floating point, the trajectories one after another; or (N, H), one in each row.
        values: V(s_h), like `rewards`; that of a trajectory's first step has no effect on its own target.
        discount: in [0, 1]; a number, not differentiated.
        trace_lambda: λ in [0, 1]; 0: one-step targets, 1: returns (with bootstrap).
        offsets: (N+1,), int64, on the device of `rewards`; trajectory n is rewards[offsets[n]:offsets[n+1]]
            and may be empty. None: the rows, or a single trajectory.
        bootstrap: (N,), V of the state that follows each trajectory's last step: its value where the trajectory was
            cut (truncated, or the rollout ended), 0 where the episode terminated. None: zeros.
        backend: see `available_backends()`; None: the innermost `with backend(…)`, or else the device's best.

    Returns:
        Value targets, in the shape, in the dtype and on the device of `rewards`.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device, discount or λ, or offsets that do not cover the rewards.
        BackendError: the backend asked for cannot be used here.
    """
    trace_lambda = check_fraction("trace_lambda", trace_lambda)
    return lambda_returns(rewards, values, discount, trace_lambda, offsets, bootstrap, backend, add_values=True)
