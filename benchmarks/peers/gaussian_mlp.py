"""The problem of the linearization's benchmarks, and peers for it in torch.

A Gaussian tanh policy with one free log standard deviation for each action, and f(θ) = Σ_t w_t log π_θ(a_t | s_t).
Peers keep parameters, tangents and products as lists of tensors in the order of `named_parameters`; flattening would
cost them time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from parl_core import Trajectories
from parl_core.models.policies import GaussianPolicy

OBS_DIM, ACT_DIM = 24, 6
Run = Callable[[], Any]


@dataclass(frozen=True)
class Problem:
    """Everything float32; `tangent` has the shapes of the parameters."""

    policy: GaussianPolicy
    trajectories: Trajectories
    params: list[Tensor]
    tangent: list[Tensor]
    weights: Tensor  # (T,)
    trajectories_of_one_length: int

    @property
    def flat_tangent(self) -> Tensor:
        """(P,)."""
        return torch.cat([part.reshape(-1) for part in self.tangent])


def make_problem(width: int, num_steps: int, num_trajectories: int, device: torch.device | str = "cpu") -> Problem:
    """Two hidden layers of `width`; the same numbers for the same sizes, on every device."""
    torch.manual_seed(0)
    policy = GaussianPolicy(OBS_DIM, ACT_DIM, hidden=(width, width), log_std="global")
    observations, actions = torch.randn(num_steps, OBS_DIM), torch.randn(num_steps, ACT_DIM)
    offsets = torch.arange(0, num_steps + 1, num_steps // num_trajectories)
    policy.to(device)
    trajectories = Trajectories(observations.to(device), actions.to(device), offsets.to(device))
    params = [parameter.detach().clone() for parameter in policy.parameters()]
    tangent = [torch.randn(parameter.shape).to(device) for parameter in params]
    return Problem(policy, trajectories, params, tangent, torch.randn(num_steps).to(device), num_trajectories)


def pass_flops(num_steps: int, width: int, first: float, others: float) -> float:
    """Flops of `first` products for the first layer and `others` for each other one."""
    layers = list(pairwise((OBS_DIM, width, width, ACT_DIM)))
    products = [first] + [others] * (len(layers) - 1)
    return sum(2.0 * num_steps * inputs * outputs * n for (inputs, outputs), n in zip(layers, products, strict=True))


def log_prob(params: list[Tensor], observations: Tensor, actions: Tensor) -> Tensor:
    """(T,)."""
    log_std, *layers = params
    hidden = observations
    for weight, bias in zip(layers[0:-2:2], layers[1:-2:2], strict=True):
        hidden = torch.tanh(torch.addmm(bias, hidden, weight.t()))
    mean = torch.addmm(layers[-1], hidden, layers[-2].t())
    standard = (actions - mean) * torch.exp(-log_std)
    return -(0.5 * standard * standard + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def weighted(problem: Problem, dtype: torch.dtype = torch.float32) -> Callable[[list[Tensor]], Tensor]:
    """f as a function of the parameters."""
    observations, actions = problem.trajectories.observations.to(dtype), problem.trajectories.actions.to(dtype)
    weights = problem.weights.to(dtype)
    return lambda params: weights @ log_prob(params, observations, actions)


# References, in float64. Torch's own double backward: nothing of parl_core takes part.


def reference(problem: Problem) -> dict[str, Any]:
    """What each product should be: "hvp", "jvp", "vjp", "scores"."""
    params = [parameter.double().requires_grad_() for parameter in problem.params]
    tangent = [part.double() for part in problem.tangent]
    observations, actions = problem.trajectories.observations.double(), problem.trajectories.actions.double()
    values = log_prob(params, observations, actions)
    weights = problem.weights.double().requires_grad_()
    vjp = torch.autograd.grad(values, params, weights, create_graph=True)
    directional = sum(((one * other).sum() for one, other in zip(vjp, tangent, strict=True)), vjp[0].new_zeros(()))
    jvp_, *hvp = torch.autograd.grad(directional, [weights, *params], retain_graph=True)
    ends = problem.trajectories.offsets.tolist()
    scores = [
        _flat(torch.autograd.grad(values[start:end], params, weights.detach()[start:end], retain_graph=True))
        for start, end in pairwise(ends)
    ]
    return {"hvp": _flat(hvp), "jvp": jvp_, "vjp": _flat(vjp).detach(), "scores": torch.stack(scores)}


def _flat(parts: Any) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def gradient(problem: Problem) -> Run:
    """One forward and backward pass."""
    params = [parameter.clone().requires_grad_() for parameter in problem.params]
    function = weighted(problem)
    return lambda: torch.autograd.grad(function(params), params)


# Hessian-vector products.


def func_hvp(problem: Problem) -> Run:
    """torch.func's forward over reverse."""
    derivative = grad(weighted(problem))
    return lambda: jvp(derivative, (problem.params,), (problem.tangent,))[1]


