"""f-divergences in closed form, from what a network says of each state's action distribution.

The parameters are those of `distribution_params` of a policy (models/policies.py). All is plain torch, differentiable at
any order in both distributions, and exact near p = q: no divergence is the difference of two larger numbers. The kinds are
those of `f_divergence_terms`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .f_divergence_terms import check_kind, jet, term_of


def categorical_f_divergence(logits_p: Tensor, logits_q: Tensor, kind: str, *, alpha: float | None = None) -> Tensor:
    """D_f(p‖q) = Σ_a q_a f(p_a/q_a) of two categorical distributions, for every kind.

    The total variation has the subgradient 0 where p_a = q_a.

    Args:
        logits_p, logits_q: (…, A), finite, unnormalised log-probabilities.
        kind: the divergence.
        alpha: for kind "alpha" only.

    Returns:
        (…), infinite where the divergence is beyond the dtype.

    Raises:
        ValueError: different shapes, or a wrong alpha; UnknownNameError for an unknown kind.
    """
    check_kind(kind, alpha)
    _check_alike("logits_p", logits_p, "logits_q", logits_q)
    log_p, log_q = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
    if kind == "chi_squared":
        return _chi_squared(log_p, log_q)
    if kind == "neyman":
        return _chi_squared(log_q, log_p)
    # Of f with f'(1) = 0 all summands are ≥ 0: with KL that is k3's, whose sum is the same.
    estimator = "k3" if kind in ("kl", "reverse_kl") else None
    over_q, over_p = (term_of(kind, alpha, estimator, side, on_policy=False) for side in ("q", "p"))
    # q f(t) where t < 1, and p f(t)/t where t > 1: neither t nor 1/t overflows.
    log_ratio = log_p - log_q
    below = log_q.exp() * jet(over_q, log_ratio.clamp(max=0.0))[0]
    above = log_p.exp() * jet(over_p, log_ratio.clamp(min=0.0))[0]
    return torch.where(log_ratio < 0.0, below, above).sum(-1)


def gaussian_f_divergence(params_p: Tensor, params_q: Tensor, kind: str, *, alpha: float | None = None) -> Tensor:
    """D_f(p‖q) of two diagonal Gaussians, for every kind but jensen_shannon and total_variation.

    With d = log σ_p − log σ_q and Δ = μ_p − μ_q in each dimension, KL(p‖q) = Σ ½(e^{2d} − 1 − 2d + Δ²/σ_q²), and of
    I_α = ∫ p^α q^{1−α}

        log I_α = −½ Σ log(σ²/(σ_p^{2(1−α)} σ_q^{2α})) + α(1−α) Δ²/σ²        with σ² = α σ_q² + (1−α) σ_p²

    the α-divergence is (I_α − 1)/(α(α − 1)), χ² I₂ − 1, Neyman's I₋₁ − 1, the squared Hellinger distance 1 − I_½. I_α
    exists where σ² > 0 in all dimensions: for α in [0, 1] always, for α = 2 where σ_p² < 2 σ_q². Where it does not, the
    divergence is infinite, and so is what is returned, with a gradient of NaN.

    An invertible map of the actions changes nothing: these are the divergences of policies squashed by tanh, too.

    Args:
        params_p, params_q: (…, 2·da), means and then log standard deviations.
        kind: the divergence.
        alpha: for kind "alpha" only.

    Returns:
        (…).

    Raises:
        ValueError: different shapes, a kind without a closed form, or a wrong alpha; UnknownNameError for an unknown kind.
    """
    check_kind(kind, alpha)
    _check_alike("params_p", params_p, "params_q", params_q)
    if params_p.shape[-1] % 2:
        raise ValueError(f"params_p must be of shape (…, 2·da), got {tuple(params_p.shape)}")
    if kind in ("jensen_shannon", "total_variation"):
        raise ValueError(f"kind must have a closed form for Gaussians, '{kind}' has none: estimate it by f_divergence")
    if kind == "kl" or (kind == "alpha" and alpha == 1.0):
        return _gaussian_kl(params_p, params_q)
    if kind == "reverse_kl" or (kind == "alpha" and alpha == 0.0):
        return _gaussian_kl(params_q, params_p)
    if kind == "jeffreys":
        return _gaussian_kl(params_p, params_q) + _gaussian_kl(params_q, params_p)
    exponent = {"chi_squared": 2.0, "neyman": -1.0, "squared_hellinger": 0.5}.get(kind)
    if exponent is not None:
        step = _gaussian_overlap_step(params_p, params_q, exponent)
        return -step if kind == "squared_hellinger" else step
    assert alpha is not None
    return _gaussian_overlap_step(params_p, params_q, alpha) / (alpha * (alpha - 1.0))


def _chi_squared(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ (p − q)²/q, whose terms may be finite where (p/q)² is not."""
    log_ratio = log_p - log_q
    return (torch.exp(log_q + 2.0 * log_ratio.clamp(min=0.0)) * torch.expm1(-log_ratio.abs()) ** 2).sum(-1)


def _gaussian_kl(params_p: Tensor, params_q: Tensor) -> Tensor:
    (mean_p, log_std_p), (mean_q, log_std_q) = params_p.chunk(2, -1), params_q.chunk(2, -1)
    twice = 2.0 * (log_std_p - log_std_q)
    standard = (mean_p - mean_q) * torch.exp(-log_std_q)
    return 0.5 * (torch.expm1(twice) - twice + standard**2).sum(-1)


def _gaussian_overlap_step(params_p: Tensor, params_q: Tensor, alpha: float) -> Tensor:
    """I_α − 1."""
    (mean_p, log_std_p), (mean_q, log_std_q) = params_p.chunk(2, -1), params_q.chunk(2, -1)
    twice = 2.0 * (log_std_p - log_std_q)
    # σ² over σ_p^{2(1−α)} σ_q^{2α}, less 1, and over σ_q²
    step = alpha * torch.expm1((alpha - 1.0) * twice) + (1.0 - alpha) * torch.expm1(alpha * twice)
    variance = alpha + (1.0 - alpha) * torch.exp(twice)
    standard = (mean_p - mean_q) * torch.exp(-log_std_q)
    log_overlap = -0.5 * (torch.log1p(step) + alpha * (1.0 - alpha) * standard**2 / variance).sum(-1)
    return torch.where((variance > 0.0).all(-1), torch.expm1(log_overlap), torch.inf)


def _check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    for each, value in ((name, tensor), (other_name, other)):
        if not value.is_floating_point():
            raise TypeError(f"{each} must be of a floating-point dtype, got {value.dtype}")
    if tensor.dim() == 0 or tensor.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape, of at least one dimension, "
            f"got {tuple(tensor.shape)} and {tuple(other.shape)}"
        )
