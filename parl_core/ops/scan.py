"""Discounted returns and prefix sums along trajectories: recurrences (`recurrence.py`) with one coefficient."""

from __future__ import annotations

from torch import Tensor

from .recurrence import recurrence
from .segments import check_fraction, check_steps


def discounted_returns(
    rewards: Tensor, discount: float, offsets: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Discounted return from every step to the end of its trajectory: G_h = Σ_{k≥h} discount^{k−h} r_k.

    Sutton & Barto, Reinforcement Learning (2018), equation 3.8. Differentiable in `rewards`, at any order.

    Args:
        rewards: (T,), floating point, the trajectories one after another; or (N, H), one in each row.
        discount: in [0, 1]; a number, not differentiated.
        offsets: (N+1,), int64, on the device of `rewards`; trajectory n is rewards[offsets[n]:offsets[n+1]]
            and may be empty. None: the rows, or a single trajectory.
        backend: see `available_backends()`; None: the innermost `with backend(…)`, or else the device's best.

    Returns:
        In the shape, in the dtype and on the device of `rewards`.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device or discount, or offsets that do not cover the rewards.
        BackendError: the backend asked for cannot be used here.
    """
    check_steps(offsets, rewards=rewards)
    return recurrence(rewards, check_fraction("discount", discount), offsets, reverse=True, backend=backend)


def prefix_sum(values: Tensor, offsets: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Inclusive running sum, restarted in every trajectory: y_h = Σ_{j≤h} x_j.

    Differentiable in `values`, at any order.

    Args:
        values: (T,), floating point, the trajectories one after another; or (N, H), one in each row.
        offsets: (N+1,), int64, on the device of `values`; trajectory n is values[offsets[n]:offsets[n+1]]
            and may be empty. None: the rows, or a single trajectory.
        backend: see `available_backends()`; None: the innermost `with backend(…)`, or else the device's best.

    Returns:
        In the shape, in the dtype and on the device of `values`.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape or device, or offsets that do not cover the values.
        BackendError: the backend asked for cannot be used here.
    """
    check_steps(offsets, values=values)
    return recurrence(values, 1.0, offsets, reverse=False, backend=backend)
