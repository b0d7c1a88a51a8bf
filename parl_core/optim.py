"""Adam's step as one native call, on the state of a `torch.optim.Adam`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .ops.registry import Op


def adam_step(optimizer: torch.optim.Adam, *, backend: str | None = None) -> None:
    """What `optimizer.step()` does, with less overhead; the two may take turns.

    Args:
        optimizer: parameters without a gradient are left alone. With weight decay, hooks, a learning-rate scheduler or
            anything else that the native call does not know, it is `optimizer.step()` itself.
        backend: "reference" for `optimizer.step()` itself; None: the innermost `with backend(…)`, or else the best.

    Raises:
        TypeError: it is no Adam.
        BackendError: the backend asked for cannot be used here.
    """
    if not isinstance(optimizer, torch.optim.Adam):
        raise TypeError(f"optimizer must be a torch.optim.Adam, got {type(optimizer).__name__}")
    param = next((param for group in optimizer.param_groups for param in group["params"]), None)
    name = "reference" if param is None else _OP.select(param, backend)
    _OP.kernel(name if name == "reference" or is_plain_adam(optimizer) else "reference")(optimizer)


def is_bare_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of `optimizer` is torch's own of Adam, and runs no hook and no learning-rate scheduler."""
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    # A learning-rate scheduler counts the steps by a `step` of the instance's own.
    return type(optimizer) is torch.optim.Adam and not any(hooks) and "step" not in vars(optimizer)


def is_plain_adam(optimizer: torch.optim.Adam) -> bool:
    """Whether a step of `optimizer` is nothing but Adam's update of contiguous tensors on the CPU."""
    return is_bare_adam(optimizer) and all(_is_plain(group, optimizer.state) for group in optimizer.param_groups)


def adam_state(optimizer: torch.optim.Adam, param: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`exp_avg`, `exp_avg_sq` and `step` of a parameter, begun as Adam itself would begin them."""
    state = optimizer.state[param]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
        state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
    return state["exp_avg"], state["exp_avg_sq"], state["step"]


def _is_plain(group: dict[str, Any], states: Mapping[Tensor, dict[str, Any]]) -> bool:
    options = ("weight_decay", "amsgrad", "maximize", "capturable", "differentiable")
    if any(group[name] for name in options) or any(isinstance(x, Tensor) for x in (group["lr"], *group["betas"])):
        return False
    first = group["params"][0].dtype if group["params"] else None
    for param in group["params"]:
        state = states.get(param)
        # torch's own step counts in the default dtype unless it is fused.
        if state and getattr(state["step"], "dtype", None) != torch.float32:
            return False
        if not (param.is_contiguous() and param.is_cpu and param.dtype == first):
            return False
    return True


def _reference(optimizer: torch.optim.Adam) -> None:
    optimizer.step()


def _native(optimizer: torch.optim.Adam) -> None:
    native = importlib.import_module("parl_core._native")
    for group in optimizer.param_groups:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            continue
        exp_avgs, exp_avg_sqs, steps = (
            list(some) for some in zip(*(adam_state(optimizer, param) for param in params), strict=True)
        )
        native.adam(
            params,
            [param.grad.contiguous() for param in params],
            exp_avgs,
            exp_avg_sqs,
            steps,
            group["lr"],
            *group["betas"],
            group["eps"],
            torch.get_num_threads(),
        )


_OP = Op("adam_step", _reference)
_OP.register("cpp", lambda: _native, device_types=frozenset({"cpu"}), dtypes=frozenset({torch.float32, torch.float64}))
