"""Generalized advantage estimation, Schulman et al., ICLR 2016."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from .accelerators import BFLOAT_TO_DOUBLE, HALF_TO_DOUBLE, cuda_devices, triton_devices
from .recurrence import recurrence
from .registry import Kernel, Op, kernel_in
from .segments import (
    ON_CPU,
    SINGLE_AND_DOUBLE,
    as_offsets,
    check_bootstrap,
    check_fraction,
    check_hidden_offsets,
    check_steps,
    dtype_of_sums,
    from_time_major,
    is_differentiated,
    is_traced,
    neighbour,
    plain,
    plain_offsets,
    time_major,
)


def gae(
    rewards: Tensor,
    values: Tensor,
    discount: float,
    gae_lambda: float,
    offsets: Tensor | None = None,
    *,
    bootstrap: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Generalized advantage estimates: A_h = δ_h + discount · gae_lambda · A_{h+1}.

    δ_h = r_h + discount · V(s_{h+1}) − V(s_h) is the temporal-difference error, with `bootstrap` for the value after
    a trajectory's last step. Schulman et al. (2016), High-dimensional continuous control using generalized advantage
    estimation, equation 16. Differentiable in `rewards`, `values` and `bootstrap`, at any order. The value targets
    that belong to them, A_h + V(s_h), are `td_lambda`'s.

    Each trajectory is one stretch of an episode. Of a rollout in which environments were reset within a row, every
    episode is a trajectory of its own: flatten the rows and let `offsets` begin a new one after each reset.

    Args:
        rewards: (T,), floating point, the trajectories one after another; or (N, H), one in each row.
        values: V(s_h), like `rewards`.
        discount: in [0, 1]; a number, not differentiated.
        gae_lambda: λ in [0, 1]; 0: the errors δ, 1: returns (with bootstrap) minus values.
        offsets: (N+1,), int64, on the device of `rewards`; trajectory n is rewards[offsets[n]:offsets[n+1]]
            and may be empty. None: the rows, or a single trajectory.
        bootstrap: (N,), V of the state that follows each trajectory's last step: its value where the trajectory was
            cut (truncated, or the rollout ended), 0 where the episode terminated. None: zeros.
        backend: see `available_backends()`; None: the innermost `with backend(…)`, or else the device's best.

    Returns:
        Advantages, in the shape, in the dtype and on the device of `rewards`.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device, discount or λ, or offsets that do not cover the rewards.
        BackendError: the backend asked for cannot be used here.
    """
    trace_lambda = check_fraction("gae_lambda", gae_lambda)
    return lambda_returns(rewards, values, discount, trace_lambda, offsets, bootstrap, backend, add_values=False)


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    discount: float,
    trace_lambda: float,
    offsets: Tensor | None,
    bootstrap: Tensor | None,
    backend: str | None,
    *,
    add_values: bool,
) -> Tensor:
    """Generalized advantage estimates, plus the values if `add_values`."""
    check_steps(offsets, rewards=rewards, values=values)
    check_bootstrap(bootstrap, rewards, offsets)
    discount = check_fraction("discount", discount)
    chosen = None if is_traced(rewards) else _OP.select(rewards, backend)
    if chosen is None or is_differentiated(rewards, values, bootstrap, offsets):
        check_hidden_offsets(offsets, rewards)
        dtype, wide = rewards.dtype, dtype_of_sums(rewards)
        rewards, values = rewards.to(wide), values.to(wide)
        edge = None if bootstrap is None else bootstrap.to(wide)
        errors = rewards + discount * neighbour(values, offsets, reverse=True, edge=edge) - values
        advantages = recurrence(errors, discount * trace_lambda, offsets, reverse=True, backend=backend)
        return (advantages + values if add_values else advantages).to(dtype)
    return _OP.kernel(chosen)(
        plain(rewards),
        plain(values),
        None if bootstrap is None else plain(bootstrap),
        plain_offsets(offsets, rewards, chosen),
        discount,
        trace_lambda,
        add_values,
    )


def reference(
    rewards: Tensor,
    values: Tensor,
    bootstrap: Tensor | None,
    offsets: Tensor | None,
    discount: float,
    trace_lambda: float,
    add_values: bool,
) -> Tensor:
    """The specification, on any device: pad to (horizon, N), loop over time, and take the steps back out."""
    offsets = as_offsets(rewards, offsets)
    r, v = time_major(rewards, offsets), time_major(values, offsets)
    horizon, number = r.shape
    next_value = r.new_zeros(number) if bootstrap is None else bootstrap.to(r.dtype)
    advantage, out = r.new_zeros(number), torch.empty_like(r)
    for h in reversed(range(horizon)):
        inside = h < offsets.diff()  # (N,)
        error = r[h] + discount * next_value - v[h]
        advantage = torch.where(inside, error + discount * trace_lambda * advantage, 0)
        next_value = torch.where(inside, v[h], next_value)
        out[h] = advantage + v[h] if add_values else advantage
    return from_time_major(out, offsets, rewards)


def _load_cpp() -> Kernel:
    native = importlib.import_module("parl_core._native").lambda_returns

    def cpp(
        rewards: Tensor,
        values: Tensor,
        bootstrap: Tensor | None,
        offsets: Tensor | None,
        discount: float,
        trace_lambda: float,
        add_values: bool,
    ) -> Tensor:
        out = torch.empty_like(rewards)
        threads = torch.get_num_threads()
        native(rewards, values, bootstrap, offsets, out, discount, trace_lambda, add_values, threads)
        return out

    return cpp


def _load_numba() -> Kernel:
    kernel: Callable[..., None] = importlib.import_module("parl_core.kernels.numba_scan").lambda_returns

    def numba(
        rewards: Tensor,
        values: Tensor,
        bootstrap: Tensor | None,
        offsets: Tensor | None,
        discount: float,
        trace_lambda: float,
        add_values: bool,
    ) -> Tensor:
        out = torch.empty_like(rewards)
        offsets = as_offsets(rewards, offsets)
        if bootstrap is None:
            bootstrap = rewards.new_zeros(len(offsets) - 1)
        flat = (tensor.view(-1).numpy() for tensor in (rewards, values, bootstrap, offsets, out))
        kernel(*flat, discount, trace_lambda, add_values, torch.get_num_threads())
        return out

    return numba


_OP = Op("gae, td_lambda", reference)
_OP.register("numba", _load_numba, device_types=ON_CPU, dtypes=SINGLE_AND_DOUBLE)
_OP.register("cpp", _load_cpp, device_types=ON_CPU, dtypes=SINGLE_AND_DOUBLE)
_OP.register(
    "triton",
    kernel_in("parl_core.kernels.triton_scan", "lambda_returns"),
    device_types=triton_devices(),
    dtypes=HALF_TO_DOUBLE,
)
_OP.register(
    "cuda",
    kernel_in("parl_core.ops.cuda_scans", "lambda_returns"),
    device_types=cuda_devices(),
    dtypes=BFLOAT_TO_DOUBLE,
)
