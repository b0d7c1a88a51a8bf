"""V-trace, the off-policy correction of IMPALA, Espeholt et al., ICML 2018."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

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


class VTrace(NamedTuple):
    """What `vtrace` returns, both in the shape of the rewards."""

    targets: Tensor
    """v_h, what the value function is to be fitted to."""
    advantages: Tensor
    """ρ_h (r_h + discount · v_{h+1} − V(s_h)), the weight of ∇ log π(a_h|s_h) in the policy gradient."""


def vtrace(
    log_ratios: Tensor,
    rewards: Tensor,
    values: Tensor,
    discount: float,
    offsets: Tensor | None = None,
    *,
    bootstrap: Tensor | None = None,
    trace_lambda: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    backend: str | None = None,
) -> VTrace:
    """Value targets and policy-gradient advantages from data of another policy, with clipped importance ratios.

        v_h = V(s_h) + δ_h + discount · c_h · (v_{h+1} − V(s_{h+1}))
        δ_h = ρ_h (r_h + discount · V(s_{h+1}) − V(s_h))
        ρ_h = min(rho_clip, π/μ),  c_h = trace_lambda · min(c_clip, π/μ)

    Espeholt et al. (2018), IMPALA, equation 1, remarks 1 and 2, and section 4.2. On-policy, with clips of at least 1,
    the targets are `td_lambda`'s. Differentiable in every tensor, at any order; a ratio above its clip has no
    derivative. In an actor-critic both results are used detached.

    Args:
        log_ratios: (T,), log π(a_h|s_h) − log μ(a_h|s_h) of the policy being learned and the one that acted,
            floating point, the trajectories one after another; or (N, H), one in each row.
        rewards: like `log_ratios`.
        values: V(s_h), like `log_ratios`.
        discount: in [0, 1]; a number, not differentiated.
        offsets: (N+1,), int64, on the device of `rewards`; trajectory n is rewards[offsets[n]:offsets[n+1]]
            and may be empty. None: the rows, or a single trajectory.
        bootstrap: (N,), V of the state that follows each trajectory's last step: its value where the trajectory was
            cut (truncated, or the rollout ended), 0 where the episode terminated. None: zeros.
        trace_lambda: λ in [0, 1].
        rho_clip: ρ̄ > 0, decides which policy's values are learned; may be infinite.
        c_clip: c̄ > 0, decides how fast, and with how much variance; may be infinite.
        backend: see `available_backends()`; None: the innermost `with backend(…)`, or else the device's best.

    Returns:
        `VTrace(targets, advantages)`, each in the shape, in the dtype and on the device of `rewards`.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device or number, or offsets that do not cover the rewards.
        BackendError: the backend asked for cannot be used here.
    """
    check_steps(offsets, rewards=rewards, values=values, log_ratios=log_ratios)
    check_bootstrap(bootstrap, rewards, offsets)
    discount = check_fraction("discount", discount)
    trace_lambda = check_fraction("trace_lambda", trace_lambda)
    rho_clip, c_clip = _check_clip("rho_clip", rho_clip), _check_clip("c_clip", c_clip)
    chosen = None if is_traced(rewards) else _OP.select(rewards, backend)
    if chosen is None or is_differentiated(log_ratios, rewards, values, bootstrap, offsets):
        check_hidden_offsets(offsets, rewards)
        dtype, wide = rewards.dtype, dtype_of_sums(rewards)
        rewards, values, ratios = rewards.to(wide), values.to(wide), log_ratios.to(wide).exp()
        edge = None if bootstrap is None else bootstrap.to(wide)
        rho, c = ratios.clamp(max=rho_clip), discount * trace_lambda * ratios.clamp(max=c_clip)
        errors = rho * (rewards + discount * neighbour(values, offsets, reverse=True, edge=edge) - values)
        targets = values + recurrence(errors, c, offsets, reverse=True, backend=backend)
        next_targets = neighbour(targets, offsets, reverse=True, edge=edge)
        return VTrace(targets.to(dtype), (rho * (rewards + discount * next_targets - values)).to(dtype))
    kernel: Callable[..., Any] = _OP.kernel(chosen)
    return VTrace(
        *kernel(
            plain(log_ratios),
            plain(rewards),
            plain(values),
            None if bootstrap is None else plain(bootstrap),
            plain_offsets(offsets, rewards, chosen),
            discount,
            trace_lambda,
            rho_clip,
            c_clip,
        )
    )


def reference(
    log_ratios: Tensor,
    rewards: Tensor,
    values: Tensor,
    bootstrap: Tensor | None,
    offsets: Tensor | None,
    discount: float,
    trace_lambda: float,
    rho_clip: float,
    c_clip: float,
) -> tuple[Tensor, Tensor]:
    """The specification, on any device: pad to (horizon, N), loop over time, and take the steps back out."""
    offsets = as_offsets(rewards, offsets)
    r, v = time_major(rewards, offsets), time_major(values, offsets)
    ratios = time_major(log_ratios, offsets).exp()
    rho, c = ratios.clamp(max=rho_clip), trace_lambda * ratios.clamp(max=c_clip)
    horizon, number = r.shape
    next_value = r.new_zeros(number) if bootstrap is None else bootstrap.to(r.dtype)
    next_target = next_value
    targets, advantages = torch.empty_like(r), torch.empty_like(r)
    for h in reversed(range(horizon)):
        inside = h < offsets.diff()  # (N,)
        error = rho[h] * (r[h] + discount * next_value - v[h])
        # At a last step the difference is 0, whatever its ratio.
        correction = torch.where(h + 1 < offsets.diff(), discount * c[h] * (next_target - next_value), 0)
        targets[h] = v[h] + error + correction
        advantages[h] = rho[h] * (r[h] + discount * next_target - v[h])
        next_target = torch.where(inside, targets[h], next_target)
        next_value = torch.where(inside, v[h], next_value)
    return from_time_major(targets, offsets, rewards), from_time_major(advantages, offsets, rewards)


def _load_cpp() -> Kernel:
    native = importlib.import_module("parl_core._native").vtrace

    def cpp(
        log_ratios: Tensor,
        rewards: Tensor,
        values: Tensor,
        bootstrap: Tensor | None,
        offsets: Tensor | None,
        *numbers: float,
    ) -> tuple[Tensor, Tensor]:
        targets, advantages = torch.empty_like(rewards), torch.empty_like(rewards)
        threads = torch.get_num_threads()
        native(log_ratios, rewards, values, bootstrap, offsets, targets, advantages, *numbers, threads)
        return targets, advantages

    return cast(Kernel, cpp)


def _load_numba() -> Kernel:
    kernel: Callable[..., None] = importlib.import_module("parl_core.kernels.numba_scan").vtrace

    def numba(
        log_ratios: Tensor,
        rewards: Tensor,
        values: Tensor,
        bootstrap: Tensor | None,
        offsets: Tensor | None,
        *numbers: float,
    ) -> tuple[Tensor, Tensor]:
        targets, advantages = torch.empty_like(rewards), torch.empty_like(rewards)
        offsets = as_offsets(rewards, offsets)
        if bootstrap is None:
            bootstrap = rewards.new_zeros(len(offsets) - 1)
        arrays = (log_ratios, rewards, values, bootstrap, offsets, targets, advantages)
        kernel(*(tensor.view(-1).numpy() for tensor in arrays), *numbers, torch.get_num_threads())
        return targets, advantages

    return cast(Kernel, numba)


_OP = Op("vtrace", cast(Kernel, reference))
_OP.register("numba", _load_numba, device_types=ON_CPU, dtypes=SINGLE_AND_DOUBLE)
_OP.register("cpp", _load_cpp, device_types=ON_CPU, dtypes=SINGLE_AND_DOUBLE)
_OP.register(
    "triton", kernel_in("parl_core.kernels.triton_scan", "vtrace"), device_types=triton_devices(), dtypes=HALF_TO_DOUBLE
)
_OP.register(
    "cuda", kernel_in("parl_core.ops.cuda_scans", "vtrace"), device_types=cuda_devices(), dtypes=BFLOAT_TO_DOUBLE
)


def _check_clip(name: str, value: float) -> float:
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a Tensor: nothing is differentiated in it")
    if not value > 0.0:
        raise ValueError(f"{name} must be positive, got {value}")
    return float(value)
