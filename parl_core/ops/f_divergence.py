"""Monte-Carlo estimates of f-divergences from log-ratios, differentiable at any order.

An estimate is Σᵢ wᵢ g(rᵢ) with the g that `f_divergence_terms.term_of` chooses, over steps or over trajectories, whose
log-ratios are the sums of those of their steps. Its derivatives are made of g′ and g″, and g‴ and beyond of the formulas
of g″ in plain torch. Where only a gradient is asked for, it is computed with the value, in one pass over the data.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual

from ..offsets import check_offset_values, reads_are_free
from .f_divergence_terms import Term, jet, term_of
from .registry import Kernel, Op
from .segments import is_traced, is_wrapped, plain


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
    if self_normalized:
        if on_policy:
            raise ValueError("self_normalized must be False with on_policy=True: policies have normalised densities")
        log_ratio, offsets = _normalized(log_ratio, offsets, weights, sampled_from), None
    if is_traced(log_ratio) or _is_transformed(log_ratio, offsets, weights):
        return _composed(log_ratio, offsets, weights, term, backend)
    chosen = _SUM.select(log_ratio, backend)
    if torch.is_grad_enabled() and (log_ratio.requires_grad or (weights is not None and weights.requires_grad)):
        return _Sum.apply(log_ratio, weights, offsets, term, chosen)
    return _run_sum(log_ratio, offsets, weights, term, None, chosen)


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


def reference_terms(log_ratio: Tensor, term: Term, order: int) -> Tensor:
    """The specification of the elementwise derivatives of order 0, 1 and 2, in double precision."""
    return jet(term, log_ratio.double())[order].to(log_ratio.dtype)


def _load_sum() -> Kernel:
    native = importlib.import_module("parl_core._native").divergence_sum

    def cpp(
        log_ratio: Tensor, offsets: Tensor | None, weights: Tensor | None, term: Term, gradient: Tensor | None
    ) -> Tensor:
        value = native(log_ratio, offsets, weights, gradient, *term, torch.get_num_threads())
        return torch.scalar_tensor(value, dtype=log_ratio.dtype)

    return cpp


def _load_terms() -> Kernel:
    native = importlib.import_module("parl_core._native").divergence_terms

    def cpp(log_ratio: Tensor, term: Term, order: int) -> Tensor:
        out = torch.empty_like(log_ratio)
        native(log_ratio, out, *term, order, torch.get_num_threads())
        return out

    return cpp


_SUM = Op("f_divergence", reference)
_TERMS = Op("f_divergence, elementwise", reference_terms)
_NATIVE: dict[str, Any] = {
    "device_types": frozenset({"cpu"}),
    "dtypes": frozenset({torch.float32, torch.float64}),
}
_SUM.register("cpp", _load_sum, **_NATIVE)
_TERMS.register("cpp", _load_terms, **_NATIVE)


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
    """The estimate under plain autograd, with its gradient computed on the way.

    The gradient is handed out once, and only to a backward pass that is not itself differentiated: it carries no second
    derivative. Any other pass computes it again by `_terms`, which does.
    """

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
        differentiated = torch.is_grad_enabled() or is_wrapped(cotangent)
        if gradient is not None and not differentiated and not ctx.needs_input_grad[1]:
            if not reads_are_free(cotangent.device) or cotangent.item() != 1.0:
                gradient.mul_(cotangent)
            return gradient, *(None,) * 4
        sums = _trajectory_sums(log_ratio, offsets)
        by_ratio = by_weights = None
        if ctx.needs_input_grad[0]:
            scale = 1.0 / len(sums) if weights is None else weights
            slopes = cotangent * scale * _terms(sums, ctx.term, 1, ctx.backend)
            by_ratio = _to_steps(slopes, offsets, len(log_ratio))
        if ctx.needs_input_grad[1]:
            by_weights = cotangent * _terms(sums, ctx.term, 0, ctx.backend)
        return by_ratio, by_weights, None, None, None


def _composed(
    log_ratio: Tensor, offsets: Tensor | None, weights: Tensor | None, term: Term, backend: str | None
) -> Tensor:
    """The same of parts that autograd, torch.func and torch.compile take through any transformation."""
    _check_offset_values(offsets, log_ratio.shape[0])
    values = _terms(_trajectory_sums(log_ratio, offsets), term, 0, backend)
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
    """(T,) -> (N,), summed in double precision."""
    if offsets is None:
        return log_ratio
    trajectory = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    trajectory = trajectory.repeat_interleave(offsets.diff(), output_size=log_ratio.shape[0])
    sums = torch.zeros(offsets.shape[0] - 1, dtype=torch.float64, device=log_ratio.device)
    return sums.index_add(0, trajectory, log_ratio.double()).to(log_ratio.dtype)


def _to_steps(values: Tensor, offsets: Tensor | None, num_steps: int) -> Tensor:
    """(N,) -> (T,), each trajectory's value at all its steps."""
    return values if offsets is None else values.repeat_interleave(offsets.diff(), dim=0, output_size=num_steps)


