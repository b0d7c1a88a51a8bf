"""Monte-Carlo estimates of f-divergences from log-ratios, differentiable at any order.

An estimate is Σᵢ wᵢ g(rᵢ) with the g that `f_divergence_terms.term_of` chooses, over steps or over trajectories, whose
log-ratios are the sums of those of their steps. The gradient is computed with the value, in one pass over the data, and
second order in another; what follows, and transformations of torch.func, are composed of the summands' derivatives.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from ..offsets import check_offset_values, reads_are_free
from .accelerators import HALF_TO_DOUBLE, triton_devices
from .f_divergence_elementwise import TERMS, is_transformed, terms
from .f_divergence_terms import Term, jet, term_of
from .registry import Kernel, Op, kernel_in
from .segments import ON_CPU, SINGLE_AND_DOUBLE, dtype_of_sums, is_traced, is_wrapped, plain


def f_divergence(
    log_ratio: Tensor,
    kind: str,
    offsets: Tensor | None = None,
    *,
    alpha: float | None = None,
    sampled_from: str = "q",
    on_policy: bool = False,
    estimator: str | None = None,
    self_normalized: bool = False,
    weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Estimate of D_f(p‖q) = E_q[f(p/q)] from log-ratios log p(x) − log q(x) of samples x.

    `kind` is one of kl (KL(p‖q)), reverse_kl (KL(q‖p)), jensen_shannon, jeffreys, chi_squared, neyman, squared_hellinger,
    total_variation, alpha; `f_divergence_terms` has their f. Samples come from q, or with `sampled_from="p"` from p.

    Parameters enter through `log_ratio` alone, so with samples held fixed the gradient lacks what the parameters do to the
    distribution of the samples. In expectation:

        samples from                      estimator         value               gradient
        the resting distribution          plain, k1, k3     exact               exact
        the one that is differentiated    plain, k1, k3     exact               wrong: of k1 it is 0, of k3 that of the KL
                                                                                divergence with p and q exchanged
          with on_policy=True             plain, k1, k3     exact               exact, and all higher derivatives
        the one that is differentiated    k2                biased, by O(r³)    exact, not so the second derivative
        either                            self_normalized   biased, by O(1/n)   biased, by O(1/n) if the samples' one rests

    k1, k2 and k3 are of "kl" with samples from p and of "reverse_kl" with samples from q; with samples from the other
    distribution they carry the importance weight, which leaves k1 and k3 exact, and k2 biased in both. As penalties
    *inside a reward* (values that are not differentiated) k1 and k3 are unbiased, k2 is not.

    With KL(policy‖reference), samples of the policy and a gradient in the policy: kind="kl", log_ratio =
    log policy − log reference, sampled_from="p", on_policy=True.

    The total variation has a kink at p = q, where its subgradient 0 is taken; its second derivative leaves out the
    point mass there.

    Args:
        log_ratio: (T,), floating point, natural logarithms. −∞ (p = 0) is admitted, and +∞ with samples from p.
        kind: the divergence.
        offsets: (N+1,), int64: samples are whole trajectories, with log-ratios Σ log_ratio[offsets[n]:offsets[n+1]]; an
            empty one has 0. None: each of the N = T elements is a sample.
        alpha: for kind "alpha" only: (E_q[(p/q)^α] − 1)/(α(α − 1)), any finite number; 0 and 1 stand for the limits, in
            the form of k3.
        sampled_from: "p" or "q".
        on_policy: the samples come from the distribution that is differentiated; see the table.
        estimator: for "kl" and "reverse_kl": "k1" (as None), "k2" or "k3" (Schulman 2020, "Approximating KL divergence").
        self_normalized: the densities are known up to a factor only: ratios are divided by their weighted mean, over the
            samples. Not with `on_policy`.
        weights: (N,), of the samples, in the dtype of `log_ratio`: probabilities or importance weights, as in
            `Trajectories`. The estimate is Σ wₙ g(rₙ); default 1/N each. Differentiable.
        backend: see `available_backends()`; None: the innermost `with backend(…)`, or else the device's best.

    Returns:
        (), in the dtype and on the device of `log_ratio`. A NaN among the log-ratios gives a NaN.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device or value, no samples, offsets that do not cover the log-ratios, or arguments
            that contradict each other; UnknownNameError for an unknown kind.
        BackendError: the backend asked for cannot be used here.
    """
    term = term_of(kind, alpha, estimator, sampled_from, on_policy)
    _check_tensors(log_ratio, offsets, weights)
    chosen = None if is_traced(log_ratio) else _SUM.select(log_ratio, backend)
    dtype = log_ratio.dtype
    if self_normalized:
        if on_policy:
            raise ValueError("self_normalized must be False with on_policy=True: policies have normalised densities")
        weights = None if weights is None else weights.to(dtype_of_sums(weights))
        log_ratio, offsets = _normalized(log_ratio, offsets, weights, sampled_from), None
    if chosen is None or is_transformed(log_ratio, offsets, weights):
        return _composed(log_ratio, offsets, weights, term, chosen or backend).to(dtype)
    if torch.is_grad_enabled() and (log_ratio.requires_grad or (weights is not None and weights.requires_grad)):
        return _Sum.apply(log_ratio, weights, offsets, term, chosen).to(dtype)
    return _run_sum(log_ratio, offsets, weights, term, None, chosen).to(dtype)


