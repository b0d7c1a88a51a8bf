"""How good a hypergradient is: its standard error, and its bias from damping and from an unconverged lower level.

g = direct + Cᵀ A⁻¹ b is a smooth function of sample means, so to first order the data of trajectory i move it by

    d_i + Cᵢᵀ w + Cᵀ A⁻¹ (b_i − Aᵢ w)                                     (its influence; the delta method)

and the squared standard error is the sum of the squared influences. Their sum under random signs has exactly that as its
mean square, so a few such probes replace the N × R table. Each costs a product with A, a backward pass through the policy,
two through the reward, and one right-hand side of a block solve to a tenth.

A damping δ that is no part of the lower problem changes g by −δ Cᵀ A⁻¹ w to first order: one more right-hand side.
A policy off the lower optimum is off by A⁻¹ ∇_θV to first order (one Newton step). The derivative of g along that step is
taken on the same trajectories, reweighted to the moved policy.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ...trajectories import Trajectories
from ..curvature import lower_gradient
from ..flat import flatten, trainable_parameters, unflatten
from ..linearize import linearize
from ..modules import reward_values
from ..result import ErrorEstimate
from ..solvers import BIAS_RTOL, Solution, looser
from .implicit_function import ImplicitFunction
from .problem import Problem

_PROBE_RTOL = 0.1  # a standard error needs no more
_REWEIGHTED = 0.3


def estimate_error(
    problem: Problem, estimator: ImplicitFunction, solution: Solution, *, probes: int, seed: int = 0
) -> ErrorEstimate:
    """The error of direct + implicit at the solution w of −H w = b; all on the problem's own data.

    Args:
        probes: random sign vectors; the standard error is itself known to 1/√(2·probes) of each coordinate. With 0 only
            the damping's bias is estimated.
    """
    w = solution.value
    operator = estimator.operator(problem, solution.damping)
    if not probes:
        moved = looser(estimator.solver, BIAS_RTOL)(operator, w).value
        return ErrorEstimate(damping_bias=_damping_bias(problem, solution, moved))
    generator = torch.Generator().manual_seed(seed)
    signs = [_Signs(problem, generator) for _ in range(probes)]
    sources = torch.stack([_noise_of_the_system(problem, estimator, w, s) for s in signs])
    moved = looser(estimator.solver, _PROBE_RTOL)(operator, sources).value
    influences = [_influence(problem, w, y, s) for y, s in zip(moved, signs, strict=True)]
    ascent = _lower_gradient(problem, estimator)
    by_damping, newton = looser(estimator.solver, BIAS_RTOL)(operator, torch.stack([w, ascent])).value
    return ErrorEstimate(
        stderr=torch.stack(influences).square().mean(0).sqrt(),
        damping_bias=_damping_bias(problem, solution, by_damping),
        lower_bias=_lower_bias(problem, estimator, solution, newton),
    )


class _Signs:
    """Random signs for the upper samples and each batch of trajectories, as the weights that sum influences with them.

    They are centred, so that only deviations from the mean count; what serves in two roles has the same signs in both.
    """

    def __init__(self, problem: Problem, generator: torch.Generator) -> None:
        self.upper = _signed(problem.weights, generator)
        self.lower = self._of(problem.lower, problem, generator)
        self.cross = self.lower if problem.cross is problem.lower else self._of(problem.cross, problem, generator)

    def _of(self, trajectories: Trajectories, problem: Problem, generator: torch.Generator) -> Tensor:
        if len(problem.parts) == 1 and trajectories is problem.parts[0]:
            return self.upper
        return _signed(trajectories.weights, generator)


def _signed(weights: Tensor, generator: torch.Generator) -> Tensor:
    count = weights.shape[0]
    signs = (torch.randint(2, (count,), generator=generator) * 2 - 1).to(weights)
    total = weights.sum()
    mean = (weights * signs).sum() / torch.where(total != 0, total, 1.0)
    return weights * (signs - mean) * (count / max(count - 1, 1)) ** 0.5


def _noise_of_the_system(problem: Problem, estimator: ImplicitFunction, w: Tensor, signs: _Signs) -> Tensor:
    """(P,) Σ sign_i (b_i − Aᵢ w)."""
    operator = estimator.plain_operator(problem, signs.lower)
    return problem.rhs(signs.upper) - operator.product(w)


def _influence(problem: Problem, w: Tensor, moved: Tensor, signs: _Signs) -> Tensor:
    """(R,) Σ sign_i influence_i, with `moved` = A⁻¹ Σ sign_i (b_i − Aᵢ w)."""
    return (
        problem.direct(signs.upper)
        + problem.cross_term(problem.responses(w), signs.cross)
        + problem.cross_term(problem.responses(moved))
    )


def _damping_bias(problem: Problem, solution: Solution, moved: Tensor) -> Tensor:
    """(R,) from `moved` = A⁻¹ w."""
    return -solution.damping * problem.cross_term(problem.responses(moved))


def _lower_gradient(problem: Problem, estimator: ImplicitFunction) -> Tensor:
    """(P,) ∇_θV at the policy as it is, entropy and damping of the curvature included."""
    curvature = estimator.curvature
    rewards = reward_values(problem.reward, problem.lower, chunk_steps=problem.chunk_steps)
    gradient = lower_gradient(
        problem.linearize(problem.lower),
        rewards,
        problem.discount,
        getattr(curvature, "temperature", 0.0),
        baseline=bool(problem.baseline),
    )
    damping = getattr(curvature, "damping", 0.0)
    if damping and damping != "auto":
        params = trainable_parameters(problem.policy, "policy").values()
        gradient = gradient - damping * flatten(p.detach() for p in params)
    return gradient


def _lower_bias(problem: Problem, estimator: ImplicitFunction, solution: Solution, newton: Tensor) -> Tensor:
    """(R,) g here less g one Newton step on, to first order in the step."""
    if not bool(torch.isfinite(newton).all()):
        return torch.full_like(problem.direct(), float("nan"))
    fraction = _fraction_to_go(problem, newton)

    def gradient(step: Tensor) -> Tensor:
        policy = _moved(problem.policy, step)
        there = problem.with_policy(policy, lambda trajectories: _density_ratios(problem, policy, trajectories))
        operator = estimator.operator(there, solution.damping)
        w = estimator.solver(operator, there.rhs(), solution.value).value
        return there.direct() + there.cross_term(there.responses(w))

    return (gradient(0.0 * newton) - gradient(fraction * newton)) / fraction


def _moved(policy: nn.Module, step: Tensor) -> nn.Module:
    moved = copy.deepcopy(policy)
    params = list(trainable_parameters(moved, "policy").values())
    with torch.no_grad():
        for param, piece in zip(params, unflatten(step, params), strict=True):
            param.add_(piece)
    return moved


def _density_ratios(problem: Problem, policy: nn.Module, trajectories: Trajectories) -> Tensor:
    """(N,) probability of each trajectory under `policy` over that under the problem's own."""
    there = linearize(policy, trajectories, chunk_steps=problem.chunk_steps).log_prob
    return trajectories.sum_steps(there - problem.linearize(trajectories).log_prob).exp()


def _fraction_to_go(problem: Problem, newton: Tensor) -> float:
    """How much of the Newton step changes no trajectory's log-density by more than `_REWEIGHTED`, to first order."""
    changes = [
        trajectories.sum_steps(problem.linearize(trajectories).jvp(newton)).abs().max()
        for trajectories in (problem.lower, problem.cross, *problem.parts)
    ]
    return float((_REWEIGHTED / torch.stack(changes).max()).clamp_max(1.0))
