"""Log-probabilities of a categorical distribution given by logits, and its Fisher matrix; differentiable at any order.

For policies over a few actions as for language models, whose V reaches 262 144: what the kernels (of Triton) read and write
at first and second order is the logits, the tangent and the result. See `categorical_autograd` for how the derivatives are
made of each other.
"""

from __future__ import annotations

from torch import Tensor

from ..offsets import reads_are_free
from . import categorical_compiled  # noqa: F401  (registers the nodes)
from .categorical_autograd import Compiled, Via, fisher, value
from .categorical_terms import FISHER, KERNEL_DEVICES, VALUE, log_prob_of, reference_fisher
from .registry import Op
from .segments import check_like, is_traced, is_wrapped


def categorical_log_prob(logits: Tensor, actions: Tensor, *, backend: str | None = None) -> Tensor:
    """log softmax(logits)[action] of every step, differentiable in `logits` at any order.

    −∞ among a step's logits is a probability of 0, with derivatives of 0; an action that has it gives −∞. An action
    outside of 0 … V−1 is an IndexError where the reference runs on the CPU. On a GPU, where the host does not wait to look,
    the reference fails a device-side assertion, and kernels return NaN for that step and its gradient.

    Args:
        logits: (T, V), floating point, unnormalised.
        actions: (T,) or (T, 1), integers.
        backend: see `available_backends()`; None: the innermost `with backend(…)`, or else the device's best.

    Returns:
        (T,), natural logarithms in the dtype of `logits`; half precision is summed in single.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape or device.
        IndexError: an action outside of 0 … V−1, see above.
        BackendError: the backend asked for cannot be used here.
    """
    actions = _check(logits, actions)
    via = _route(VALUE, logits, backend)
    if via != "reference":
        return value(logits, actions, via)[0]
    _check_range(logits, actions)
    return log_prob_of(logits, actions)


def categorical_fisher(logits: Tensor, tangent: Tensor, *, backend: str | None = None) -> Tensor:
    """The Fisher matrix of every step's logits, diag(p) − p pᵀ, times `tangent`: differentiable at any order.

    Args:
        logits: (T, V), floating point, unnormalised.
        tangent: (T, V), in the dtype of `logits`.
        backend: as for `categorical_log_prob`.

    Returns:
        (T, V), in the dtype of `logits`.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape or device.
        BackendError: the backend asked for cannot be used here.
    """
    _check_logits(logits)
    check_like("tangent", tangent, "logits", logits)
    if tangent.shape != logits.shape:
        raise ValueError(f"tangent must have the shape of logits, {tuple(logits.shape)}, got {tuple(tangent.shape)}")
    via = _route(FISHER, logits, backend)
    if via == "reference":
        return reference_fisher(logits, None, tangent, None)[1]
    return fisher(logits, None, None, tangent, None, via)[1]


def _route(op: Op, logits: Tensor, backend: str | None) -> Via:
    """Of the reference, autograd and torch.compile see the formulas themselves."""
    if not is_traced(logits):
        return op.select(logits, backend)
    return Compiled(backend) if logits.device.type in KERNEL_DEVICES else "reference"


def _check(logits: Tensor, actions: Tensor) -> Tensor:
    """The actions as (T,) int64."""
    _check_logits(logits)
    if not isinstance(actions, Tensor):
        raise TypeError(f"actions must be a Tensor, got {type(actions).__name__}")
    if actions.is_floating_point() or actions.is_complex():
        raise TypeError(f"actions must be integers, got {actions.dtype}")
    steps = logits.shape[0]
    if actions.shape not in ((steps,), (steps, 1)):
        raise ValueError(f"actions must have shape (T,) or (T, 1) with T = {steps}, got {tuple(actions.shape)}")
    if actions.device != logits.device:
        raise ValueError(f"actions must be on the device of logits, {logits.device}, got {actions.device}")
    return actions.reshape(steps).long()


def _check_range(logits: Tensor, actions: Tensor) -> None:
    """Refuse actions that there are not, where looking costs nothing."""
    if not actions.numel() or not reads_are_free(actions.device) or is_traced(actions) or is_wrapped(actions):
        return
    low, high = actions.aminmax()
    if low < 0 or high >= logits.shape[1]:
        wrong = low if low < 0 else high
        raise IndexError(f"actions must be in 0 … V−1 with V = {logits.shape[1]}, got {wrong.item()}")


def _check_logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a Tensor, got {type(logits).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be of a floating-point dtype, got {logits.dtype}")
    if logits.dim() != 2:
        raise ValueError(f"logits must be of shape (T, V), got {tuple(logits.shape)}")
