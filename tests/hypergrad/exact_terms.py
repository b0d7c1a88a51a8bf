"""The factors of the hypergradient on an enumerated MDP, each by autograd from its definition, and samples of that MDP.

Everything but `draw` and `Captured` shares no code with the engine.
"""

from __future__ import annotations

import torch
from torch import Tensor

import parl_core as parl
from tests.hypergrad.enumerated import DTYPE, Enumerated


def hessian(problem: Enumerated, theta: Tensor) -> Tensor:
    """(P, P), H = ∇²_θ V with the entropy and L2 terms."""
    return torch.autograd.functional.hessian(lambda t: problem.value(t, problem.reward), theta, vectorize=True)


def log_prob_hessian(problem: Enumerated, theta: Tensor) -> Tensor:
    """(P, P), E[Σ_h γ^h (r_h − τ log π_h) Σ_{j≤h} ∇² log π_j] − τ F_d − damping."""
    probabilities = problem.probabilities(theta)[problem.owner]
    gains = problem.reward(problem.observations, problem.actions) - problem.temperature * problem.log_probs(theta)
    weights = (probabilities * problem.powers * gains).detach()
    same = problem.owner[:, None] == problem.owner[None, :]
    not_after = torch.ones_like(same).tril()  # steps of a trajectory lie in order
    to_go = weights @ (same & not_after).to(DTYPE)  # (T,), Σ_{h≥j} of the step's own trajectory
    part = torch.autograd.functional.hessian(lambda t: to_go @ problem.log_probs(t), theta, vectorize=True)
    return part - problem.temperature * fisher(problem, theta) - problem.damping * torch.eye(len(theta), dtype=DTYPE)


def fisher(problem: Enumerated, theta: Tensor) -> Tensor:
    """(P, P), F_d = E[Σ_h γ^h s_h s_hᵀ]."""
    scores = torch.autograd.functional.jacobian(problem.log_probs, theta, vectorize=True)
    weights = problem.probabilities(theta)[problem.owner] * problem.powers
    return scores.T @ (weights[:, None] * scores)


def cross(problem: Enumerated, theta: Tensor) -> Tensor:
    """(P, Q), C = ∇²_{θν} V."""
    theta = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.value(theta, problem.reward), theta, create_graph=True)
    rows = [torch.autograd.grad(g, problem.reward.table, retain_graph=True)[0].reshape(-1) for g in gradient]
    return torch.stack(rows).detach()


def policy_gradient(problem: Enumerated, theta: Tensor, losses: Tensor) -> Tensor:
    """(P,), b = ∇_θ E[U] for losses (N,) of the trajectories."""
    return torch.autograd.functional.jacobian(lambda t: problem.probabilities(t) @ losses, theta)


def draw(problem: Enumerated, probabilities: Tensor, number: int, generator: torch.Generator) -> parl.Trajectories:
    """`number` trajectories, independent, as a sample without weights."""
    return pick(problem, torch.multinomial(probabilities, number, replacement=True, generator=generator))


def pick(problem: Enumerated, index: Tensor) -> parl.Trajectories:
    """The enumeration's trajectories with these numbers (n,), as a sample."""
    lengths = problem.offsets.diff()[index]
    offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    within = torch.arange(int(offsets[-1])) - torch.repeat_interleave(offsets[:-1], lengths)
    steps = torch.repeat_interleave(problem.offsets[:-1][index], lengths) + within
    return parl.Trajectories(problem.observations[steps], problem.actions[steps], offsets)


class Captured:
    """A solver that answers with a fixed vector and keeps the operator and the right-hand side it was given."""

    def __init__(self, answer: Tensor) -> None:
        self.answer = answer

    def __call__(self, operator, rhs: Tensor, x0: Tensor | None = None) -> parl.Solution:
        self.operator, self.rhs = operator, rhs
        return parl.Solution(self.answer, parl.Status.CONVERGED, 0, torch.zeros(1), 0.0, False)


class ExactCurvature:
    """A = −H from a matrix, whatever the sample."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def operator(self, linearization, rewards: Tensor, discount: float):
        return lambda v: self.matrix @ v


class LogProbOnly(torch.nn.Module):
    """The policy without its analytic Fisher matrix."""

    def __init__(self, policy: torch.nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.policy.log_prob(observations, actions)
