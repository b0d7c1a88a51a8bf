"""The variational lower bound of f-divergences.

Nguyen, Wainwright & Jordan 2010, "Estimating divergence functionals and the likelihood ratio by convex risk minimization":
D_f(p‖q) ≥ E_p[T] − E_q[f*(T)] for any T with values in the domain of the convex conjugate f*, with equality at
T = f'(p/q). As in f-GAN (Nowozin, Cseke & Tomioka 2016) a critic V without constraints is mapped into that domain. Here
the map is T = f'(e^V), whatever the divergence: then f*(T) = e^V f'(e^V) − f(e^V) is elementary, even where f* itself is
not (Jeffreys), and the best critic is V = log p/q for every kind. For KL, reverse KL and Jensen–Shannon these are f-GAN's
activations, up to a shift of V. The exception is the total variation, whose f' is a step: T = ½ tanh V, as in f-GAN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .f_divergence_terms import check_kind, mixture_log


def f_divergence_bound(critic_p: Tensor, critic_q: Tensor, kind: str, *, alpha: float | None = None) -> Tensor:
    """Estimate of a lower bound of D_f(p‖q) from a critic's values at samples of p and of q.

    For a fixed critic it is unbiased, in value and, with p and q at rest, in its gradient in the critic's parameters. The
    bound of a critic that was trained on the same samples is too high. Differentiable at any order.

    Args:
        critic_p: values of the critic at samples of p, of any shape; unconstrained real numbers, the best ones log p/q.
        critic_q: the same at samples of q; their number may differ.
        kind: the divergence, one of `f_divergence_terms`.
        alpha: for kind "alpha" only.

    Returns:
        (): mean of T(critic_p) − mean of f*(T(critic_q)).

    Raises:
        TypeError: values that are no floating-point numbers.
        ValueError: no values, or a wrong alpha; UnknownNameError for an unknown kind.
    """
    check_kind(kind, alpha)
    for name, values in (("critic_p", critic_p), ("critic_q", critic_q)):
        if not values.is_floating_point():
            raise TypeError(f"{name} must be of a floating-point dtype, got {values.dtype}")
        if values.numel() == 0:
            raise ValueError(f"{name} must hold at least one value, got none")
    if alpha is not None:
        return _power(critic_p, alpha - 1.0).mean() - _power(critic_q, alpha).mean()
    slope, conjugate = _MAPS[kind]
    return slope(critic_p).mean() - conjugate(critic_q).mean()


def _power(critic: Tensor, exponent: float) -> Tensor:
    """(e^{exponent·V} − 1)/exponent, of the α-divergence with exponent α − 1 its T, with α its f*(T)."""
    return critic if exponent == 0.0 else torch.expm1(exponent * critic) / exponent


# T = f'(e^V) and f*(T), as functions of V.
_MAPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "kl": (lambda v: v + 1.0, torch.exp),
    "reverse_kl": (lambda v: -torch.exp(-v), lambda v: v - 1.0),
    "jensen_shannon": (lambda v: -0.5 * mixture_log(-v), lambda v: 0.5 * mixture_log(v)),
    "jeffreys": (lambda v: v - torch.expm1(-v), lambda v: v + torch.expm1(v)),
    "chi_squared": (lambda v: 2.0 * torch.expm1(v), lambda v: torch.expm1(2.0 * v)),
    "neyman": (lambda v: -torch.expm1(-2.0 * v), lambda v: -2.0 * torch.expm1(-v)),
    "squared_hellinger": (lambda v: -0.5 * torch.expm1(-0.5 * v), lambda v: 0.5 * torch.expm1(0.5 * v)),
    "total_variation": (lambda v: 0.5 * torch.tanh(v), lambda v: 0.5 * torch.tanh(v)),
}
