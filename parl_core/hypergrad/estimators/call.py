"""The PARL hypergradient of a reward that is judged on data from the policy it induces.

Source: Chakraborty et al., "PARL: A Unified Framework for Policy Alignment in Reinforcement Learning from Human
Feedback", ICLR 2024; the estimator is re-derived and checked against finite differences in tests/hypergrad.

    lower   θ*(ν) = argmax_θ V(ν, θ)
    upper   L(ν) = E_{τ∼ρ(θ*(ν))}[U_ν(τ)] + Z(ν), minimised
    dL/dν = E[∇_ν U_ν] + ∇Z + (dθ*/dν)ᵀ b,   b = E[(U − base) S(τ)]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...trajectories import PreferencePairs, Trajectories, require_finite
from ..captured import CapturedPolicy, CapturedReward
from ..curvature import Curvature
from ..flat import differentiating, flatten, without_autocast
from ..losses import UpperLoss
from ..result import Hypergradient, warn_about
from ..solvers import CG, Solver
from .base import DirectOnly, Estimator
from .error import estimate_error
from .first_order import NudgedContrast, ValuePenalty, ZeroOrder
from .folds import cross_fit
from .implicit_function import ImplicitFunction
from .problem import Baseline, Problem
from .soft_optimal import BCHG, SoBiRL
from .unrolled import Unrolled

_DEFAULT_SOLVER = CG()
_ONE_FACTOR = (BCHG, SoBiRL, DirectOnly, NudgedContrast, ValuePenalty, Unrolled, ZeroOrder)
POLICY_NOT_AT_MAXIMUM = (
    "the policy is not at a local maximum of its value: train it further, add damping, or use Fisher curvature"
)


@differentiating
@without_autocast
def hypergradient(
    policy: nn.Module,
    reward: nn.Module,
    lower: Trajectories,
    upper: PreferencePairs | Trajectories,
    *,
    loss: UpperLoss,
    discount: float,
    curvature: Curvature | None = None,
    solver: Solver = _DEFAULT_SOLVER,
    estimator: Estimator | None = None,
    regularizer: Callable[[nn.Module], Tensor] | None = None,
    baseline: Baseline = True,
    x0: Tensor | None = None,
    cross: Trajectories | None = None,
    folds: int = 1,
    error_probes: int = 0,
    chunk_steps: int | None = None,
) -> Hypergradient:
    """Gradient of the upper loss with respect to the reward's parameters, through the policy that the reward induces.

    Args:
        policy: module with `log_prob(observations, actions) -> (T,)`, at (or near) the optimum of the lower level, and in
            evaluation mode if it holds dropout, which is refused, or running statistics.
        reward: module with `forward(observations, actions) -> (T,)`, in evaluation mode as the policy.
        lower: on-policy trajectories for H and C. Take them independent of `upper`: the three factors multiply, and
            sharing samples among them biases the product.
        upper: on-policy data for the direct term and b, of the kind that `loss` takes.
        loss: `PreferenceLoss()` or `TrajectoryLoss(fn)`.
        discount: γ of the lower level, in [0, 1].
        curvature: `Fisher(temperature)`, `ScoreHessian()`, `LogProbHessian()` or `Identity()`, for the implicit function
            theorem.
        solver: of the linear system with it: `CG(...)`, `Dense()` or any callable (operator, rhs, x0) -> Solution.
        estimator: of the implicit term, in place of `curvature` and `solver`: `DirectOnly`, `HPGD`, `BCHG`, `SoBiRL`,
            `NudgedContrast`, `ValuePenalty`, `Unrolled`, `ZeroOrder`.
        regularizer: Z, reward -> scalar tensor.
        baseline: subtract baselines from U in b and from S in C: less variance, the same expectation (with given weights up
            to O(1/N)). Or a function trajectories -> (T,), subtracted from U at each step in b: an estimate of U from the
            states up to that step and the actions before it.
        x0: (P,) warm start of the solve, such as the previous call's `solution.value`.
        cross: on-policy trajectories for C, independent of `lower`, which then serves H alone.
        folds: cut the data into this many folds and average over their rotations, in each of which b, H and C come from
            different ones (cross-fitting), so that one batch serves all three without the bias of a shared sample. At least
            3 if `upper` and `lower` are, or hold, the same object, otherwise 2. For curvatures and HPGD.
        error_probes: random probes for `result.error`; 0 for none, 8 give the standard error to a quarter. Each costs about
            a loose solve, and the biases two hypergradients; `result.error.cost` tells. An automatic damping has its bias
            estimated in any case, at a loose solve.
        chunk_steps: go over `lower` and `cross` in chunks of at most this many steps and keep no graph, so that memory does
            not grow with them; each product then redoes the policy's forward pass.

    Returns:
        `Hypergradient` with flat terms (num_reward_params,), over the reward's parameters that require a gradient.

    Autocast is off for its time: short dtypes have too few digits for second derivatives.

    Raises:
        TypeError, ValueError: arguments of the wrong kind, shape or dtype (float32 and float64 serve); it names them.
        NonFiniteError: a NaN or an infinity in rewards, log-probabilities or the loss.

    Warns:
        HypergradientWarning: the solve did not converge, the lower level is not at a maximum, or a term is not finite.
    """
    chosen = _choose(curvature, solver, estimator)
    _check_options(chosen, loss, discount, baseline, x0, folds, error_probes)
    for name, given in (("lower", lower), ("cross", lower if cross is None else cross)):
        if not isinstance(given, Trajectories):
            raise TypeError(f"{name} must be Trajectories, got {type(given).__name__}")
        if given.num_steps == 0:
            raise ValueError(f"{name} must hold at least one step, got none: without it there is no implicit term")
    captured_policy, captured = CapturedPolicy(policy), CapturedReward(reward)
    _check_levels(policy, reward)

    captured.check_repeatable(lower)
    losses, parts = _losses_and_parts(captured, loss, upper)
    in_dtype = _Converted(losses.dtype)
    problem = Problem(
        policy=captured_policy,
        reward=captured,
        discount=discount,
        losses=losses,
        weights=torch.full_like(losses.detach(), 1 / len(losses))
        if upper.is_sample
        else upper.weights.to(losses.dtype),
        is_sample=upper.is_sample,
        parts=tuple(in_dtype(part) for part in parts),
        lower=in_dtype(lower),
        cross=in_dtype(lower if cross is None else cross),
        baseline=baseline,
        chunk_steps=chunk_steps,
        keep_graph=error_probes > 0,
    )
    outcome = chosen.implicit(problem, x0) if folds == 1 else cross_fit(chosen, problem, x0, folds)
    result = Hypergradient(
        direct=problem.direct(),
        implicit=outcome.implicit,
        regularizer=_regularizer_gradient(regularizer, captured),
        solution=outcome.solution,
        parameters=captured.own,
        error=outcome.error,
    )
    if isinstance(chosen, ImplicitFunction) and outcome.solution is not None and (error_probes or chosen.automatic):
        result.error = estimate_error(problem, chosen, outcome.solution, probes=error_probes)
    warn_about(result, POLICY_NOT_AT_MAXIMUM, stacklevel=4)
    return result


class _Converted:
    """Trajectories whose weights have another dtype than the losses (token ids say nothing about it), converted once each,
    so that what served in two roles still does."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._found = dtype, dict[int, Trajectories]()

    def __call__(self, trajectories: Trajectories) -> Trajectories:
        if trajectories.weights.dtype == self._dtype:
            return trajectories
        if id(trajectories) not in self._found:
            self._found[id(trajectories)] = trajectories.to(self._dtype)
        return self._found[id(trajectories)]