def _terms(log_ratio: Tensor, term: Term, order: int, backend: str | None) -> Tensor:
    """The derivative of `order` 0, 1 or 2 of the summand at every log-ratio, differentiable at any order."""
    differentiated = torch.is_grad_enabled() and log_ratio.requires_grad
    if differentiated or torch.compiler.is_compiling() or _is_transformed(log_ratio):
        if order == 2:  # beyond it there is no kernel
            return jet(term, log_ratio)[2]
        if torch.compiler.is_compiling():
            return _terms_op(log_ratio, *term, order, backend)
        return _Terms.apply(log_ratio, term, order, backend)
    return _run_terms(log_ratio, term, order, backend)


def _run_terms(log_ratio: Tensor, term: Term, order: int, backend: str | None) -> Tensor:
    if is_traced(log_ratio):
        return _terms_op(log_ratio, *term, order, backend)
    flat = plain(log_ratio).reshape(-1)
    return _TERMS.kernel(_TERMS.select(flat, backend))(flat, term, order).reshape(log_ratio.shape)


class _Terms(torch.autograd.Function):
    """A derivative of the summand; its own derivative is the next one."""

    @staticmethod
    def forward(log_ratio: Tensor, term: Term, order: int, backend: str | None) -> Tensor:
        return _run_terms(log_ratio, term, order, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        log_ratio, ctx.term, ctx.order, ctx.backend = inputs
        ctx.save_for_backward(log_ratio)
        ctx.save_for_forward(log_ratio)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        (log_ratio,) = ctx.saved_tensors
        return cotangent * _terms(log_ratio, ctx.term, ctx.order + 1, ctx.backend), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (log_ratio,) = ctx.saved_tensors
        return tangent * _terms(log_ratio, ctx.term, ctx.order + 1, ctx.backend)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], log_ratio: Tensor, term: Term, order: int, backend: str | None
    ) -> tuple[Tensor, int | None]:
        return _terms(log_ratio, term, order, backend), in_dims[0]


# Under torch.compile the derivatives are opaque nodes, see scan.py.
@torch.library.custom_op(
    "parl_core::f_divergence_terms",
    mutates_args=(),
    schema=(
        "(Tensor log_ratio, str function, bool flipped, bool over_ratio, float alpha, int order, str? backend) -> Tensor"
    ),
)
def _terms_op(
    log_ratio: Tensor,
    function: str,
    flipped: bool,
    over_ratio: bool,
    alpha: float,
    order: int,
    backend: str | None,
) -> Tensor:
    return _run_terms(log_ratio, Term(function, flipped, over_ratio, alpha), order, backend)


@_terms_op.register_fake
def _(log_ratio: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(log_ratio, memory_format=torch.contiguous_format)


def _setup_op_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    log_ratio, *term, ctx.order, ctx.backend = inputs
    ctx.term = Term(*term)
    ctx.save_for_backward(log_ratio)


def _op_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    (log_ratio,) = ctx.saved_tensors
    if ctx.order == 1:
        return cotangent * jet(ctx.term, log_ratio)[2], *(None,) * 6
    return cotangent * _terms_op(log_ratio, *ctx.term, ctx.order + 1, ctx.backend), *(None,) * 6


_terms_op.register_autograd(_op_backward, setup_context=_setup_op_context)


def _is_transformed(*tensors: Tensor | None) -> bool:
    return any(
        is_functorch_wrapped_tensor(tensor) or unpack_dual(tensor).tangent is not None
        for tensor in tensors
        if tensor is not None
    )


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