def reference(
    log_ratio: Tensor, offsets: Tensor | None, weights: Tensor | None, term: Term, gradient: Tensor | None
) -> Tensor:
    """The specification of the sum, in double precision: returns the value, writes its gradient into `gradient`."""
    sums = _trajectory_sums(log_ratio.double(), offsets)  # (N,)
    value, first, _ = jet(term, sums)
    scale = torch.full_like(sums, 1.0 / len(sums)) if weights is None else weights.double()
    if gradient is not None:
        gradient.copy_(_to_steps(scale * first, offsets, len(log_ratio)))
    return (scale * value).sum().to(log_ratio.dtype)


def reference_product(
    log_ratio: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    term: Term,
    vector: Tensor,
    cotangent: Tensor,
    with_slope: bool,
) -> tuple[Tensor, Tensor | None]:
    """The specification of the second order: the Hessian of cotangent · Σ w g times a vector, in double precision.

    Args:
        vector: (T,), as the log-ratios.
        cotangent: ().
        with_slope: whether the slope of Σ w g along the vector is wanted, too.

    Returns:
        (T,) and () or None, in the dtype of `log_ratio`.
    """
    sums, moved = (_trajectory_sums(steps.double(), offsets) for steps in (log_ratio, vector))  # (N,)
    _, first, second = jet(term, sums)
    moved = moved * (1.0 / len(sums) if weights is None else weights.double())
    product = _to_steps(cotangent.double() * second * moved, offsets, len(log_ratio)).to(log_ratio.dtype)
    return product, (first * moved).sum().to(log_ratio.dtype) if with_slope else None


def _load_cpp() -> Kernel:
    native = importlib.import_module("parl_core._native").divergence_sum

    def cpp(
        log_ratio: Tensor, offsets: Tensor | None, weights: Tensor | None, term: Term, gradient: Tensor | None
    ) -> Tensor:
        value = native(log_ratio, offsets, weights, gradient, *term, torch.get_num_threads())
        return torch.scalar_tensor(value, dtype=log_ratio.dtype)

    return cpp


def _load_cpp_product() -> Kernel:
    elementwise = TERMS.kernel("cpp")

    def cpp(
        log_ratio: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        term: Term,
        vector: Tensor,
        cotangent: Tensor,
        with_slope: bool,
    ) -> tuple[Tensor, Tensor | None]:
        sums, moved = (_trajectory_sums(steps, offsets) for steps in (log_ratio, vector))
        moved = moved * (1.0 / len(sums) if weights is None else weights)
        product = elementwise(sums, term, 2).mul_(moved).mul_(cotangent)
        slope = torch.dot(elementwise(sums, term, 1), moved) if with_slope else None
        return _to_steps(product, offsets, len(log_ratio)), slope

    return cpp


_SUM = Op("f_divergence", reference)
_PRODUCT = Op("f_divergence, second order", reference_product)
for _op, _load, _name in ((_SUM, _load_cpp, "divergence_sum"), (_PRODUCT, _load_cpp_product, "divergence_product")):
    _op.register("cpp", _load, device_types=ON_CPU, dtypes=SINGLE_AND_DOUBLE)
    _op.register(
        "triton",
        kernel_in("parl_core.kernels.triton_divergence", _name),
        device_types=triton_devices(),
        dtypes=HALF_TO_DOUBLE,
    )


