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

import torch
from torch import Tensor

from ...trajectories import Trajectories
from ..captured import CapturedPolicy
from ..curvature import lower_gradient
from ..flat import flatten, unflatten
from ..linearize import Linearization
from ..result import ErrorEstimate
from ..solvers import (
    BIAS_RTOL,
    CG,
    MINRES,
    PCG,
    Dense,
    LinearOperator,
    Neumann,
    NystromPCG,
    Solution,
    Solver,
    Woodbury,
    damping_of,
    looser,
)
from .implicit_function import ImplicitFunction
from .problem import Problem

_PROBE_RTOL = 0.1  # a standard error needs no more
_REWEIGHTED = 0.3
_TAKE_BLOCKS = (CG, PCG, MINRES, Dense, Neumann, NystromPCG, Woodbury)


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
        (moved,), cost = _solve(looser(estimator.solver, BIAS_RTOL), operator, w[None])
        return ErrorEstimate(damping_bias=-solution.damping * problem.cross_term(moved), cost=cost)
    generator = torch.Generator().manual_seed(seed)
    signs = [_Signs(problem, generator) for _ in range(probes)]
    sources = torch.stack([_noise_of_the_system(problem, estimator, w, s) for s in signs])
    moved, probe_cost = _solve(looser(estimator.solver, _PROBE_RTOL), operator, sources)
    influences = [_influence(problem, w, y, s) for y, s in zip(moved, signs, strict=True)]
    ascent = _lower_gradient(problem, estimator)
    biases, bias_cost = _solve(looser(estimator.solver, BIAS_RTOL), operator, torch.stack([w, ascent]))
    by_damping, newton = biases
    lower_bias, moved_cost = _lower_bias(problem, estimator, solution, newton)
    costs = [probe_cost, bias_cost, moved_cost]
    product = getattr(operator, "cost", None)
    known = [cost for cost in costs if cost is not None]
    return ErrorEstimate(
        stderr=torch.stack(influences).square().mean(0).sqrt(),
        damping_bias=-solution.damping * problem.cross_term(by_damping),
        lower_bias=lower_bias,
        cost=None if product is None or len(known) < len(costs) else sum(known) + probes * product,
    )


def _solve(solver: Solver, operator: LinearOperator, rows: Tensor) -> tuple[Tensor, float | None]:
    """(K, P) -> (K, P) and what it cost; a solver from elsewhere is given one row at a time."""
    if isinstance(solver, _TAKE_BLOCKS):
        solution = solver(operator, rows)
        return solution.value, solution.cost
    solutions = [solver(operator, row, None) for row in rows]
    costs = [s.cost for s in solutions if s.cost is not None]
    return torch.stack([s.value for s in solutions]), sum(costs) if len(costs) == len(solutions) else None


class _Signs:
    """Random signs for the upper samples and each batch of trajectories, as the weights that sum influences with them.

    They are centred, so that only deviations from the mean count; what serves in two roles has the same signs in both.
    """

    def __init__(self, problem: Problem, generator: torch.Generator) -> None:
        self.upper = _signed(problem.weights, generator)
        self.lower = self._of(problem.lower, problem, generator)
        self.cross = self.lower if problem.cross is problem.lower else self._of(problem.cross, problem, generator)

    def _of(self, trajectories: Trajectories, problem: Problem, generator: torch.Generator) -> Tensor:
        if any(part is trajectories for part in problem.parts):
            return self.upper
        return _signed(trajectories.weights, generator)


def _signed(weights: Tensor, generator: torch.Generator) -> Tensor:
    """(n,) weight · (sign − mean sign), with the n/(n − 1) of a sample variance; NaN for a single one."""
    count = weights.shape[0]
    signs = _random_signs(count, generator).to(weights)
    return weights * (signs - signs.mean()) * (count / (count - 1) if count > 1 else float("nan")) ** 0.5


def _random_signs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (count,), generator=generator) * 2 - 1


def _noise_of_the_system(problem: Problem, estimator: ImplicitFunction, w: Tensor, signs: _Signs) -> Tensor:
    """(P,) Σ sign_i (b_i − Aᵢ w)."""
    operator = estimator.plain_operator(problem, signs.lower)
    image = operator(w) - damping_of(operator) * w
    return problem.rhs_noise(signs.upper) - image


def _influence(problem: Problem, w: Tensor, moved: Tensor, signs: _Signs) -> Tensor:
    """(R,) Σ sign_i influence_i, with `moved` = A⁻¹ Σ sign_i (b_i − Aᵢ w)."""
    return problem.direct(signs.upper) + problem.cross_noise(w, signs.cross) + problem.cross_term(moved)


def _lower_gradient(problem: Problem, estimator: ImplicitFunction) -> Tensor:
    """(P,) ∇_θV at the policy as it is, entropy and damping of the curvature included."""
    curvature = estimator.curvature
    gradient = lower_gradient(
        problem.linearize(problem.lower),
        problem.rewards(problem.lower),
        problem.discount,
        getattr(curvature, "temperature", 0.0),
        baseline=bool(problem.baseline),
    )
    damping = getattr(curvature, "damping", 0.0)
    if damping and damping != "auto":
        gradient = gradient - damping * flatten(p.detach() for p in problem.policy.params)
    return gradient


def _lower_bias(
    problem: Problem, estimator: ImplicitFunction, solution: Solution, newton: Tensor
) -> tuple[Tensor, float | None]:
    """(R,) g here less g one Newton step on, to first order in the step; and the cost."""
    if not bool(torch.isfinite(newton).all()):
        return torch.full_like(problem.direct(), float("nan")), 0.0
    fraction = _fraction_to_go(problem, newton)
    spent: list[float | None] = []

    def gradient(step: Tensor) -> Tensor:
        policy = _moved(problem.policy, step)
        there = problem.with_policy(policy, lambda trajectories: _density_ratios(problem, policy, trajectories))
        found = estimator.solver(estimator.operator(there, solution.damping), there.rhs(), solution.value)
        spent.append(found.cost)
        return there.direct() + there.cross_term(found.value)

    bias = (gradient(0.0 * newton) - gradient(fraction * newton)) / fraction
    return bias, None if None in spent else sum(cost for cost in spent if cost is not None)


def _moved(policy: CapturedPolicy, step: Tensor) -> CapturedPolicy:
    pieces = unflatten(step, policy.params)
    return policy.at([(p + piece).detach().requires_grad_() for p, piece in zip(policy.params, pieces, strict=True)])


def _density_ratios(problem: Problem, policy: CapturedPolicy, trajectories: Trajectories) -> Tensor:
    """(N,) probability of each trajectory under `policy` over that under the problem's own."""
    there = Linearization(policy, trajectories, problem.chunk_steps).log_prob
    return trajectories.sum_steps(there - problem.linearize(trajectories).log_prob).exp()


def _fraction_to_go(problem: Problem, newton: Tensor) -> float:
    """How much of the Newton step changes no trajectory's log-density by more than `_REWEIGHTED`, to first order."""
    changes = [
        trajectories.sum_steps(problem.linearize(trajectories).jvp(newton)).abs().max()
        for trajectories in (problem.lower, problem.cross, *problem.parts)
    ]
    return float((_REWEIGHTED / torch.stack(changes).max()).clamp_max(1.0))