def _choose(curvature: Curvature | None, solver: Solver, estimator: Estimator | None) -> Estimator:
    for name, given in (("curvature", curvature), ("solver", solver), ("estimator", estimator)):
        if isinstance(given, type):
            raise TypeError(f"{name} must be an instance, got the class: write {given.__name__}(…)")
    if (curvature is None) == (estimator is None):
        came = "neither" if curvature is None else "both"
        raise TypeError(f"give one of curvature and estimator, got {came}")
    if estimator is None:
        assert curvature is not None
        return ImplicitFunction(curvature, solver)
    if not callable(getattr(estimator, "implicit", None)):
        raise TypeError(f"estimator must have a method implicit, as DirectOnly has, got {type(estimator).__name__}")
    return estimator


def _check_options(
    chosen: Estimator,
    loss: object,
    discount: float,
    baseline: object,
    x0: Tensor | None,
    folds: int,
    error_probes: int,
) -> None:
    if isinstance(loss, type):
        raise TypeError(f"loss must be an instance, got the class: write {loss.__name__}(…)")
    if not 0 <= discount <= 1:
        raise ValueError(f"discount must lie in [0, 1], got {discount}")
    if not isinstance(baseline, bool) and not callable(baseline):
        raise TypeError(f"baseline must be True, False or a function trajectories -> (T,), got {baseline!r}")
    if isinstance(error_probes, bool) or not isinstance(error_probes, int) or error_probes < 0:
        raise ValueError(f"error_probes must be a whole number, at least 0, got {error_probes!r}")
    if isinstance(chosen, ImplicitFunction):
        operator = chosen.curvature.operator
        if error_probes and "weights" not in inspect.signature(operator).parameters:
            raise TypeError(
                "error_probes need a curvature whose operator(linearization, rewards, discount, weights=None) takes other "
                f"weights of the trajectories, which {type(chosen.curvature).__name__}'s does not"
            )
        return
    kind = type(chosen).__name__
    if error_probes:
        raise ValueError(f"error_probes serve a curvature and its solver, not the estimator {kind}")
    if x0 is not None:
        raise ValueError(f"x0 is the start of a solve, which the estimator {kind} has none of")
    if folds != 1 and isinstance(chosen, _ONE_FACTOR):
        raise ValueError(f"folds serve a product of factors from different data, which the estimator {kind} is not")