def _run_sum(
    log_ratio: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    term: Term,
    gradient: Tensor | None,
    backend: str,
) -> Tensor:
    log_ratio = plain(log_ratio)
    if offsets is not None:
        offsets = offsets.contiguous()
        check_offset_values(offsets, log_ratio.shape[0])
    return _SUM.kernel(backend)(log_ratio, offsets, None if weights is None else plain(weights), term, gradient)


class _Sum(torch.autograd.Function):
    """The estimate under plain autograd, with its gradient computed on the way and handed out once."""

    @staticmethod
    def forward(
        ctx: Any, log_ratio: Tensor, weights: Tensor | None, offsets: Tensor | None, term: Term, backend: str
    ) -> Tensor:
        ctx.gradient = None
        if ctx.needs_input_grad[0]:
            ctx.gradient = torch.empty_like(log_ratio, memory_format=torch.contiguous_format)
        ctx.save_for_backward(log_ratio, weights, offsets)
        ctx.term, ctx.backend = term, backend
        return _run_sum(log_ratio, offsets, weights, term, ctx.gradient, backend)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        log_ratio, weights, offsets = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        if ctx.needs_input_grad[1] or is_wrapped(cotangent) or is_transformed(cotangent):
            by_ratio = by_weights = None
            sums = _trajectory_sums(log_ratio, offsets)
            cotangent = cotangent.to(sums.dtype)
            if ctx.needs_input_grad[0]:
                scale = 1.0 / len(sums) if weights is None else weights.to(sums.dtype)
                slopes = cotangent * scale * terms(sums, ctx.term, 1, ctx.backend)
                by_ratio = _to_steps(slopes, offsets, len(log_ratio)).to(log_ratio.dtype)
            if weights is not None and ctx.needs_input_grad[1]:
                by_weights = (cotangent * terms(sums, ctx.term, 0, ctx.backend)).to(weights.dtype)
            return by_ratio, by_weights, None, None, None
        if gradient is None:
            gradient = torch.empty_like(log_ratio, memory_format=torch.contiguous_format)
            _run_sum(log_ratio, offsets, weights, ctx.term, gradient, ctx.backend)
        return _Gradient.apply(log_ratio, cotangent, gradient, weights, offsets, ctx.term, ctx.backend), *(None,) * 4


def _scale(gradient: Tensor, cotangent: Tensor, backend: str) -> None:
    """Multiply in place, without a pass over memory where the cotangent is 1. On a GPU only the GPU can tell."""
    if reads_are_free(cotangent.device):
        if cotangent.item() != 1.0:
            gradient.mul_(cotangent)
    elif backend == "triton":
        importlib.import_module("parl_core.kernels.triton_divergence").scale(gradient, plain(cotangent))
    else:
        gradient.mul_(cotangent)


