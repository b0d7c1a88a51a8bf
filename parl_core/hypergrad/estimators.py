"""The PARL hypergradient of a reward that is judged on data from the policy it induces.

Source: Chakraborty et al., "PARL: A Unified Framework for Policy Alignment in Reinforcement Learning from Human
Feedback", ICLR 2024; the estimator is re-derived and checked against finite differences in tests/hypergrad.

    lower   θ*(ν) = argmax_θ V(ν, θ)
    upper   L(ν) = E_{τ∼ρ(θ*(ν))}[U_ν(τ)] + Z(ν), minimised
    dL/dν = E[∇_ν U_ν] + ∇Z + Cᵀ w,   −H w = b,   b = E[(U − base) S(τ)],   Cᵀ w = ∇_ν E[Σ_h γ^h r_ν(s_h, a_h) S_{0:h}·w]

Neither H nor C is formed: b is a VJP of the log-probs, H acts by products, and Cᵀw takes one JVP, one prefix sum and one
backward pass through the reward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops import prefix_sum
from ..trajectories import PreferencePairs, Trajectories, require_finite
from .curvature import Curvature
from .flat import differentiating, flat_grad, trainable_parameters
from .linearize import linearize
from .losses import UpperLoss, centre, evaluate_reward
from .result import Hypergradient, warn_about
from .solvers import CG, Solver

_DEFAULT_SOLVER = CG()
POLICY_NOT_AT_MAXIMUM = (
    "the policy is not at a local maximum of its value: train it further, add damping, or use Fisher curvature"
)


@differentiating
def hypergradient(
    policy: nn.Module,
    reward: nn.Module,
    lower: Trajectories,
    upper: PreferencePairs | Trajectories,
    *,
    loss: UpperLoss,
    discount: float,
    curvature: Curvature,
    solver: Solver = _DEFAULT_SOLVER,
    regularizer: Callable[[nn.Module], Tensor] | None = None,
    baseline: bool = True,
    x0: Tensor | None = None,
) -> Hypergradient:
    """Gradient of the upper loss with respect to the reward's parameters, through the policy that the reward induces.

    Args:
        policy: module with `log_prob(observations, actions) -> (T,)`, at (or near) the optimum of the lower level.
        reward: module with `forward(observations, actions) -> (T,)`.
        lower: on-policy trajectories for H and C. Take them independent of `upper`: the three factors multiply, and
            sharing samples among them biases the product.
        upper: on-policy data for the direct term and b, of the kind that `loss` takes.
        loss: `PreferenceLoss()` or `TrajectoryLoss(fn)`.
        discount: γ of the lower level, in [0, 1].
        curvature: `Fisher(temperature)`, `ScoreHessian()`, `LogProbHessian()` or `Identity()`.
        solver: `CG(...)`, `Dense()` or any callable (operator, rhs, x0) -> Solution.
        regularizer: Z, reward -> scalar tensor.
        baseline: subtract a baseline from U in b (lower variance, same expectation).
        x0: (P,) warm start of the solve, such as the previous call's `solution.value`.

    Returns:
        `Hypergradient` with flat terms (num_reward_params,), over the reward's parameters that require a gradient.

    Raises:
        TypeError, ValueError: arguments of the wrong kind or shape; the message names them.
        NonFiniteError: a NaN or an infinity in rewards, log-probabilities or the loss.

    Warns:
        HypergradientWarning: the solve did not converge, the lower level is not at a maximum, or a term is not finite.
    """
    for name, given in (("curvature", curvature), ("solver", solver), ("loss", loss)):
        if isinstance(given, type):
            raise TypeError(f"{name} must be an instance, got the class: write {given.__name__}(…)")
    if not isinstance(lower, Trajectories):
        raise TypeError(f"lower must be Trajectories, got {type(lower).__name__}")
    if not 0 <= discount <= 1:
        raise ValueError(f"discount must lie in [0, 1], got {discount}")
    if lower.num_steps == 0:
        raise ValueError("lower must hold at least one step, got none: without it there is no implicit term")
    reward_params = list(trainable_parameters(reward, "reward").values())

    losses = loss.per_sample(reward, upper)
    if losses.shape[0] == 0:
        raise ValueError("upper must hold at least one sample, got none")
    require_finite("the upper loss", losses.detach())
    direct = flat_grad([losses], reward_params, [upper.weights])

    values = losses.detach()
    if baseline:
        values = centre(values, upper.weights, upper.is_sample)
    rhs = _weighted_scores(policy, loss.trajectories(upper), upper.weights * values)

    linearization = linearize(policy, lower)
    rewards = evaluate_reward(reward, lower)
    operator = curvature.operator(linearization, rewards.detach(), discount)
    solution = solver(operator, rhs, x0)

    responses = prefix_sum(linearization.jvp(solution.value), lower.offsets)  # (T,) S_{0:h}·w
    discounts = discount ** lower.time.to(lower.observations.dtype)
    implicit = flat_grad([rewards], reward_params, [lower.step_weights * discounts * responses])

    result = Hypergradient(
        direct=direct,
        implicit=implicit,
        regularizer=_regularizer_gradient(regularizer, reward, reward_params),
        solution=solution,
        parameters=reward_params,
    )
    warn_about(result, POLICY_NOT_AT_MAXIMUM, stacklevel=3)
    return result


def _weighted_scores(policy: nn.Module, parts: tuple[Trajectories, ...], weights: Tensor) -> Tensor:
    """(P,) Σ_samples weight · S, S being the score of all the trajectories a sample consists of."""
    total: Tensor | None = None
    for trajectories in parts:
        scores = linearize(policy, trajectories).vjp(weights[trajectories.trajectory_index])
        total = scores if total is None else total + scores
    if total is None:
        raise ValueError("loss.trajectories(upper) must name at least one Trajectories")
    return total


def _regularizer_gradient(
    regularizer: Callable[[nn.Module], Tensor] | None, reward: nn.Module, params: list[nn.Parameter]
) -> Tensor:
    if regularizer is None:
        return torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype, device=params[0].device)
    value = regularizer(reward)
    if not isinstance(value, Tensor) or value.dim() != 0:
        came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"regularizer(reward) must return a scalar tensor, got {came}")
    require_finite("regularizer(reward)", value.detach())
    return flat_grad([value], params, [torch.ones_like(value)])