def compiled_hvp(problem: Problem, mode: str | None = None) -> Run:
    """torch.compile of it, with the parameters as arguments; "reduce-overhead" makes a CUDA graph of it."""
    derivative = grad(weighted(problem))
    product = torch.compile(
        lambda params, tangent: jvp(derivative, (params,), (tangent,))[1], fullgraph=True, mode=mode
    )
    return lambda: product(problem.params, problem.tangent)


def linearized_hvp(problem: Problem) -> Run:
    """torch.func.linearize of the gradient, compiled; its graph holds what was computed at θ."""
    _, product = torch.func.linearize(grad(weighted(problem)), problem.params)
    compiled = torch.compile(product)
    return lambda: compiled(problem.tangent)


def double_backward_hvp(problem: Problem) -> Run:
    """The graph of the gradient is kept; a product is one backward pass through it."""
    params = [parameter.clone().requires_grad_() for parameter in problem.params]
    gradients = torch.autograd.grad(weighted(problem)(params), params, create_graph=True)
    return lambda: torch.autograd.grad(gradients, params, problem.tangent, retain_graph=True)


def curvlinops_hvp(problem: Problem) -> Run:
    """curvlinops' Hessian operator."""
    from curvlinops import HessianLinearOperator

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = problem.policy

        def forward(self, observations: Tensor) -> Tensor:
            return self.policy.distribution_params(observations)

    class WeightedLogProb(nn.Module):
        reduction = "sum"

        def forward(self, params: Tensor, target: Tensor) -> Tensor:
            actions, weights = target[:, :-1], target[:, -1]
            return weights @ problem.policy.params_log_prob(params, actions)

    module = Mean()
    target = torch.cat((problem.trajectories.actions, problem.weights.unsqueeze(1)), dim=1)
    operator = HessianLinearOperator(
        module,
        WeightedLogProb(),
        list(module.parameters()),
        [(problem.trajectories.observations, target)],
        check_deterministic=False,
    )
    return lambda: operator @ problem.tangent


# Products with the Jacobian of the log-probabilities.


def func_jvp(problem: Problem) -> Run:
    """torch.func's forward mode."""
    observations, actions = problem.trajectories.observations, problem.trajectories.actions

    def values(params: list[Tensor]) -> Tensor:
        return log_prob(params, observations, actions)

    return lambda: jvp(values, (problem.params,), (problem.tangent,))[1]


def double_backward_jvp(problem: Problem) -> Run:
    """The derivative in u of the kept graph of u ↦ Jᵀu."""
    params = [parameter.clone().requires_grad_() for parameter in problem.params]
    values = log_prob(params, problem.trajectories.observations, problem.trajectories.actions)
    cotangent = torch.zeros_like(values).requires_grad_()
    transposed = torch.autograd.grad(values, params, cotangent, create_graph=True)
    return lambda: torch.autograd.grad(transposed, cotangent, problem.tangent, retain_graph=True)[0]


def backward_vjp(problem: Problem) -> Run:
    """A backward pass through a kept graph."""
    params = [parameter.clone().requires_grad_() for parameter in problem.params]
    values = log_prob(params, problem.trajectories.observations, problem.trajectories.actions)
    return lambda: torch.autograd.grad(values, params, problem.weights, retain_graph=True)


# Scores.


def _trajectory_score(problem: Problem) -> Callable[[list[Tensor]], list[Tensor]]:
    """Gradients of each trajectory's weighted log-probability, stacked."""
    number = problem.trajectories_of_one_length
    observations = problem.trajectories.observations.reshape(number, -1, OBS_DIM)
    actions = problem.trajectories.actions.reshape(number, -1, ACT_DIM)
    weights = problem.weights.reshape(number, -1)

    def score(params: list[Tensor], observations: Tensor, actions: Tensor, weights: Tensor) -> Tensor:
        return weights @ log_prob(params, observations, actions)

    batched = vmap(grad(score), in_dims=(None, 0, 0, 0))
    return lambda params: batched(params, observations, actions, weights)


def func_scores(problem: Problem) -> Run:
    """torch.func's vmap of grad."""
    scores = _trajectory_score(problem)
    return lambda: scores(problem.params)


def compiled_scores(problem: Problem) -> Run:
    """torch.compile of it."""
    scores = torch.compile(_trajectory_score(problem), fullgraph=True)
    return lambda: scores(problem.params)


def backward_scores(problem: Problem) -> Run:
    """One forward pass, and a backward pass for each trajectory."""
    params = [parameter.clone().requires_grad_() for parameter in problem.params]
    observations, actions = problem.trajectories.observations, problem.trajectories.actions
    spans = list(pairwise(problem.trajectories.offsets.tolist()))

    def run() -> list[Tensor]:
        values = log_prob(params, observations, actions)
        rows = [
            torch.autograd.grad(values[start:end], params, problem.weights[start:end], retain_graph=True)
            for start, end in spans
        ]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]

    return run