class _Gradient(torch.autograd.Function):
    """The gradient in the log-ratios: known already, but for the cotangent. Its own derivative is one pass, too."""

    @staticmethod
    def forward(
        ctx: Any,
        log_ratio: Tensor,
        cotangent: Tensor,
        gradient: Tensor,
        weights: Tensor | None,
        offsets: Tensor | None,
        term: Term,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(log_ratio, cotangent, weights, offsets)
        ctx.term, ctx.backend = term, backend
        ctx.mark_dirty(gradient)
        _scale(gradient, cotangent, backend)
        return gradient

    @staticmethod
    def backward(ctx: Any, vector: Tensor) -> tuple[Tensor | None, ...]:
        log_ratio, cotangent, weights, offsets = ctx.saved_tensors
        if not (torch.is_grad_enabled() or is_wrapped(vector) or is_transformed(vector)):
            product, slope = _PRODUCT.kernel(ctx.backend)(
                plain(log_ratio),
                None if offsets is None else offsets.contiguous(),
                None if weights is None else plain(weights),
                ctx.term,
                plain(vector),
                plain(cotangent),
                ctx.needs_input_grad[1],
            )
            return product, slope, *(None,) * 5
        sums, moved = (_trajectory_sums(steps, offsets) for steps in (log_ratio, vector))
        moved = moved * (1.0 / len(sums) if weights is None else weights.to(sums.dtype))
        bent = cotangent.to(sums.dtype) * terms(sums, ctx.term, 2, ctx.backend) * moved
        product = _to_steps(bent, offsets, len(log_ratio)).to(log_ratio.dtype)
        slope = (terms(sums, ctx.term, 1, ctx.backend) * moved).sum() if ctx.needs_input_grad[1] else None
        return product, None if slope is None else slope.to(cotangent.dtype), *(None,) * 5


def _composed(
    log_ratio: Tensor, offsets: Tensor | None, weights: Tensor | None, term: Term, backend: str | None
) -> Tensor:
    """The same of parts that autograd, torch.func and torch.compile take through any transformation, not yet rounded."""
    _check_offset_values(offsets, log_ratio.shape[0])
    values = terms(_trajectory_sums(log_ratio, offsets), term, 0, backend)
    return values.mean() if weights is None else (weights * values).sum()


def _check_offset_values(offsets: Tensor | None, num_steps: int) -> None:
    """What they hold, inside a transformation; a compiled graph cannot look at it."""
    if offsets is None or torch.compiler.is_compiling():
        return
    while is_functorch_wrapped_tensor(offsets):
        offsets = get_unwrapped(offsets)
    if offsets.dim() != 1:
        raise ValueError("offsets must be the same for all of a vmap (in_dims None), got a batch of them")
    check_offset_values(offsets, num_steps)


def _normalized(log_ratio: Tensor, offsets: Tensor | None, weights: Tensor | None, sampled_from: str) -> Tensor:
    """(N,) log-ratios, shifted so that the density of the samples' other distribution has mass 1 over the samples."""
    _check_offset_values(offsets, log_ratio.shape[0])
    sums = _trajectory_sums(log_ratio, offsets)
    log_weights = -math.log(sums.shape[0]) if weights is None else weights.log()
    if sampled_from == "q":
        return sums - torch.logsumexp(sums + log_weights, dim=0)
    return sums + torch.logsumexp(log_weights - sums, dim=0)


def _trajectory_sums(log_ratio: Tensor, offsets: Tensor | None) -> Tensor:
    """(T,) -> (N,), summed in double precision, rounded to single where the log-ratios are in half."""
    dtype = dtype_of_sums(log_ratio)
    if offsets is None:
        return log_ratio.to(dtype)
    trajectory = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    trajectory = trajectory.repeat_interleave(offsets.diff(), output_size=log_ratio.shape[0])
    sums = torch.zeros(offsets.shape[0] - 1, dtype=torch.float64, device=log_ratio.device)
    return sums.index_add(0, trajectory, log_ratio.double()).to(dtype)


def _to_steps(values: Tensor, offsets: Tensor | None, num_steps: int) -> Tensor:
    """(N,) -> (T,), each trajectory's value at all its steps."""
    return values if offsets is None else values.repeat_interleave(offsets.diff(), dim=0, output_size=num_steps)


def _check_tensors(log_ratio: Tensor, offsets: Tensor | None, weights: Tensor | None) -> None:
    for name, tensor in (("log_ratio", log_ratio), ("weights", weights)):
        if name == "weights" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")
    if log_ratio.dim() != 1:
        raise ValueError(f"log_ratio must be of shape (T,), got {tuple(log_ratio.shape)}")
    samples = log_ratio.shape[0]
    if offsets is not None:
        if not isinstance(offsets, Tensor):
            raise TypeError(f"offsets must be a Tensor or None, got {type(offsets).__name__}")
        if offsets.dtype != torch.int64:
            raise TypeError(f"offsets must be of dtype torch.int64, got {offsets.dtype}")
        if offsets.dim() != 1 or offsets.shape[0] == 0:
            raise ValueError(f"offsets must be of shape (N+1,), got {tuple(offsets.shape)}")
        if offsets.device != log_ratio.device:
            raise ValueError(f"offsets must be on the device of log_ratio, {log_ratio.device}, got {offsets.device}")
        samples = offsets.shape[0] - 1
    if samples == 0:
        raise ValueError("log_ratio must hold at least one sample, got none")
    if weights is None:
        return
    if weights.shape != (samples,):
        raise ValueError(f"weights must be of shape (N,) = ({samples},), got {tuple(weights.shape)}")
    if weights.dtype != log_ratio.dtype:
        raise TypeError(f"weights must be of the dtype of log_ratio, {log_ratio.dtype}, got {weights.dtype}")
    if weights.device != log_ratio.device:
        raise ValueError(f"weights must be on the device of log_ratio, {log_ratio.device}, got {weights.device}")
