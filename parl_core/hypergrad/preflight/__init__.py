"""Before the first solve: what in a policy or reward would break or silently corrupt its second derivatives."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import takes_offsets
from .dynamic import examine_call
from .findings import Finding, Preflight, Severity
from .static import UNCALLABLE, examine_modules

__all__ = ["Finding", "Preflight", "Severity", "preflight"]


def preflight(module: nn.Module, *example_inputs: Any, method: str | None = None) -> Preflight:
    """Name what would break or silently corrupt second-order differentiation of `module`, and what to use instead.

    Without example inputs the submodules, their parameters and the code of their methods are examined. With them a copy
    of the module is also called and differentiated: twice in its own dtype, for kernels without a second derivative,
    once-differentiable functions, randomness and NaN; and in float64, where J v and H v by double backward are held
    against central finite differences along three directions. That canary sees a loss that computes its gradient in
    forward, a detached branch or a straight-through estimator. `module` itself, its gradients and the global random
    state are left as they were.

    Args:
        module: a policy, a reward, or any module whose parameters are to be differentiated twice.
        example_inputs: what the method takes, e.g. observations (T, do) and actions (T, da); a few rows suffice. A
            method with a parameter `offsets` that is left out is told that all rows are one trajectory.
        method: the method to examine; by default `log_prob` where the module has it, otherwise `forward`.

    Raises:
        TypeError: `module` is not a module, or has no such method.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    name = method or ("log_prob" if callable(getattr(module, "log_prob", None)) else "forward")
    if not callable(getattr(module, name, None)):
        raise TypeError(f"module ({type(module).__name__}) has no method '{name}'")
    findings = examine_modules(module, name)
    settled: set[str] | None = None
    if example_inputs and not any(f.kind in UNCALLABLE and f.severity is Severity.ERROR for f in findings):
        # In a no_grad block of the caller the checks would see no graph.
        with torch.inference_mode(False), torch.enable_grad():
            offsets = _left_out_offsets(getattr(module, name), example_inputs)
            settled, seen = examine_call(module, example_inputs, offsets, name)
        findings = [f for f in findings if f.kind not in (settled or ())]
        known = {(f.kind, f.where) for f in findings}
        findings += dict.fromkeys(f for f in seen if (f.kind, f.where) not in known)
    order = list(Severity)
    return Preflight(
        findings=tuple(sorted(findings, key=lambda f: order.index(f.severity))),
        subject=f"{type(module).__name__}.{name}",
        called=settled is not None,
    )


def _left_out_offsets(method: Callable[..., Any], inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """Offsets that make one trajectory of all rows, if the method takes some and the inputs end before them."""
    rows = [t for t in inputs if isinstance(t, Tensor) and t.dim() > 0]
    if not rows or not takes_offsets(method):
        return {}
    try:
        given = inspect.signature(method).bind_partial(*inputs).arguments
    except TypeError:  # more inputs than it takes, which the call will tell
        return {}
    return {} if "offsets" in given else {"offsets": torch.tensor([0, len(rows[0])], device=rows[0].device)}
