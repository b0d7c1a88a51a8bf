"""Products with the derivatives of a policy's log-probabilities, over one cached forward pass.

How this differs from composing torch.func transforms, and why:
1. The forward pass, and the graph of its VJP, are built once and reused by every product of a solve; `jvp(grad(f))`
   rebuilds both each time, which at small networks is most of the time.
2. A JVP is the derivative of u ↦ Jᵀu ("double backward"), so a policy needs no forward-mode rule (attention kernels
   often have none), only a twice differentiable log_prob.
3. With u = w, the same double backward pass also yields the Hessian product: ∂/∂u ⟨Jᵀu, v⟩ = J v and
   ∂/∂θ ⟨Jᵀw, v⟩ = (Σ_t w_t ∇² log π_t) v. `jvp_and_hvp` returns both for the price of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..trajectories import Trajectories, require_finite
from .flat import (
    differentiating,
    flat_grad,
    flatten,
    gradients,
    refuse_once_differentiable,
    trainable_parameters,
    unflatten,
)


def linearize(policy: nn.Module, trajectories: Trajectories) -> Linearization:
    """Linearise `policy.log_prob` at the policy's present parameters, on the steps of `trajectories`.

    Args:
        policy: any module with `log_prob(observations, actions) -> (T,)`. The flat parameter vector (P,) holds its
            parameters that require a gradient, in the order of `named_parameters`. If it also offers
            `distribution_params` and `params_fisher` (see `parl_core.models.policies`), Fisher products are exact over
            actions; otherwise they use the actions taken.
        trajectories: T steps in N trajectories.

    Raises:
        TypeError, ValueError: no log_prob, a log_prob of the wrong shape, no trainable parameter, mixed dtypes.
        NonFiniteError: a log-probability is NaN or infinite.
    """
    return Linearization(policy, trajectories)


class Linearization:
    """The result of `linearize`; J is the (T, P) Jacobian of the log-probabilities at the captured parameters."""

    @differentiating
    def __init__(self, policy: nn.Module, trajectories: Trajectories) -> None:
        if not callable(getattr(policy, "log_prob", None)):
            raise TypeError(
                f"policy must be a module with log_prob(observations, actions), got {type(policy).__name__}"
            )
        named = trainable_parameters(policy, "policy")
        self._names = list(named)
        self._params = [p.detach().clone().requires_grad_() for p in named.values()]
        # Copies, so that neither a later change of the policy nor a layer that counts calls (batch norm) is felt.
        self._buffers = {f"module.{name}": b.detach().clone() for name, b in policy.named_buffers()}
        self._method = MethodCall(policy)
        self._trajectories = trajectories
        observations = trajectories.observations
        if observations.dtype != self._params[0].dtype or observations.device != self._params[0].device:
            raise ValueError(
                f"observations are {observations.dtype} on {observations.device}, but the policy's parameters are "
                f"{self._params[0].dtype} on {self._params[0].device}"
            )
        self._has_fisher = all(
            callable(getattr(policy, name, None)) for name in ("distribution_params", "params_fisher")
        )
        self._log_prob = self._call("log_prob", observations, trajectories.actions)
        if self._log_prob.shape != (trajectories.num_steps,):
            raise ValueError(
                f"policy.log_prob must return shape (T,) = ({trajectories.num_steps},), "
                f"got {tuple(self._log_prob.shape)}"
            )
        require_finite("policy.log_prob(observations, actions)", self._log_prob.detach())
        self._vjp_graph: tuple[Tensor, list[Tensor]] | None = None
        self._head_graph: tuple[Tensor, Tensor, list[Tensor]] | None = None

    @property
    def num_params(self) -> int:
        """P."""
        return sum(p.numel() for p in self._params)

    @property
    def trajectories(self) -> Trajectories:
        """The steps on which the policy is linearised."""
        return self._trajectories

    @property
    def log_prob(self) -> Tensor:
        """(T,) log-probabilities of the actions taken, detached."""
        return self._log_prob.detach()

    @differentiating
    def vjp(self, w: Tensor) -> Tensor:
        """Jᵀw: (T,) -> (P,), the weighted sum of the steps' scores."""
        self._check_steps("w", w)
        return flat_grad([self._log_prob], self._params, [w], retain_graph=True)

    @differentiating
    def jvp(self, v: Tensor) -> Tensor:
        """J v: (P,) -> (T,), each step's score times v."""
        tangents = unflatten(v, self._params, name="v")
        if self._vjp_graph is None:
            self._vjp_graph = self._build_vjp_graph(torch.zeros_like(self._log_prob))
        cotangent, transposed = self._vjp_graph
        return gradients(transposed, [cotangent], tangents, retain_graph=True)[0]

    def hvp(self, w: Tensor, v: Tensor) -> Tensor:
        """(Σ_t w_t ∇² log π_t) v: (T,), (P,) -> (P,)."""
        return self.jvp_and_hvp(w, v)[1]

    @differentiating
    def jvp_and_hvp(self, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`jvp(v)` and `hvp(w, v)` in one pass; the graph for w is kept until another w comes."""
        self._check_steps("w", w)
        tangents = unflatten(v, self._params, name="v")
        if self._vjp_graph is None or not torch.equal(self._vjp_graph[0].detach(), w):
            self._vjp_graph = self._build_vjp_graph(w)
        cotangent, transposed = self._vjp_graph
        step_products, *products = gradients(transposed, [cotangent, *self._params], tangents, retain_graph=True)
        return step_products, flatten(products)

    @differentiating
    def fisher_vp(self, w: Tensor, v: Tensor) -> Tensor:
        """(Σ_t w_t F(s_t)) v: (T,), (P,) -> (P,), with F(s) = E_{a∼π(·|s)}[∇log π ∇log πᵀ].

        Exact over actions where the policy gives its Fisher matrix; otherwise the score outer products of the actions
        taken, whose expectation it is.
        """
        self._check_steps("w", w)
        if not self._has_fisher:
            return self.vjp(w * self.jvp(v))
        tangents = unflatten(v, self._params, name="v")
        if self._head_graph is None:
            head = self._call("distribution_params", self._trajectories.observations)
            cotangent = torch.zeros_like(head).requires_grad_()
            self._head_graph = (head, cotangent, _transpose(head, self._params, cotangent))
        head, cotangent, transposed = self._head_graph
        head_tangent = gradients(transposed, [cotangent], tangents, retain_graph=True)[0]
        with torch.no_grad():
            weighted = w.unsqueeze(-1) * self._call("params_fisher", head.detach(), head_tangent)
        return flat_grad([head], self._params, [weighted], retain_graph=True)

    @differentiating
    def scores(self) -> Tensor:
        """(N, P): each trajectory's score Σ_t ∇ log π_t. The only product that holds N×P numbers."""
        offsets = self._trajectories.offsets.tolist()
        rows = torch.zeros(len(offsets) - 1, self.num_params, dtype=self._log_prob.dtype, device=self._log_prob.device)
        for row, start, end in zip(rows, offsets[:-1], offsets[1:], strict=True):
            if end == start:
                continue
            total = self._call(
                "log_prob", self._trajectories.observations[start:end], self._trajectories.actions[start:end]
            ).sum()
            row.copy_(flat_grad([total], self._params, [torch.ones_like(total)]))
        return rows

    def _build_vjp_graph(self, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        cotangent = w.detach().clone().requires_grad_()
        return cotangent, _transpose(self._log_prob, self._params, cotangent)

    def _call(self, method: str, *args: Tensor) -> Tensor:
        params = {f"module.{name}": p for name, p in zip(self._names, self._params, strict=True)}
        return functional_call(self._method, {**params, **self._buffers}, (method, *args))

    def _check_steps(self, name: str, tensor: Tensor) -> None:
        if tensor.shape != self._log_prob.shape:
            raise ValueError(f"{name} must have shape (T,) = {tuple(self._log_prob.shape)}, got {tuple(tensor.shape)}")


class MethodCall(nn.Module):
    """Lets `functional_call`, which calls a module's forward, reach any method of the policy."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: str, *args: Any) -> Any:
        return getattr(self.module, method)(*args)


def _transpose(output: Tensor, params: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    transposed = gradients([output], params, [cotangent], create_graph=True)
    refuse_once_differentiable(transposed, "policy.log_prob")
    return transposed
