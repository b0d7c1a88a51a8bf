"""f-divergences of two distributions on one finite support, from log-probabilities."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...envs.tabular import Array
from ...errors import NonFiniteError

DIVERGENCES = (
    "total variation",
    "squared Hellinger",
    "Jensen-Shannon",
    "KL",
    "reverse KL",
    "Jeffreys",
    "chi-squared",
    "Neyman chi-squared",
)


def f_divergences(log_p: npt.ArrayLike, log_q: npt.ArrayLike) -> dict[str, float]:
    """All of `DIVERGENCES`, D_f(p‖q) = Σ q f(p/q).

        total variation      ½ Σ |p − q|                    at most 1
        squared Hellinger    1 − Σ √(p q)                   at most 1
        Jensen-Shannon       ½ KL(p‖m) + ½ KL(q‖m), m = ½(p + q)    at most log 2
        KL                   Σ p log(p/q)
        reverse KL           Σ q log(q/p)
        Jeffreys             Σ (p − q) log(p/q)
        chi-squared          Σ (p − q)²/q                   Pearson's
        Neyman chi-squared   Σ (p − q)²/p

    Sums of terms that are not negative, so that p ≈ q loses no digits; natural logarithms.

    Args:
        log_p, log_q: (N,), finite logarithms of probabilities, each summing to 1.

    Raises:
        ValueError, NonFiniteError: other shapes, a probability of 0, or a sum that is off 1 by more than 1e-9.
        OverflowError: a χ² beyond float64; the message tells its logarithm.
    """
    log_p, log_q = _checked("log_p", log_p), _checked("log_q", log_q)
    if log_p.shape != log_q.shape:
        raise ValueError(f"log_q must have shape {log_p.shape} as log_p has, got {log_q.shape}")
    larger, gap = np.exp(np.maximum(log_p, log_q)), np.abs(log_p - log_q)  # |p − q| = larger·(1 − e^{−gap})
    log_mixture = np.logaddexp(log_p, log_q) - np.log(2.0)
    return {
        "total variation": 0.5 * float(np.sum(-larger * np.expm1(-gap))),
        "squared Hellinger": 0.5 * float(np.sum(larger * np.expm1(-0.5 * gap) ** 2)),
        "Jensen-Shannon": 0.5 * (_kl(log_p, log_mixture) + _kl(log_q, log_mixture)),
        "KL": _kl(log_p, log_q),
        "reverse KL": _kl(log_q, log_p),
        "Jeffreys": float(np.sum(-larger * np.expm1(-gap) * gap)),
        "chi-squared": _chi_squared("chi-squared", log_p, log_q),
        "Neyman chi-squared": _chi_squared("Neyman chi-squared", log_q, log_p),
    }


def _kl(log_p: Array, log_q: Array) -> float:
    """Σ p log(p/q) − p + q."""
    ratio = log_p - log_q
    near = np.clip(ratio, -1.0, 1.0)
    p, q = np.exp(log_p), np.exp(log_q)
    return float(np.sum(np.where(np.abs(ratio) < 1.0, p * (near + np.expm1(-near)), p * (ratio - 1.0) + q)))


def _chi_squared(name: str, log_p: Array, log_q: Array) -> float:
    """Σ (p − q)²/q by the logarithms of its terms: (p/q)² overflows where the sum does not."""
    ratio = log_p - log_q
    with np.errstate(divide="ignore"):  # a ratio of 1 contributes e^{−∞}
        log_terms = log_q + 2.0 * (np.maximum(ratio, 0.0) + np.log(-np.expm1(-np.abs(ratio))))
    largest = float(log_terms.max())
    if largest == -np.inf:
        return 0.0
    log_sum = largest + float(np.log(np.sum(np.exp(log_terms - largest))))
    if log_sum > np.log(np.finfo(np.float64).max):
        raise OverflowError(f"{name} is e^{log_sum:.0f}, beyond float64")
    return float(np.exp(log_sum))


def _checked(name: str, values: npt.ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must have shape (N,) with N at least 1, got {array.shape}")
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}")
    total = float(np.sum(np.exp(array)))
    if abs(total - 1.0) > 1e-9:
        raise ValueError(f"{name} must hold the logarithms of probabilities that sum to 1, got a sum of {total:g}")
    return array
