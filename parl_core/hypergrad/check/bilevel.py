"""Two losses and their parameters as a problem to check, the default solver of its lower level, and a closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flat import check_uniform, differentiating, flat_grad, flatten, gradients, unflatten
from ..implicit import implicit_gradient
from ..result import Hypergradient
from ..solvers import CG
from .lower_level import Slopes
from .subject import Candidate, Options, Subject, check_extra, common_random_numbers, tolerance, with_every_solver

Params = dict[str, Tensor]
Loss = Callable[[Params, Params], Tensor]
Solve = Callable[[Params, Params], Params]
_GRADIENT_NORM = 1e-10


@dataclass
class BilevelProblem:
    """A problem of your own for `check_hypergradient`: min_x F(x, y*(x)) with y*(x) = argmin_y g(x, y).

    >>> import torch
    >>> import parl_core as parl
    >>> double = dict(dtype=torch.float64)
    >>> problem = parl.BilevelProblem(
    ...     upper_loss=lambda x, y: ((y["w"] - 1.0) ** 2).sum(),
    ...     lower_loss=lambda x, y: ((y["w"] - x["a"]) ** 2).sum() + 0.1 * (y["w"] ** 4).sum(),
    ...     upper_params={"a": torch.tensor([0.5, 2.0], **double)},
    ...     lower_params={"w": torch.zeros(2, **double)},
    ... )
    >>> table = parl.check_hypergradient(problem)
    >>> {row.name: row.relative_error < 1e-8 for row in table.rows[:3]}
    {'CG': True, 'MINRES': True, 'NystromPCG': True}
    """

    upper_loss: Loss
    """F, (upper_params, lower_params) -> scalar tensor."""
    lower_loss: Loss
    """g, as `upper_loss`."""
    upper_params: Mapping[str, Tensor]
    """x, as in `implicit_gradient`."""
    lower_params: Mapping[str, Tensor]
    """y, where the lower solve starts; it need not be at the minimum."""
    solve: Solve | None = None
    """(upper_params, lower_params) -> lower_params at the minimum of g, starting from those given; copies are passed. Left
    out, Newton's method in float64, behind L-BFGS where it does not get there, to a gradient norm of 1e-10; both losses
    must then take float64 parameters."""
    name: str = "bilevel problem"
    """For the header of the table."""

    def __post_init__(self) -> None:
        for name in ("upper_params", "lower_params"):
            params = getattr(self, name)
            if not isinstance(params, Mapping) or not params:
                raise TypeError(f"{name} must be a non-empty dict of tensors, got {type(params).__name__}")
            for key, tensor in params.items():
                if not isinstance(tensor, Tensor):
                    raise TypeError(f"{name}['{key}'] must be a tensor, got {type(tensor).__name__}")
            check_uniform(dict(params), name)
        for name in ("upper_loss", "lower_loss"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a callable (upper_params, lower_params) -> scalar tensor")
        if self.solve is not None and not callable(self.solve):
            raise TypeError("solve must be a callable (upper_params, lower_params) -> lower_params, or None")


class LinearQuadraticGame(BilevelProblem):
    """A quadratic leader above a strongly convex quadratic follower, with a closed form.

    F = ½ xᵀP x + ½ ‖y − t‖²,  g = ½ yᵀA y − yᵀ(B x + d):  y* = A⁻¹(B x + d),  dF/dx = P x + Bᵀ A⁻¹ (y* − t)

    Args:
        seed: of all numbers, which are Gaussian; A and P are G Gᵀ / n + I.
        leader, follower: numbers of upper and lower parameters.
    """

    @differentiating  # so that no number is an inference tensor
    def __init__(self, seed: int = 0, *, leader: int = 4, follower: int = 6) -> None:
        for name, count in (("leader", leader), ("follower", follower)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        generator = torch.Generator().manual_seed(seed)

        def gaussian(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def definite(size: int) -> Tensor:
            root = gaussian(size, size)
            return root @ root.T / size + torch.eye(size, dtype=torch.float64)

        self._a, self._b, self._p = definite(follower), gaussian(follower, leader), definite(leader)
        self._d, self._t = gaussian(follower), gaussian(follower)
        super().__init__(
            upper_loss=lambda x, y: 0.5 * x["x"] @ self._p @ x["x"] + 0.5 * (y["y"] - self._t).square().sum(),
            lower_loss=lambda x, y: 0.5 * y["y"] @ self._a @ y["y"] - y["y"] @ (self._b @ x["x"] + self._d),
            upper_params={"x": gaussian(leader)},
            lower_params={"y": torch.zeros(follower, dtype=torch.float64)},
            solve=lambda x, y: {"y": self._response(x["x"])},
            name=f"linear-quadratic game (seed {seed})",
        )

    def closed_form(self) -> Tensor:
        """(leader,) dF/dx."""
        x = self.upper_params["x"]
        return self._p @ x + self._b.T @ torch.linalg.solve(self._a, self._response(x) - self._t)

    def _response(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self._a, self._b @ x + self._d)


def bilevel_subject(problem: BilevelProblem, extra: Mapping[str, Options] | None) -> Subject:
    """The problem at its lower optimum, with each solver of `implicit_gradient` and the direct term alone."""
    dtype = torch.float64 if problem.solve is None else None
    upper = {k: v.detach().to(dtype=dtype, copy=True) for k, v in problem.upper_params.items()}
    lower = {k: v.detach().to(dtype=dtype, copy=True) for k, v in problem.lower_params.items()}
    start = flatten(upper.values())
    slopes = Slopes()

    def optimum(x: Params, y: Params) -> Params:
        with common_random_numbers(start.device):
            solved = problem.solve(_copied(x), _copied(y)) if problem.solve else minimise(problem.lower_loss, x, y)
        shapes = {k: getattr(v, "shape", None) for k, v in solved.items()} if isinstance(solved, Mapping) else None
        if shapes != {k: v.shape for k, v in lower.items()}:
            raise ValueError("solve must return lower_params, with the same keys and shapes")
        found = {k: solved[k].detach() for k in y}
        slopes.left.append(_slope(problem.lower_loss, x, found).norm())
        return found

    if problem.solve is None:
        _require_double(problem.lower_loss, upper, lower)
    best = optimum(upper, lower)
    slope_at_best = _slope(problem.lower_loss, upper, best)

    def loss_at(values: Tensor) -> float:
        x = dict(zip(upper, unflatten(values, list(upper.values())), strict=True))
        slopes.added.append((_slope(problem.lower_loss, x, best) - slope_at_best).norm())
        y = optimum(x, best)
        with torch.no_grad():
            return float(_scalar("upper_loss", problem.upper_loss(x, y)))

    def gradient(**options: object) -> Callable[[], Hypergradient]:
        return lambda: implicit_gradient(problem.upper_loss, problem.lower_loss, upper, best, **options)  # type: ignore[arg-type]

    def direct() -> Tensor:
        x = {k: v.clone().requires_grad_() for k, v in upper.items()}
        return flatten(gradients([problem.upper_loss(x, best)], list(x.values()), [start.new_ones(())]))

    candidates = [Candidate("closed form", problem.closed_form)] if isinstance(problem, LinearQuadraticGame) else []
    size = sum(v.numel() for v in lower.values())
    candidates += with_every_solver(gradient, start.dtype, size)
    candidates.append(Candidate("DirectOnly", direct))
    for name, options in check_extra(candidates, extra).items():
        candidates.append(Candidate(name, gradient(**options)))

    remedy = "let solve go further" if problem.solve else "give solve, or regularise lower_loss"
    return Subject(
        f"{problem.name}: {start.numel()} upper, {size} lower parameters",
        start,
        loss_at,
        candidates,
        lambda: [slopes.describe(tolerance(start.dtype), remedy)],
    )


def minimise(loss: Loss, upper: Params, lower: Params) -> Params:
    """`lower` at a minimum of the loss: Newton's method, and if that ends above 1e-10 L-BFGS and Newton's method again.

    Newton's steps come from conjugate gradients and are taken while they at least halve the gradient, which near a minimum
    ends at the rounding level.
    """
    lower, norm = _newton(loss, upper, lower)
    if norm <= _GRADIENT_NORM:
        return lower
    params = {k: v.clone().requires_grad_() for k, v in lower.items()}
    optimizer = torch.optim.LBFGS(
        list(params.values()),
        max_iter=1000,
        history_size=50,
        tolerance_grad=_GRADIENT_NORM,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = loss(upper, params)
        value.backward()
        return value

    optimizer.step(closure)
    return _newton(loss, upper, {k: v.detach() for k, v in params.items()})[0]


def _newton(loss: Loss, upper: Params, lower: Params) -> tuple[Params, float]:
    best, norm = lower, float(_slope(loss, upper, lower).norm())
    for _ in range(50):
        params = {k: v.detach().clone().requires_grad_() for k, v in best.items()}
        leaves = list(params.values())
        with torch.enable_grad():
            value = loss(upper, params)
            slope = gradients([value], leaves, [torch.ones_like(value)], create_graph=True)

        def hessian(vector: Tensor, slope: list[Tensor] = slope, leaves: list[Tensor] = leaves) -> Tensor:
            return flat_grad(slope, leaves, unflatten(vector, leaves), retain_graph=True)

        solution = CG(rtol=1e-10, max_iterations=1000)(hessian, flatten(slope).detach())
        if solution.negative_curvature:
            break
        pieces = unflatten(solution.value, leaves)
        moved = {k: v.detach() - piece for (k, v), piece in zip(params.items(), pieces, strict=True)}
        after = float(_slope(loss, upper, moved).norm())
        if not after < norm:
            break
        halved, best, norm = after <= 0.5 * norm, moved, after
        if not halved:
            break
    return best, norm


def _slope(loss: Loss, upper: Params, lower: Params) -> Tensor:
    params = {k: v.detach().clone().requires_grad_() for k, v in lower.items()}
    with torch.enable_grad():
        value = _scalar("lower_loss", loss(upper, params))
    return flatten(gradients([value], list(params.values()), [torch.ones_like(value)])).detach()


def _require_double(loss: Loss, upper: Params, lower: Params) -> None:
    try:
        loss(upper, lower)
    except RuntimeError as error:
        raise TypeError(
            f"lower_loss must take float64 parameters where solve is left out: make its data float64, or give solve; it "
            f"raised: {error}"
        ) from error


def _scalar(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return a scalar tensor, got {came}")
    return value.reshape(())


def _copied(params: Params) -> Params:
    return {k: v.clone() for k, v in params.items()}
