"""The implicit gradient of any bilevel problem: min_x F(x, y*(x)) with y*(x) = argmin_y g(x, y).

dF/dx = ∂F/∂x − (∂²g/∂x∂y) (∂²g/∂y² + damping)^{-1} ∂F/∂y        (implicit function theorem)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..trajectories import require_finite
from .flat import check_uniform, differentiating, flat_grad, flatten, gradients, refuse_once_differentiable, unflatten
from .result import Hypergradient, warn_about
from .solvers import CG, Solver

Params = Mapping[str, Tensor]
_DEFAULT_SOLVER = CG()


@differentiating
def implicit_gradient(
    upper_loss: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor],
    lower_loss: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor],
    upper_params: Params,
    lower_params: Params,
    *,
    solver: Solver = _DEFAULT_SOLVER,
    damping: float = 0.0,
) -> Hypergradient:
    """Gradient of the upper loss with respect to `upper_params`, with `lower_params` at the lower loss's minimum.

    Args:
        upper_loss, lower_loss: (upper_params, lower_params) -> scalar tensor; both are minimised.
        upper_params, lower_params: dicts of real floating-point tensors; `lower_params` should minimise the lower loss.
        solver: for the system with the lower Hessian.
        damping: added to the lower Hessian, once; it biases the result towards the direct term.

    Returns:
        `Hypergradient`, flat over `upper_params` in the order of the dict; `.backward()` adds it to those of them that
        require a gradient.

    Raises:
        TypeError, ValueError: complex or integer parameters, no parameters, a loss that is not a scalar.
        NonFiniteError: a loss is NaN or infinite.
    """
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be finite and at least 0, got {damping}")
    upper = _leaves(upper_params, "upper_params")
    lower = _leaves(lower_params, "lower_params")
    xs, ys = list(upper.values()), list(lower.values())

    upper_value = _scalar("upper_loss", upper_loss(upper, lower))
    lower_value = _scalar("lower_loss", lower_loss(upper, lower))
    one = torch.ones_like(lower_value).requires_grad_()  # only then does torch mark once-differentiable functions
    lower_gradient = gradients([lower_value], ys, [one], create_graph=True)
    refuse_once_differentiable(lower_gradient, "lower_loss")
    derivative = gradients([upper_value], [*xs, *ys], [torch.ones_like(upper_value)])
    direct, rhs = flatten(derivative[: len(xs)]), flatten(derivative[len(xs) :])

    operator = _DampedHessian(lower_gradient, ys, damping)
    solution = solver(operator, rhs)
    implicit = -flat_grad(lower_gradient, xs, unflatten(solution.value, ys))
    result = Hypergradient(
        direct=direct,
        implicit=implicit,
        regularizer=torch.zeros_like(direct),
        solution=solution,
        parameters=list(upper_params.values()),
    )
    warn_about(
        result, "lower_params is not at a local minimum of lower_loss: minimise it further or add damping", stacklevel=3
    )
    return result


class _DampedHessian:
    def __init__(self, gradient: list[Tensor], params: list[Tensor], damping: float) -> None:
        self._gradient, self._params = gradient, params
        self.damping = damping

    def __call__(self, vector: Tensor) -> Tensor:
        pieces = unflatten(vector, self._params)
        image = flat_grad(self._gradient, self._params, pieces, retain_graph=True)
        return image.add(vector, alpha=self.damping) if self.damping else image


def _leaves(params: Params, name: str) -> dict[str, Tensor]:
    if not isinstance(params, Mapping) or not params:
        raise TypeError(f"{name} must be a non-empty dict of tensors, got {type(params).__name__}")
    for key, tensor in params.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}['{key}'] must be a tensor, got {type(tensor).__name__}")
    check_uniform(dict(params), name)
    return {key: tensor.detach().clone().requires_grad_() for key, tensor in params.items()}


def _scalar(name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return a scalar tensor, got {came}")
    require_finite(name, value.detach())
    return value.reshape(())
