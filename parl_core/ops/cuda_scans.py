"""The scans in CUDA C++ (csrc/cuda/scan.h), with the signatures of the ops' references.

Outputs and workspace are torch's memory, so that a CUDA graph that holds the launches holds what they use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .accelerators import cuda_library, cuda_stream


def recurrence(values: Tensor, coefficients: Tensor | float, offsets: Tensor | None, reverse: bool) -> Tensor:
    """`recurrence.reference`, of either op."""
    out, workspace, stream = torch.empty_like(values), _workspace(values, offsets), cuda_stream(values)
    if isinstance(coefficients, Tensor):
        cuda_library().linear_recurrence(values, coefficients, offsets, out, reverse, workspace, stream)
    else:
        cuda_library().discounted_scan(values, coefficients, offsets, out, reverse, workspace, stream)
    return out


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    bootstrap: Tensor | None,
    offsets: Tensor | None,
    discount: float,
    trace_lambda: float,
    add_values: bool,
) -> Tensor:
    """`gae.reference`."""
    out, workspace, stream = torch.empty_like(rewards), _workspace(rewards, offsets), cuda_stream(rewards)
    cuda_library().lambda_returns(
        rewards, values, bootstrap, offsets, out, discount, trace_lambda, add_values, workspace, stream
    )
    return out


def vtrace(
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
    """`vtrace.reference`."""
    targets, advantages = torch.empty_like(rewards), torch.empty_like(rewards)
    numbers = (discount, trace_lambda, rho_clip, c_clip, _workspace(rewards, offsets), cuda_stream(rewards))
    cuda_library().vtrace(log_ratios, rewards, values, bootstrap, offsets, targets, advantages, *numbers)
    return targets, advantages


def _workspace(steps: Tensor, offsets: Tensor | None) -> Tensor | None:
    """Device memory for the scan of such steps, if it needs any."""
    horizon = steps.shape[-1]
    count = len(offsets) - 1 if offsets is not None else steps.numel() // horizon if horizon else 0
    size = cuda_library().scan_workspace(steps.numel(), count)
    return torch.empty(size, dtype=torch.uint8, device=steps.device) if size else None
