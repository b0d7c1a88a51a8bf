"""The autograd graphs of a policy on one chunk of steps, and the products that they give.

How this differs from composing torch.func transforms, and why:
1. The forward pass, and the graph of its VJP, are built once and reused by every product for as long as this object
   lives; `jvp(grad(f))` rebuilds both each time, which at small networks is most of the time.
2. A JVP is the derivative of u ↦ Jᵀu ("double backward"), so a policy needs no forward-mode rule (attention kernels
   often have none), only a twice differentiable log_prob.
3. With u = w, the same double backward pass also yields the Hessian product: ∂/∂u ⟨Jᵀu, v⟩ = J v and
   ∂/∂θ ⟨Jᵀw, v⟩ = (Σ_t w_t ∇² log π_t) v. `jvp_and_hvp` returns both for the price of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .captured import CapturedPolicy
from .flat import flat_grad, flatten, gradients, refuse_once_differentiable, unflatten
from .modules import Chunk


class ChunkGraphs:
    """Products with the (T, P) Jacobian J of a chunk's log-probabilities; graphs are built when first needed.

    Weights w are (T,), over the chunk's steps; tangents v are flat, (P,).
    """

    def __init__(self, policy: CapturedPolicy, chunk: Chunk) -> None:
        self._policy, self._chunk = policy, chunk
        self._log_prob: Tensor | None = None
        self._vjp_graph: tuple[Tensor, list[Tensor]] | None = None
        self._built_for: tuple[Tensor, int] | None = None  # the w of that graph, and its version
        self._head_graph: tuple[Tensor, Tensor, list[Tensor]] | None = None

    @property
    def log_prob(self) -> Tensor:
        """(T,) with its graph."""
        if self._log_prob is None:
            self._log_prob = self._policy.log_prob(self._chunk)
        return self._log_prob

    def vjp(self, w: Tensor) -> Tensor:
        """Jᵀw: (P,)."""
        return flat_grad([self.log_prob], self._policy.params, [w], retain_graph=True)

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (T,)."""
        tangents = unflatten(v, self._policy.params, name="v")
        if self._vjp_graph is None:
            self._vjp_graph = self._build_vjp_graph(torch.zeros_like(self.log_prob))
        cotangent, transposed = self._vjp_graph
        return gradients(transposed, [cotangent], tangents, retain_graph=True)[0]

    def jvp_and_hvp(self, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """J v (T,) and (Σ_t w_t ∇² log π_t) v (P,); the graph for w is kept until another w comes."""
        tangents = unflatten(v, self._policy.params, name="v")
        if self._vjp_graph is None or not self._is_built_for(w, self._vjp_graph[0]):
            self._vjp_graph = self._build_vjp_graph(w)
            self._built_for = None if w.is_inference() else (w, w._version)
        cotangent, transposed = self._vjp_graph
        step_products, *products = gradients(transposed, [cotangent, *self._policy.params], tangents, retain_graph=True)
        return step_products, flatten(products)

    def fisher_vp(self, w: Tensor, v: Tensor) -> Tensor:
        """(Σ_t w_t F(s_t)) v: (P,)."""
        if not self._policy.has_fisher:
            return self.vjp(w * self.jvp(v))
        params = self._policy.params
        tangents = unflatten(v, params, name="v")
        if self._head_graph is None:
            head = self._policy.distribution_params(self._chunk)
            cotangent = torch.zeros_like(head).requires_grad_()
            self._head_graph = (head, cotangent, _transpose(head, params, cotangent))
        head, cotangent, transposed = self._head_graph
        head_tangent = gradients(transposed, [cotangent], tangents, retain_graph=True)[0]
        with torch.no_grad():
            weighted = w.unsqueeze(-1) * self._policy.params_fisher(head.detach(), head_tangent)
        return flat_grad([head], params, [weighted], retain_graph=True)

    def _is_built_for(self, w: Tensor, cotangent: Tensor) -> bool:
        """Whether the graph at hand is for this w.

        On the CPU the numbers tell. Elsewhere the host would wait for them, so it is the memory and its version, which
        do not see writes through `.data`.
        """
        if w.device.type == "cpu":
            return torch.equal(cotangent.detach(), w)
        return self._built_for is not None and is_unchanged(*self._built_for, w)

    def _build_vjp_graph(self, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        cotangent = w.detach().clone().requires_grad_()
        return cotangent, _transpose(self.log_prob, self._policy.params, cotangent)


def is_unchanged(kept: Tensor, version: int, w: Tensor) -> bool:
    """Whether w is `kept` as it was at `version`, by its place in memory; `kept` is held, so that none takes its place."""
    if w.is_inference():
        return False
    same_elements = (kept.data_ptr(), kept.shape, kept.stride()) == (w.data_ptr(), w.shape, w.stride())
    return same_elements and version == w._version


def _transpose(output: Tensor, params: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    transposed = gradients([output], params, [cotangent], create_graph=True)
    refuse_once_differentiable(transposed, "policy.log_prob")
    return transposed
