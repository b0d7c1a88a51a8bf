"""An MDP small enough to enumerate, its lower level solved to machine precision: the oracle of the engine's tests.

Everything is computed straight from the definitions (sums over all trajectories, Newton's method, finite differences) and
shares no code with the engine.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from parl_core import Trajectories
from parl_core.models.policies import CategoricalPolicy

DTYPE = torch.float64


class TableReward(nn.Module):
    """r(s, a) = tanh(table) + linear in features of the next weight: nonlinear in its parameters, one per (s, a)."""

    def __init__(self, num_observations: int, num_actions: int, seed: int, shift: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(num_observations, num_actions, generator=generator, dtype=DTYPE))
        self.shift = shift

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        rows = observations @ (torch.tanh(self.table) + 0.1 * self.table**2)
        return rows.gather(-1, actions.reshape(-1, 1)).squeeze(-1) + self.shift


class Enumerated:
    """A random MDP with all its trajectories of `horizon` steps.

    Args:
        observe_time: observations are one-hot in (time, state), so that the softmax policy contains the soft optimum of the
            finite-horizon problem; otherwise one-hot in the state.
        temperature, damping: entropy and L2 terms of the lower objective.
        terminal: state 0 ends the episode, so lengths are ragged and depend on the policy.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        states: int = 3,
        actions: int = 2,
        horizon: int = 3,
        discount: float = 0.9,
        temperature: float = 0.0,
        damping: float = 0.0,
        observe_time: bool = False,
        terminal: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.discount, self.temperature, self.damping = discount, temperature, damping
        transitions = torch.rand(states, actions, states, generator=generator, dtype=DTYPE) + 0.1
        transitions /= transitions.sum(-1, keepdim=True)
        initial = torch.rand(states, generator=generator, dtype=DTYPE) + 0.1
        if terminal:
            initial[0] = 0.0
        initial /= initial.sum()
        num_observations = states * horizon if observe_time else states
        paths: list[tuple[list[int], list[int], float]] = [
            ([s], [], float(initial[s])) for s in range(states) if initial[s] > 0
        ]
        done = []
        for h in range(horizon):
            grown = []
            for (visited, taken, p), a in itertools.product(paths, range(actions)):
                if h == horizon - 1:
                    done.append((visited, [*taken, a], p))
                    continue
                for s in range(states):
                    q = p * float(transitions[visited[-1], a, s])
                    if terminal and s == 0:
                        done.append((visited, [*taken, a], q))
                    else:
                        grown.append(([*visited, s], [*taken, a], q))
            paths = grown
        lengths = torch.tensor([len(taken) for _, taken, _ in done])
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        index = torch.tensor(
            [(h * states + s if observe_time else s) for visited, _, _ in done for h, s in enumerate(visited)]
        )
        self.observations = nn.functional.one_hot(index, num_observations).to(DTYPE)
        self.actions = torch.tensor([a for _, taken, _ in done for a in taken])
        self.offsets = offsets
        self.dynamics = torch.tensor([p for _, _, p in done], dtype=DTYPE)
        self.owner = torch.repeat_interleave(torch.arange(len(done)), lengths)
        self.powers = discount ** torch.cat([torch.arange(n) for n in lengths.tolist()]).to(DTYPE)
        self.policy = CategoricalPolicy(num_observations, actions).to(DTYPE)
        self.reward = TableReward(num_observations, actions, seed + 1)
        self.names = [name for name, _ in self.policy.named_parameters()]
        self.shapes = [p.shape for p in self.policy.parameters()]
        self.num_params = sum(p.numel() for p in self.policy.parameters())

    def log_probs(self, theta: Tensor) -> Tensor:
        pieces = theta.split([s.numel() for s in self.shapes])
        params = {n: p.view(s) for n, p, s in zip(self.names, pieces, self.shapes, strict=True)}
        weight, bias = params["network.0.weight"], params["network.0.bias"]
        logits = self.observations @ weight.T + bias
        return logits.log_softmax(-1).gather(-1, self.actions.unsqueeze(-1)).squeeze(-1)

    def sum_steps(self, values: Tensor) -> Tensor:
        return torch.zeros(len(self.dynamics), dtype=DTYPE).index_add(0, self.owner, values)

    def probabilities(self, theta: Tensor) -> Tensor:
        return self.dynamics * self.sum_steps(self.log_probs(theta)).exp()

    def value(self, theta: Tensor, reward: nn.Module) -> Tensor:
        gains = reward(self.observations, self.actions) - self.temperature * self.log_probs(theta)
        returns = self.sum_steps(self.powers * gains)
        return self.probabilities(theta) @ returns - 0.5 * self.damping * theta @ theta

    def solve(self, reward: nn.Module, theta: Tensor | None = None) -> Tensor:
        """θ* by Newton's method with a pseudo-inverse (softmax is shift invariant) and backtracking."""
        theta = torch.zeros(self.num_params, dtype=DTYPE) if theta is None else theta.clone()

        def objective(t: Tensor) -> Tensor:
            return self.value(t, reward)

        for _ in range(200):
            gradient = torch.autograd.functional.jacobian(objective, theta)
            if gradient.norm() < 1e-13:
                break
            hessian = torch.autograd.functional.hessian(objective, theta, vectorize=True)
            values, vectors = torch.linalg.eigh(hessian)
            inverse = torch.where(values.abs() > 1e-9, 1.0 / values.abs().clamp_min(1e-9), 0.0)
            step = vectors @ (inverse * (vectors.T @ gradient))
            scale, before = 1.0, objective(theta)
            while objective(theta + scale * step) < before - 1e-15 and scale > 1e-6:
                scale *= 0.5
            theta = theta + scale * step
        assert gradient.norm() < 1e-10
        return theta.detach()

    def put(self, theta: Tensor) -> None:
        nn.utils.vector_to_parameters(theta.clone(), self.policy.parameters())

    def trajectories(self, theta: Tensor) -> Trajectories:
        return Trajectories(self.observations, self.actions, self.offsets, weights=self.probabilities(theta).detach())

    def finite_differences(self, upper_loss, step: float = 1e-4) -> Tensor:
        """dL/dν by central differences (fourth order) of the re-solved lower level; upper_loss(reward, probabilities)."""
        table = self.reward.table
        start = self.solve(self.reward)
        result = torch.zeros_like(table)

        def loss_at(change: float, place: tuple[int, int]) -> float:
            with torch.no_grad():
                table[place] += change
            try:
                theta = self.solve(self.reward, start)
                with torch.no_grad():
                    return float(upper_loss(self.reward, self.probabilities(theta)))
            finally:
                with torch.no_grad():
                    table[place] -= change

        for place in itertools.product(range(table.shape[0]), range(table.shape[1])):
            near = loss_at(step, place) - loss_at(-step, place)
            far = loss_at(2 * step, place) - loss_at(-2 * step, place)
            result[place] = (8 * near - far) / (12 * step)
        return result.detach().reshape(-1)