def _check_levels(policy: nn.Module, reward: nn.Module) -> None:
    """Refuse a parameter that both levels share, and levels of different dtypes."""
    names = {id(p): name for name, p in policy.named_parameters() if p.requires_grad}
    for name, parameter in reward.named_parameters():
        if parameter.requires_grad and id(parameter) in names:
            raise ValueError(
                f"policy's '{names[id(parameter)]}' and reward's '{name}' are the same parameter: it belongs to one level "
                "only, so freeze it (requires_grad_(False)) or give one of them a copy"
            )
    own, other = (next(p for p in module.parameters() if p.requires_grad).dtype for module in (policy, reward))
    if own != other:
        raise ValueError(f"policy and reward must have parameters of the same dtype, got {own} and {other}")


def _losses_and_parts(
    reward: CapturedReward, loss: UpperLoss, upper: PreferencePairs | Trajectories
) -> tuple[Tensor, tuple[Trajectories, ...]]:
    """(n,) with its graph, and what each of the n samples consists of."""
    losses = reward.run(loss.per_sample, upper)
    number = upper.weights.shape[0]
    if not isinstance(losses, Tensor) or losses.shape != (number,) or not losses.is_floating_point():
        came = f"{losses.dtype} of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"loss must give real numbers of shape (n,) = ({number},), one for each sample, got {came}")
    if number == 0:
        raise ValueError("upper must hold at least one sample, got none")
    require_finite("the upper loss", losses.detach())
    parts = loss.trajectories(upper)
    if not parts:
        raise ValueError("loss.trajectories(upper) must name at least one Trajectories")
    for part in parts:
        if part.num_trajectories != number:
            raise ValueError(
                f"loss.trajectories(upper) must name Trajectories of {number} each, one for each sample, "
                f"got {part.num_trajectories}"
            )
    return losses, tuple(parts)


def _regularizer_gradient(regularizer: Callable[[nn.Module], Tensor] | None, reward: CapturedReward) -> Tensor:
    if regularizer is None:
        return torch.zeros_like(flatten(p.detach() for p in reward.own))
    value = reward.run(regularizer)
    if not isinstance(value, Tensor) or value.dim() != 0:
        came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"regularizer(reward) must return a scalar tensor, got {came}")
    require_finite("regularizer(reward)", value.detach())
    return reward.gradient([value], [torch.ones_like(value)])
