"""The implicit gradient of any bilevel problem: min_x F(x, y*(x)) with y*(x) = argmin_y g(x, y).

dF/dx = ∂F/∂x − (∂²g/∂x∂y) (∂²g/∂y² + damping)^{-1} ∂F/∂y        (implicit function theorem)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..trajectories import require_finite
from .flat import (
    autocast_off,
    autocast_uncached,
    check_uniform,
    differentiating,
    flat_grad,
    flatten,
    gradients,
    refuse_once_differentiable,
    trainable_parameters,
    unflatten,
)
from .result import ErrorEstimate, Hypergradient, warn_about
from .solvers import BIAS_RTOL, CG, Damped, Damping, Solver, check_damping, looser, solve_with_automatic_damping

Params = Mapping[str, Tensor] | nn.Module
Loss = Callable[[dict[str, Tensor], dict[str, Tensor]], Any]
_DEFAULT_SOLVER = CG()


@differentiating
def implicit_gradient(
    upper_loss: Loss,
    lower_loss: Loss,
    upper_params: Params,
    lower_params: Params,
    *,
    solver: Solver = _DEFAULT_SOLVER,
    damping: Damping = 0.0,
    x0: Tensor | None = None,
    has_aux: bool = False,
    estimate_error: bool = False,
) -> Hypergradient:
    """Gradient of the upper loss with respect to `upper_params`, with `lower_params` at the lower loss's minimum.

    Args:
        upper_loss, lower_loss: (upper_params, lower_params) -> scalar tensor; both are minimised. They get dicts of
            tensors and must compute with those; for a module that is `torch.func.functional_call(module, params, …)`.
        upper_params, lower_params: dicts of real floating-point tensors, all of whose entries are unknowns, or modules,
            whose unknowns are the parameters that require a gradient, by the names of `named_parameters`. The same
            tensor object under two names is one unknown; one that merely shares its memory, such as `x.detach()`, is
            another. `lower_params` should minimise the lower loss.
        solver: for the system with the lower Hessian.
        damping: added to the lower Hessian, once; it biases the result towards the direct term, by how much
            `estimate_error` tells. "auto" chooses it by the rule of `parl_core.hypergrad.automatic_damping`, and always
            tells.
        x0: (P,) warm start of the solve, P being the number of lower unknowns; such as the previous `solution.value`.
        has_aux: the upper loss returns (scalar, aux), and aux is found in `result.aux` as it came: a tensor in it still
            hangs on the loss's graph, so detach what is kept.
        estimate_error: `result.error.damping_bias`, to first order in the damping, so that a bias near the size of the
            implicit term says no more than that the damping is too large. It costs a second solve, to a relative
            residual of 1%, and one backward pass through the lower gradient.

    Returns:
        `Hypergradient`, flat over the upper unknowns in their order; `.backward()` adds it to those of them that require
        a gradient.

    Under autocast the losses run as autocast has them, everything else in the parameters' dtype. Where that is bfloat16
    or float16, products are computed in it and the system is solved in float32. Either way products are exact to no more
    than the short dtype's digits: expect `STAGNATED` or `MAX_ITERATIONS` unless the solver's rtol is loosened to 1e-2.

    Raises:
        TypeError, ValueError: complex or integer parameters, no parameters, a tensor whose elements share memory (an
            expanded view), one tensor on both levels, a loss that is not a real scalar; the message names it.
        NonFiniteError: a loss is NaN or infinite.

    Warns:
        HypergradientWarning: the solve did not converge, the lower level is not at a minimum, or a term is not finite.
    """
    if isinstance(solver, type):
        raise TypeError(f"solver must be an instance, got the class: write {solver.__name__}(…)")
    check_damping(damping)
    upper_given, lower_given = _named(upper_params, "upper_params"), _named(lower_params, "lower_params")
    _refuse_shared(upper_given, lower_given)
    upper, xs = _leaves(upper_given)
    lower, ys = _leaves(lower_given)

    with autocast_uncached():
        upper_value, aux = _split(upper_loss(dict(upper), dict(lower)), has_aux)
        upper_value = _scalar("upper_loss", upper_value)
        lower_value = _scalar("lower_loss", lower_loss(dict(upper), dict(lower)))

    with autocast_off(ys[0].device):
        one = torch.ones_like(lower_value).requires_grad_()  # only then does torch mark once-differentiable functions
        lower_gradient = gradients([lower_value], ys, [one], create_graph=True)
        refuse_once_differentiable(lower_gradient, "lower_loss")
        derivative = gradients([upper_value], [*xs, *ys], [torch.ones_like(upper_value)])
        direct, rhs = flatten(derivative[: len(xs)]), flatten(derivative[len(xs) :])

        lifted = rhs.to(torch.promote_types(rhs.dtype, torch.float32))
        hessian = _Hessian(lower_gradient, ys)
        if damping == "auto":
            operator, solution = solve_with_automatic_damping(solver, hessian, lifted, x0)
        else:
            operator = Damped(hessian, damping)
            solution = solver(operator, lifted, x0)

        def cross_term(w: Tensor) -> Tensor:
            return -flat_grad(lower_gradient, xs, unflatten(w.to(rhs.dtype), ys), retain_graph=True)

        implicit, error = cross_term(solution.value), None
        if estimate_error or damping == "auto":  # to first order, g changes by −damping · C A⁻² b
            moved = looser(solver, BIAS_RTOL)(operator, solution.value).value
            error = ErrorEstimate(damping_bias=-solution.damping * cross_term(moved))
    result = Hypergradient(
        direct=direct,
        implicit=implicit,
        regularizer=torch.zeros_like(direct),
        solution=solution,
        parameters=_distinct(upper_given.values()),
        error=error,
        aux=aux,
    )
    warn_about(
        result, "lower_params is not at a local minimum of lower_loss: minimise it further or add damping", stacklevel=3
    )
    return result


class _Hessian:
    def __init__(self, gradient: list[Tensor], params: list[Tensor]) -> None:
        self._gradient, self._params = gradient, params

    def __call__(self, vector: Tensor) -> Tensor:
        pieces = unflatten(vector.to(self._params[0].dtype), self._params)
        return flat_grad(self._gradient, self._params, pieces, retain_graph=True).to(vector.dtype)


def _named(params: Params, role: str) -> dict[str, Tensor]:
    if isinstance(params, nn.Module):
        named: dict[str, Tensor] = dict(trainable_parameters(params, role))
    elif isinstance(params, Mapping) and params:
        named = dict(params)
    else:
        came = "an empty one" if isinstance(params, Mapping) else type(params).__name__
        raise TypeError(f"{role} must be a non-empty dict of tensors or an nn.Module, got {came}")
    for key, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{role}['{key}'] must be a tensor, got {type(tensor).__name__}")
    check_uniform(named, role)
    for key, tensor in named.items():
        if _overlaps_itself(tensor):
            raise ValueError(
                f"{role}['{key}'] must hold each element in memory of its own, got a view of shape "
                f"{tuple(tensor.shape)} and strides {tensor.stride()}: pass the tensor it views, or a clone"
            )
    return named


def _refuse_shared(upper: dict[str, Tensor], lower: dict[str, Tensor]) -> None:
    upper_keys = {id(tensor): key for key, tensor in upper.items()}
    for key, tensor in lower.items():
        if id(tensor) in upper_keys:
            raise ValueError(
                f"upper_params['{upper_keys[id(tensor)]}'] and lower_params['{key}'] are the same tensor: an unknown "
                "belongs to one level only"
            )


def _leaves(named: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Copies that the losses compute with, under the same names, and each of them once."""
    copies = {id(tensor): tensor.detach().clone().requires_grad_() for tensor in _distinct(named.values())}
    return {key: copies[id(tensor)] for key, tensor in named.items()}, list(copies.values())


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory."""
    if tensor.numel() == 0:
        return False
    dims = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    reach = 0  # of the dimensions before, in elements
    for stride, size in dims:
        if stride == 0:
            return True
        if stride <= reach:  # interleaved, which need not mean shared
            return _offsets(dims).unique().numel() < tensor.numel()
        reach += stride * (size - 1)
    return False


def _offsets(dims: Sequence[tuple[int, int]]) -> Tensor:
    offsets = torch.zeros(1, dtype=torch.int64)
    for stride, size in dims:
        offsets = (offsets[:, None] + stride * torch.arange(size)).reshape(-1)
    return offsets


def _split(returned: Any, has_aux: bool) -> tuple[Any, object]:
    if not has_aux:
        return returned, None
    if not isinstance(returned, tuple) or len(returned) != 2:
        came = f"{len(returned)} values" if isinstance(returned, tuple) else type(returned).__name__
        raise TypeError(f"upper_loss must return (scalar, aux), since has_aux is True, got {came}")
    return returned


def _scalar(role: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        came = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{role} must return a real scalar tensor, got {came}")
    require_finite(role, value.detach())
    return value.reshape(())
