"""The problem that `check_hypergradient()` takes by itself: a tabular MDP, enumerated and solved without iterations.

All sums over its trajectories are exact, and backward induction puts the policy at the soft optimum in one pass, so what an
estimator is off by is its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...trajectories import Trajectories
from ..losses import TrajectoryLoss
from .policy import PolicyProblem

_DTYPE = torch.float64
_STATES, _ACTIONS, _HORIZON, _HIDDEN = 3, 2, 4, 3
_DISCOUNT, _TEMPERATURE = 0.9, 0.3


class _SoftmaxPolicy(nn.Module):
    """Logits for each (time, state); observations (T, 2) int64 are those two."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(_HORIZON, _STATES, _ACTIONS, dtype=_DTYPE))

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        time, state = observations.unbind(-1)
        return self.logits.log_softmax(-1)[time, state, actions]


class _Reward(nn.Module):
    """A hidden layer on state and action; time does not matter."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()

        def gaussian(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=_DTYPE))

        self.state, self.action, self.out = gaussian(_STATES, _HIDDEN), gaussian(_ACTIONS, _HIDDEN), gaussian(_HIDDEN)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return torch.tanh(self.state[observations[:, 1]] + self.action[actions]) @ self.out


def tabular_problem(seed: int = 0) -> PolicyProblem:
    """A random MDP whose policy holds its soft optimum, with upper loss U = Σ_h γ^h (0.1 r_ν² − u), u a hidden utility."""
    generator = torch.Generator().manual_seed(seed)
    reward = _Reward(generator)
    transitions = torch.rand(_STATES, _ACTIONS, _STATES, generator=generator, dtype=_DTYPE) + 0.1
    transitions /= transitions.sum(-1, keepdim=True)
    initial = torch.rand(_STATES, generator=generator, dtype=_DTYPE) + 0.1
    initial /= initial.sum()
    utility = torch.randn(_STATES, _ACTIONS, generator=generator, dtype=_DTYPE)

    # The digits of 0 … N−1 to the base S·A are every sequence of states and actions.
    pairs = _STATES * _ACTIONS
    powers = pairs ** torch.arange(_HORIZON - 1, -1, -1)
    digits = torch.arange(pairs**_HORIZON).unsqueeze(-1) // powers % pairs  # (N, H)
    states, actions = digits // _ACTIONS, digits % _ACTIONS
    dynamics = initial[states[:, 0]] * transitions[states[:, :-1], actions[:, :-1], states[:, 1:]].prod(1)
    time = torch.arange(_HORIZON).expand_as(states)
    every = Trajectories(
        torch.stack((time, states), dim=-1).reshape(-1, 2),
        actions.reshape(-1),
        torch.arange(0, states.numel() + 1, _HORIZON),
        weights=dynamics,
    )

    def step_losses(rewards: Tensor, state: Tensor, action: Tensor) -> Tensor:
        return 0.1 * rewards**2 - utility[state, action]

    def losses(judge: nn.Module, data: Trajectories) -> Tensor:
        rewards = judge(data.observations, data.actions)
        return data.sum_steps(
            _DISCOUNT ** data.time.to(_DTYPE) * step_losses(rewards, data.observations[:, 1], data.actions)
        )

    def data(policy: nn.Module) -> tuple[Trajectories, Trajectories]:
        with torch.no_grad():
            log_prob = policy.log_prob(every.observations, every.actions)  # type: ignore[operator]
        exact = every.with_weights(dynamics * every.sum_steps(log_prob).exp())
        return exact, exact

    @torch.no_grad()
    def solve(policy: nn.Module, judge: nn.Module, nudge: float) -> None:
        """Soft value iteration, backwards from the horizon; the loss is a sum over steps as the return is."""
        state, action = torch.arange(pairs) // _ACTIONS, torch.arange(pairs) % _ACTIONS
        rewards = judge(torch.stack((torch.zeros_like(state), state), dim=-1), action)
        gains = (rewards + nudge * step_losses(rewards, state, action)).view(_STATES, _ACTIONS)
        values = torch.zeros(_STATES, dtype=_DTYPE)
        for h in range(_HORIZON - 1, -1, -1):
            q = gains + _DISCOUNT * transitions @ values
            values = _TEMPERATURE * (q / _TEMPERATURE).logsumexp(-1)
            policy.logits[h] = (q - values.unsqueeze(-1)) / _TEMPERATURE  # type: ignore[operator]

    return PolicyProblem(
        policy=_SoftmaxPolicy(),
        reward=reward,
        loss=TrajectoryLoss(losses),
        discount=_DISCOUNT,
        data=data,
        solve=solve,
        temperature=_TEMPERATURE,
        name=f"tabular MDP ({_STATES} states, {_ACTIONS} actions, {_HORIZON} steps, seed {seed}) at its soft optimum",
    )
