"""What a Monte-Carlo estimate of an f-divergence averages: one function of the log-ratio for each way to estimate.

With t = p/q and x = log t, D_f(p‖q) = E_q[f(t)] = E_p[f(t)/t] for a convex f with f(1) = 0:

    kl                  t log t                                          KL(p‖q) = E_p[log t]
    reverse_kl          −log t                                           KL(q‖p)
    jensen_shannon      ½ (t log t − (1 + t) log((1 + t)/2))             ½ KL(p‖m) + ½ KL(q‖m), m = ½(p + q); at most log 2
    jeffreys            (t − 1) log t                                    KL(p‖q) + KL(q‖p)
    chi_squared         (t − 1)²                                         Pearson's: E_q[t²] − 1
    neyman              (t − 1)²/t                                       E_p[1/t²] − 1
    squared_hellinger   ½ (√t − 1)²                                      1 − E_q[√t]; at most 1
    total_variation     ½ |t − 1|                                        ½ Σ|p − q|; at most 1
    alpha               (t^α − α t − (1 − α))/(α(α − 1))                 α = 2: ½ chi_squared; ½: 4 squared_hellinger;
                                                                         −1: ½ neyman; limits at 1, 0: kl, reverse_kl

f̃(t) = t f(1/t) is the adjoint of f: D_f(p‖q) = D_f̃(q‖p). So estimates from samples of p are those of f̃ at −x.

KL has three summands (Schulman 2020, "Approximating KL divergence"), of samples from p: k1 = x, which is the plain one,
k2 = ½x² and k3 = e^{−x} − 1 + x; of samples from q they come with the importance weight t.

The formulas here are the specification of csrc/math/divergence.h.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import unknown_name

KINDS = (
    "kl",
    "reverse_kl",
    "jensen_shannon",
    "jeffreys",
    "chi_squared",
    "neyman",
    "squared_hellinger",
    "total_variation",
    "alpha",
)

_ADJOINT = {
    "kl": "reverse_kl",
    "kl_k2": "reverse_kl_k2",
    "kl_k3": "reverse_kl_k3",
    "chi_squared": "neyman",
}
_ADJOINT |= {adjoint: function for function, adjoint in _ADJOINT.items()}

Jet = tuple[Tensor, Tensor, Tensor]


class Term(NamedTuple):
    """What is averaged at a log-ratio r: `function` at x = r, or at x = −r if `flipped`, with its derivatives in r.

    over_ratio: f(e^x) and its derivatives in x are all divided by e^x. That is the summand E_p[f(t)/t] of samples whose
    distribution moves with p: t in the denominator stands for the samples taken, and is not differentiated.
    """

    function: str
    flipped: bool
    over_ratio: bool
    alpha: float


def check_kind(kind: str, alpha: float | None) -> None:
    """Refuse an unknown kind, and an `alpha` that is missing, not finite or not asked for."""
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    if kind != "alpha":
        if alpha is not None:
            raise ValueError(f"alpha must be left out for kind '{kind}', got {alpha}")
    elif alpha is None or not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number for kind 'alpha', got {alpha}")


@functools.lru_cache(maxsize=256)
def term_of(kind: str, alpha: float | None, estimator: str | None, sampled_from: str, on_policy: bool) -> Term:
    """The summand of `f_divergence` with these arguments.

    Raises:
        UnknownNameError, ValueError: as `f_divergence`.
    """
    check_kind(kind, alpha)
    if sampled_from not in ("p", "q"):
        raise ValueError(f"sampled_from must be 'p' or 'q', got '{sampled_from}'")
    if estimator not in (None, "k1", "k2", "k3"):
        raise ValueError(f"estimator must be 'k1', 'k2', 'k3' or None, got '{estimator}'")
    if estimator is not None and kind not in ("kl", "reverse_kl"):
        raise ValueError(f"estimator must be None for kind '{kind}', got '{estimator}': it chooses between those of KL")
    function = kind if estimator in (None, "k1") else f"{kind}_{estimator}"
    exponent = float("nan") if alpha is None else float(alpha)
    # x is the logarithm of the moving density over the resting one where `on_policy`, else of the one that was not
    # sampled from over the one that was.
    flipped = (sampled_from == "p") != on_policy
    if flipped:
        function, exponent = _ADJOINT.get(function, function), 1.0 - exponent
    if function == "alpha":
        function = _alpha_function(exponent)
    return Term(function, flipped, over_ratio=on_policy, alpha=exponent)


def _alpha_function(alpha: float) -> str:
    if alpha in (0.0, 1.0):
        return "kl_k3" if alpha else "reverse_kl_k3"
    return "alpha_low" if alpha <= 0.5 else "alpha_high"


def jet(term: Term, log_ratio: Tensor) -> Jet:
    """The summand and its first two derivatives at every log-ratio, differentiable any number of times.

    Each is differentiated as a function of `log_ratio`; where `over_ratio`, the density in the denominator rests.
    """
    ratio = _Ratio.of(-log_ratio if term.flipped else log_ratio)
    value, first, second = (_OVER_RATIO if term.over_ratio else _PLAIN)[term.function](ratio, term.alpha)
    if term.over_ratio:
        # 1, with the derivative of e^x/e^{x₀}
        moved = torch.exp(torch.where(ratio.x.isfinite(), ratio.x - ratio.x.detach(), 0.0))
        value, first, second = value * moved, first * moved, second * moved
    return value, -first if term.flipped else first, second


class _Ratio(NamedTuple):
    x: Tensor
    t: Tensor  # e^x
    t_step: Tensor  # e^x − 1
    u: Tensor  # e^{−x}
    u_step: Tensor  # e^{−x} − 1
    low: Tensor  # x and −x, finite where t and u are 0, since 0·∞ is not to come about
    high: Tensor

    @staticmethod
    def of(x: Tensor) -> _Ratio:
        largest = torch.finfo(x.dtype).max
        low, high = (y.clamp(min=-(largest**0.5)) for y in (x, -x))
        return _Ratio(x, x.exp(), x.expm1(), (-x).exp(), (-x).expm1(), low, high)

    def constant(self, value: float) -> Tensor:
        return torch.where(self.x.isnan(), self.x, value)


def _finite(x: Tensor) -> Tensor:
    """For differences in which ∞ − ∞ is not to come about."""
    return x.clamp(max=torch.finfo(x.dtype).max)


def mixture_log(x: Tensor) -> Tensor:
    """log((1 + e^x)/2); at −x it is −log(2 e^x/(1 + e^x))."""
    near = torch.log1p(0.5 * torch.expm1(x.clamp(-1.0, 1.0)))
    # Beyond the threshold softplus is x; torch's own of 20 leaves out 2e-9.
    return torch.where(x.abs() < 1.0, near, F.softplus(x, threshold=40.0) - math.log(2.0))


def _sign(r: _Ratio) -> Tensor:
    return torch.where(r.x > 0, 1.0, torch.where(r.x < 0, -1.0, r.constant(0.0)))


def _high(r: _Ratio, alpha: float) -> Jet:
    tilted = torch.expm1((alpha - 1.0) * r.x.clamp(min=-_EXP_BOUND)) / (alpha - 1.0)
    return (r.t * tilted - _finite(r.t_step)) / alpha, r.t * tilted, r.t * (alpha * tilted + 1.0)


def _low(r: _Ratio, alpha: float) -> Jet:
    power_step = torch.expm1(alpha * r.x.clamp(max=_EXP_BOUND))
    value, first = r.t_step - power_step / alpha, r.t_step - power_step
    return tuple(part / (1.0 - alpha) for part in (value, first, r.t - alpha * (power_step + 1.0)))  # type: ignore[return-value]


def _high_over(r: _Ratio, alpha: float) -> Jet:
    tilted = torch.expm1((alpha - 1.0) * r.x) / (alpha - 1.0)
    return (tilted + r.u_step) / alpha, tilted, alpha * tilted + 1.0


def _low_over(r: _Ratio, alpha: float) -> Jet:
    power_step = torch.expm1(alpha * r.x.clamp(max=_EXP_BOUND))
    first = torch.expm1((alpha - 1.0) * r.x) / (alpha - 1.0)
    return (-_finite(r.u_step) - r.u * power_step / alpha) / (1.0 - alpha), first, alpha * first + 1.0


# Where e^{−x} is not yet 0 in double precision.
_EXP_BOUND = 708.0

_Formula = Callable[[_Ratio, float], Jet]
# f(e^x) and its derivatives in x.
_PLAIN: dict[str, _Formula] = {
    "kl": lambda r, _: (r.t * r.low, r.t * (r.low + 1), r.t * (r.low + 2)),
    "kl_k2": lambda r, _: (r.t * r.low**2 / 2, r.t * (r.low**2 / 2 + r.low), r.t * (r.low**2 / 2 + 2 * r.low + 1)),
    "kl_k3": lambda r, _: (r.t * r.low - _finite(r.t_step), r.t * r.low, r.t * (r.low + 1)),
    "reverse_kl": lambda r, _: (-r.x, r.constant(-1.0), r.constant(0.0)),
    "reverse_kl_k2": lambda r, _: (r.x**2 / 2, r.x, r.constant(1.0)),
    "reverse_kl_k3": lambda r, _: (r.t_step - _finite(r.x), r.t_step, r.t),
    "jensen_shannon": lambda r, _: (
        (-r.t * mixture_log(-r.low) - mixture_log(r.x)) / 2,
        -r.t * mixture_log(-r.low) / 2,
        r.t * (torch.sigmoid(-r.x) - mixture_log(-r.low)) / 2,
    ),
    "jeffreys": lambda r, _: (r.t_step * r.x, r.t * r.low + r.t_step, r.t * (r.low + 2)),
    "chi_squared": lambda r, _: (r.t_step**2, 2 * r.t * r.t_step, 2 * r.t * (r.t + r.t_step)),
    "neyman": lambda r, _: (-r.t_step * r.u_step, r.t_step - r.u_step, r.t + r.u),
    "squared_hellinger": lambda r, _: (
        torch.expm1(r.x / 2) ** 2 / 2,
        torch.exp(r.x / 2) * torch.expm1(r.x / 2) / 2,
        torch.exp(r.x / 2) * (2 * torch.exp(r.x / 2) - 1) / 4,
    ),
    "total_variation": lambda r, _: (r.t_step.abs() / 2, _sign(r) * r.t / 2, _sign(r) * r.t / 2),
    "alpha_high": _high,
    "alpha_low": _low,
}
# The same over e^x.
_OVER_RATIO: dict[str, _Formula] = {
    "kl": lambda r, _: (r.x, r.x + 1, r.x + 2),
    "kl_k2": lambda r, _: (r.x**2 / 2, r.x**2 / 2 + r.x, r.x**2 / 2 + 2 * r.x + 1),
    "kl_k3": lambda r, _: (r.x + r.u_step, r.x, r.x + 1),
    "reverse_kl": lambda r, _: (r.u * r.high, -r.u, r.constant(0.0)),
    "reverse_kl_k2": lambda r, _: (r.u * r.high**2 / 2, -r.u * r.high, r.u),
    "reverse_kl_k3": lambda r, _: (r.u * r.high - _finite(r.u_step), -r.u_step, r.constant(1.0)),
    "jensen_shannon": lambda r, _: (
        (-mixture_log(-r.x) - r.u * mixture_log(-r.high)) / 2,
        -mixture_log(-r.x) / 2,
        (torch.sigmoid(-r.x) - mixture_log(-r.x)) / 2,
    ),
    "jeffreys": lambda r, _: (-r.u_step * r.x, r.x - r.u_step, r.x + 2),
    "chi_squared": lambda r, _: (-r.t_step * r.u_step, 2 * r.t_step, 2 * (r.t + r.t_step)),
    "neyman": lambda r, _: (r.u_step**2, -r.u_step * (1 + r.u), 1 + r.u**2),
    "squared_hellinger": lambda r, _: (
        torch.expm1(-r.x / 2) ** 2 / 2,
        -torch.expm1(-r.x / 2) / 2,
        (2 - torch.exp(-r.x / 2)) / 4,
    ),
    "total_variation": lambda r, _: (r.u_step.abs() / 2, _sign(r) / 2, _sign(r) / 2),
    "alpha_high": _high_over,
    "alpha_low": _low_over,
}
