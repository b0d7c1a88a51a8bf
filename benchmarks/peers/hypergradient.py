"""The problem of the hypergradient's benchmark, what decides whether an answer is right, and peers for it in torch.

A Gaussian tanh policy, a reward network of three hidden layers, and the Hessian's log-prob form with an entropy temperature:

    A = −(1/N) Σ_ih a_ih ∇² log π + temperature (1/N) Σ_ih γ^h F(s_ih) + damping·I,

a_ih the discounted reward to go, entropy bonus included, less its mean over trajectories. An answer is (w, total): a
solution of A w = b whose true residual is at most `RTOL`, and dU/dν + Cᵀw, in flat form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.answers import WrongAnswer
from parl_core import PreferencePairs, Trajectories
from parl_core.models.policies import GaussianPolicy
from parl_core.models.rewards import RewardEnsemble

from .gaussian_mlp import ACT_DIM, OBS_DIM, log_prob

HORIZON, PAIRS = 50, 32
DISCOUNT, TEMPERATURE, RTOL = 0.99, 0.3, 1e-4
LOG_STD, REWARD_GAIN = -0.82, 60.0  # at which the noise of A is as large as a trained policy's
Run = Callable[[], Any]


@dataclass(frozen=True)
class Problem:
    """Everything float32."""

    policy: GaussianPolicy
    reward: RewardEnsemble
    lower: Trajectories
    upper: PreferencePairs
    damping: float

    def moved(self, step: int) -> tuple[list[Tensor], list[Tensor]]:
        """θ and ν after some outer steps, each of which changes every parameter by a thousandth of its size."""
        generator = torch.Generator().manual_seed(1)
        levels = [list(module.parameters()) for module in (self.policy, self.reward)]
        moves = [[torch.randn(p.shape, generator=generator).to(p.device) for p in params] for params in levels]
        policy, reward = (
            [p.detach() * (1 + 1e-3 * step * move) for p, move in zip(params, level, strict=True)]
            for params, level in zip(levels, moves, strict=True)
        )
        return policy, reward


def make_problem(width: int, num_trajectories: int, damping: float, device: torch.device | str = "cpu") -> Problem:
    """The same numbers for the same sizes, on every device."""
    torch.manual_seed(0)
    policy = GaussianPolicy(OBS_DIM, ACT_DIM, hidden=(width, width), log_std="global")
    reward = RewardEnsemble(OBS_DIM, ACT_DIM, members=1)
    with torch.no_grad():
        policy.log_std.fill_(LOG_STD)
        weight, bias = list(reward.parameters())[-2:]
        weight.mul_(REWARD_GAIN)
        bias.zero_()

    def trajectories(number: int) -> Trajectories:
        observations = torch.randn(number * HORIZON, OBS_DIM)
        with torch.no_grad():
            actions = policy.sample(observations)[0]
        offsets = torch.arange(0, number * HORIZON + 1, HORIZON)
        return Trajectories(observations.to(device), actions.to(device), offsets.to(device))

    lower, first, second = (trajectories(number) for number in (num_trajectories, PAIRS, PAIRS))
    labels = torch.randint(0, 2, (PAIRS,)).float().to(device)
    return Problem(policy.to(device), reward.to(device), lower, PreferencePairs(first, second, labels), damping)


def reward_of(params: list[Tensor], observations: Tensor, actions: Tensor) -> Tensor:
    """(T,)."""
    hidden = torch.cat((observations, actions), -1)
    for weight, bias in zip(params[0:-2:2], params[1:-2:2], strict=True):
        hidden = F.leaky_relu(torch.addmm(bias[0], hidden, weight[0]), 0.01)
    return torch.tanh(torch.addmm(params[-1][0], hidden, params[-2][0])).squeeze(-1)


class System:
    """b, A and Cᵀ by autograd, with graphs that are kept; nothing of parl_core takes part."""

    def __init__(self, problem: Problem, step: int = 0, dtype: torch.dtype = torch.float32) -> None:
        policy, reward = problem.moved(step)
        self.policy = [p.to(dtype).requires_grad_() for p in policy]
        self.reward = [p.to(dtype).requires_grad_() for p in reward]
        self._data = [
            (part.observations.to(dtype), part.actions.to(dtype))
            for part in (problem.lower, problem.upper.first, problem.upper.second)
        ]
        self.damping, self._number = problem.damping, problem.lower.num_trajectories
        self._discounts = DISCOUNT ** torch.arange(HORIZON, dtype=dtype, device=problem.lower.observations.device)

        returns = [reward_of(self.reward, *data).view(PAIRS, -1).sum(1) for data in self._data[1:]]
        losses = F.binary_cross_entropy_with_logits(
            returns[1] - returns[0], problem.upper.labels.to(dtype), reduction="none"
        )
        self.direct = _flat(torch.autograd.grad(losses.mean(), self.reward))
        gains = ((losses - losses.mean()) / (PAIRS - 1)).detach()
        scores = sum(log_prob(self.policy, *data).view(PAIRS, -1).sum(1) for data in self._data[1:])
        self.rhs = _flat(torch.autograd.grad(gains @ scores, self.policy))

        steps = log_prob(self.policy, *self._data[0])
        with torch.no_grad():
            rewards = reward_of(self.reward, *self._data[0]) - TEMPERATURE * steps
            rewards = rewards.view(self._number, HORIZON)
            gains = (rewards - rewards.mean(0)) * self._discounts
            to_go = gains.flip(1).cumsum(1).flip(1).flatten() / self._number
        self._cotangent = (-to_go).requires_grad_()  # with a graph: its derivative is the JVP
        self._gradients = torch.autograd.grad(steps, self.policy, self._cotangent, create_graph=True)
        self._means = self._mean()
        self._mean_cotangent = torch.zeros_like(self._means).requires_grad_()
        self._mean_gradients = torch.autograd.grad(
            self._means, self.policy[1:], self._mean_cotangent, create_graph=True
        )

    def product(self, vector: Tensor) -> Tensor:
        """A v: (P,) -> (P,)."""
        tangents = self._tangents(vector)
        hessian = torch.autograd.grad(self._gradients, self.policy, tangents, retain_graph=True)
        along = torch.autograd.grad(self._mean_gradients, self._mean_cotangent, tangents[1:], retain_graph=True)[0]
        weights = (TEMPERATURE / self._number * self._discounts).repeat(self._number)[:, None]
        weighted = weights * torch.exp(-2.0 * self.policy[0].detach()) * along
        fisher = torch.autograd.grad(self._means, self.policy[1:], weighted, retain_graph=True)
        spread = 2.0 * weights.sum() * tangents[0]
        return _flat(hessian) + _flat((spread, *fisher)) + self.damping * vector

    def total(self, solution: Tensor) -> Tensor:
        """dU/dν + Cᵀw: (P,) -> (R,)."""
        along = torch.autograd.grad(self._gradients, self._cotangent, self._tangents(solution), retain_graph=True)[0]
        sums = along.view(self._number, HORIZON).cumsum(1)
        centred = (sums - sums.mean(0)) / (self._number - 1)
        rewards = reward_of(self.reward, *self._data[0]).view(self._number, HORIZON)
        return self.direct + _flat(torch.autograd.grad((self._discounts * centred * rewards).sum(), self.reward))

    def _mean(self) -> Tensor:
        hidden, layers = self._data[0][0], self.policy[1:]
        for weight, bias in zip(layers[0:-2:2], layers[1:-2:2], strict=True):
            hidden = torch.tanh(torch.addmm(bias, hidden, weight.t()))
        return torch.addmm(layers[-1], hidden, layers[-2].t())

    def _tangents(self, vector: Tensor) -> list[Tensor]:
        pieces = vector.split([p.numel() for p in self.policy])
        return [piece.view_as(p) for piece, p in zip(pieces, self.policy, strict=True)]


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def right(problem: Problem, step: int = 0) -> Callable[[Any], float]:
    """The check of an answer, in float64: the true residual of w, and total for that w."""
    system = System(problem, step, torch.float64)

    def check(answer: Any) -> float:
        solution, total = (torch.as_tensor(part).to(system.rhs).reshape(-1) for part in answer)
        residual = float((system.rhs - system.product(solution)).norm() / system.rhs.norm())
        if not residual <= 1.05 * RTOL:  # the recurrences of float32 are a little off
            raise WrongAnswer(f"its true residual is {residual:.1e}, {RTOL:.0e} is allowed")
        expected = system.total(solution)
        error = float((total - expected).norm() / expected.norm())
        if not error <= 1e-3:
            raise WrongAnswer(f"its total is off by {error:.1e}")
        return residual

    return check


def conjugate_gradients(problem: Problem, steps: int = 1) -> Run:
    """Double backward over graphs that are kept, in a plain CG loop; warm started over several outer steps."""

    def run() -> tuple[Tensor | None, Tensor | None]:
        x, total = None, None
        for step in range(steps):
            system = System(problem, step)
            x = plain_cg(system, x)
            total = system.total(x)
        return x, total

    return run


def plain_cg(system: System, x: Tensor | None = None) -> Tensor:
    """To a residual of RTOL, looked at in every iteration."""
    b = system.rhs
    residual = b.clone() if x is None else b - system.product(x)
    x = torch.zeros_like(b) if x is None else x.clone()
    direction, square, goal = residual.clone(), residual @ residual, (RTOL * b.norm()) ** 2
    while square > goal:
        image = system.product(direction)
        step = square / (direction @ image)
        x += step * direction
        residual -= step * image
        square, last = residual @ residual, square
        direction = residual + (square / last) * direction
    return x


def torchopt_cg(problem: Problem, steps: int = 1) -> Run:
    """The same products in TorchOpt's solver."""
    from torchopt.linalg import cg

    def run() -> tuple[Tensor | None, Tensor | None]:
        x, total = None, None
        for step in range(steps):
            system = System(problem, step)
            x = cg(system.product, system.rhs, x0=x, rtol=RTOL, atol=0.0, maxiter=1000)
            total = system.total(x)
        return x, total

    return run


def gradient(problem: Problem) -> Run:
    """Forward and backward of Σ log π over the lower steps."""
    params = [p.detach().requires_grad_() for p in problem.policy.parameters()]
    data = problem.lower.observations, problem.lower.actions
    return lambda: torch.autograd.grad(log_prob(params, *data).sum(), params)


def load(module: nn.Module, params: list[Tensor]) -> None:
    """Write the parameters into a module."""
    with torch.no_grad():
        for own, value in zip(module.parameters(), params, strict=True):
            own.copy_(value)
