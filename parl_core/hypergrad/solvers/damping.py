"""Damping for an operator that has none: how much, from a few products, and the operator that holds it."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from ...offsets import reads_are_free
from .solution import LinearOperator, Solution, Solver, damping_of
from .system import System, norms

Damping = float | Literal["auto"]
_PRODUCTS = 10


class Damped:
    """v ↦ A v + damping·v.

    It says about itself what A does: `cost`, and `block`, `outer_products`, `preconditioner` and `native` where A has
    them.

    Attributes:
        damping: the multiple of the identity in all, A's own included.
        cost: of one product, in gradients of the policy's log-probabilities; None if A does not say.

    Raises:
        ValueError: a damping that is a bool, negative or not finite.
    """

    def __init__(self, operator: LinearOperator, damping: float) -> None:
        _check_number(damping)
        self._operator, self._added = operator, damping
        self.damping = damping_of(operator) + damping
        self.cost: float | None = getattr(operator, "cost", None)
        block = getattr(operator, "block", None)
        if callable(block):
            self.block = lambda vectors: block(vectors).add(vectors, alpha=damping)
        outer_products = getattr(operator, "outer_products", None)
        if callable(outer_products):
            self.outer_products = outer_products
        preconditioner = getattr(operator, "preconditioner", None)
        if callable(preconditioner):
            self.preconditioner = lambda extra=0.0: preconditioner(extra + damping)
        native = getattr(operator, "native", None)
        if callable(native):
            self.native = lambda extra=0.0: native(extra + damping)

    def __call__(self, vector: Tensor) -> Tensor:
        """(P,) -> (P,)."""
        return self._operator(vector).add(vector, alpha=self._added)


def check_damping(damping: object) -> None:
    """Refuse anything but "auto" or a number that can be added."""
    if isinstance(damping, str):
        if damping != "auto":
            raise ValueError(f"damping must be a number or 'auto', got '{damping}'")
    else:
        _check_number(damping)


def _check_number(damping: object) -> None:
    if isinstance(damping, bool) or not isinstance(damping, float | int) or not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be finite and at least 0, a number and not a bool, got {damping}")


def automatic_damping(operator: LinearOperator, rhs: Tensor, *, products: int = _PRODUCTS) -> float:
    """The damping under which operator(x) = rhs can be solved, by a fixed rule from `products` products.

    Lanczos steps from rhs, with full reorthogonalisation, give Ritz values of A, and

        damping = 1e-3·max|Ritz| + 2·max(0, −min Ritz)

    The first term bounds the condition number of a positive semi-definite A + damping·I by about 1000. The second lifts
    the most negative curvature found above zero; the factor 2 is because a Ritz value lies inside the spectrum: the
    result is positive definite wherever the Ritz value has found half of the most negative eigenvalue. Where it has not,
    as for a single small negative eigenvalue, the solve that follows tells so by `negative_curvature`, and more products
    help. Another operator c·A, c > 0, gets c times the damping; the size of rhs does not matter. Damping that `operator`
    already holds counts as part of A, and `Damped` adds to it.

    There are fewer steps where P < products or where the vectors so far span an invariant subspace. Where no Ritz value
    is other than 0 (rhs or A is zero) nothing sets a scale: 1.0, with which the system has the solution x = b, that of no
    curvature. A NaN or an infinity in rhs or in a product gives 0.0, so that the solve that follows names it.

    Args:
        operator: A, symmetric.
        rhs: (P,), of the solve that follows.
        products: Lanczos steps, at one product each.

    Raises:
        ValueError: rhs is not a floating-point vector, or products is not an integer of at least 1.

    >>> diagonal = torch.tensor([-1.0, 2.0, 4.0])
    >>> round(automatic_damping(lambda v: diagonal * v, torch.ones(3)), 4)
    2.004
    """
    return _damping_for(_ritz_values(_lanczos_system(operator, rhs, products), products))


def solve_with_automatic_damping(
    solver: Solver, operator: LinearOperator, rhs: Tensor, x0: Tensor | None
) -> tuple[Damped, Solution]:
    """The operator damped for rhs (P,), and the solution; what choosing the damping took is counted in it.

    The shifted system hides the negative curvature that the damping was chosen to lift: `negative_curvature` tells of
    that too, since it means that the lower level is not at an optimum.
    """
    system = _lanczos_system(operator, rhs, _PRODUCTS)
    ritz = _ritz_values(system, _PRODUCTS)
    damped = Damped(operator, _damping_for(ritz))
    solution = solver(damped, rhs, x0)
    spent = system.products
    return damped, dataclasses.replace(
        solution,
        negative_curvature=solution.negative_curvature or _has_negative(ritz, rhs),
        products=solution.products + spent,
        cost=None if solution.cost is None or damped.cost is None else solution.cost + spent * damped.cost,
    )


def _lanczos_system(operator: LinearOperator, rhs: Tensor, products: int) -> System:
    if not isinstance(products, int) or products < 1:
        raise ValueError(f"products must be an integer of at least 1, got {products!r}")
    if rhs.dim() != 1:
        raise ValueError(f"rhs must be a vector (P,), got shape {tuple(rhs.shape)}")
    return System(operator, rhs)


def _damping_for(ritz: Tensor) -> float:
    if not bool(torch.isfinite(ritz).all()):
        return 0.0
    largest = float(ritz.abs().max()) if ritz.numel() else 0.0
    if largest == 0.0:
        return 1.0
    return 1e-3 * largest + 2.0 * max(0.0, -float(ritz.min()))


def _has_negative(ritz: Tensor, rhs: Tensor) -> bool:
    """Whether a Ritz value is below zero by more than the rounding of the products in rhs's dtype."""
    if not ritz.numel():
        return False
    rounding = max(10.0, rhs.shape[0] ** 0.5) * torch.finfo(rhs.dtype).eps * ritz.abs().max()
    return bool(ritz.min() < -rounding)


def _ritz_values(system: System, products: int) -> Tensor:
    """(at most `products`,) float64 on the CPU: zeros for steps that were not needed, NaN if anything was not finite."""
    vector, size = system.rhs, system.rhs.shape[0]
    eps = max(10.0, size**0.5) * torch.finfo(vector.dtype).eps
    basis, images = vector.new_zeros(0, size), vector.new_zeros(0, size)
    largest = torch.zeros_like(norms(vector))
    for _ in range(min(products, size)):
        if reads_are_free(vector.device) and not bool(vector.any()):
            break
        image = system.product(vector)
        basis, images = torch.cat([basis, vector[None]]), torch.cat([images, image[None]])
        largest = torch.maximum(largest, norms(image))
        # Twice: once is not enough in floating point.
        rest = image
        for _ in range(2):
            rest = rest - (basis @ rest) @ basis
        length = norms(rest)
        vector = torch.where(length > eps * largest, rest / torch.where(length > 0, length, 1.0), 0.0)
    projected = (basis @ images.T).double().cpu()  # few numbers: all that follows is the host's
    if not bool(torch.isfinite(projected).all()):
        return projected.new_full((1,), float("nan"))
    return torch.linalg.eigvalsh(0.5 * (projected + projected.T))
