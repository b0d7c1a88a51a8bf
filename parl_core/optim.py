"""Adam's step as one native call, on the state of a `torch.optim.Adam`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .ops.registry import Op


def adam_step(optimizer: torch.optim.Adam, *, backend: str | None = None) -> None:
    """What `optimizer.step()` does, with less overhead; the two may take turns.

    Args:
        optimizer: one without weight decay, `amsgrad`, `maximize` or `capturable`; parameters without a gradient are
            left alone.
        backend: "reference" for `optimizer.step()` itself; None: the innermost `with backend(…)`, or else the best.

    Raises:
        BackendError: the backend asked for cannot be used here.
    """
    param = optimizer.param_groups[0]["params"][0]
    name = _OP.select(param, backend)
    _OP.kernel(name if all(map(_is_plain, optimizer.param_groups)) else "reference")(optimizer)


def adam_state(optimizer: torch.optim.Adam, param: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`exp_avg`, `exp_avg_sq` and `step` of a parameter, begun as Adam itself would begin them."""
    state = optimizer.state[param]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
        state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
    return state["exp_avg"], state["exp_avg_sq"], state["step"]


def _is_plain(group: dict[str, Any]) -> bool:
    unusual = group["weight_decay"] or any(group[name] for name in ("amsgrad", "maximize", "capturable"))
    first = group["params"][0].dtype
    return not unusual and all(
        param.is_contiguous() and param.is_cpu and param.dtype == first for param in group["params"]
    )


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
