"""The linearization of the package's own policies by torch's matrix products and Triton kernels between them.

The products are those of `NativeChunk`, by the same counts: with T steps and layers of P weights, 2 TP multiply-adds for a
JVP, 2 for a VJP, 7 for a Hessian product with its JVP, of which one is the cotangents' pass that depends on w alone; it is
taken anew for each product, so that nothing but the numbers at hand decides, also where a CUDA graph is replayed. Nothing
waits for the host but `scores`, which must know the longest trajectory.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.policies import LOG_STD_BOUNDS
from ..ops import discounted_returns, prefix_sum
from ..ops.gaussian_log_prob import unsquash
from ..ops.segments import plain
from .captured import CapturedPolicy
from .modules import Chunk
from .native_linearize import MlpPolicy

_Weights = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Pulled(NamedTuple):
    """What reaches the network's outputs (T, k), and a free log_std's steps (T, da)."""

    outputs: Tensor
    log_std: Tensor | None = None


class TritonChunk:
    """Products with the (T, P) Jacobian J of a chunk's log-probabilities, as `NativeChunk` has them.

    Memory: the chunk's activations, (T, sum of the hidden widths), twice that for SiLU; three times that during a Hessian
    product.
    """

    max_layers: int | None = None

    def __init__(self, policy: CapturedPolicy, chunk: Chunk, mlp: MlpPolicy) -> None:
        self._mlp = mlp
        self._between: Any = importlib.import_module("parl_core.kernels.triton_mlp")
        params = [p.detach() for p in policy.params]
        self._num_params = sum(p.numel() for p in params)
        own = [params.pop(0)] if mlp.head == "global" else []
        self._num_free = sum(p.numel() for p in own)
        self._weights = [(weight, bias) for weight, bias in zip(params[::2], params[1::2], strict=True)]
        steps = chunk.end - chunk.start
        whole = torch.arange(2, device=params[0].device) * steps
        self._offsets = whole if chunk.offsets is None else chunk.offsets
        self._inputs, self._kept = [chunk.observations.detach().contiguous()], []
        for weight, bias in self._weights[:-1]:
            z = torch.addmm(bias, self._inputs[-1], weight.T)
            a, kept = self._between.activate(z, mlp.activation)
            self._inputs.append(a)
            self._kept.append(kept)
        weight, bias = self._weights[-1]
        outputs = torch.addmm(bias, self._inputs[-1], weight.T)
        if mlp.head == "categorical":
            self._head: _Categorical | _Gaussian = _Categorical(outputs, chunk.actions.reshape(-1).long())
        else:
            log_std = policy.buffers["log_std"] if mlp.head == "fixed" else own[0] if own else None
            self._head = _Gaussian(mlp, outputs, log_std, chunk.actions.detach())

    @property
    def log_prob(self) -> Tensor:
        """(T,)."""
        return self._head.log_prob.clone()

    def vjp(self, w: Tensor) -> Tensor:
        """Jᵀw: (P,)."""
        out = self._empty()
        self._pull(self._head.gradient(self._input(w)), out)
        return out

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (T,)."""
        tangent, _, _ = self._push(v, bends=False)
        return self._head.along(tangent, self._free(v))

    def jvp_and_hvp(self, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """J v (T,) and (Σ_t w_t ∇² log π_t) v (P,)."""
        return self._apply(v, (w, None, None))

    def fisher_vp(self, w: Tensor, v: Tensor) -> Tensor:
        """(Σ_t w_t F(s_t)) v: (P,)."""
        return self._apply(v, (None, w, None))[1]

    def second_order(self, v: Tensor, weights: _Weights) -> Tensor:
        """`Linearization.second_order` with the weights of Hessian, Fisher and score terms: (P,)."""
        return self._apply(v, weights)[1]

    def scores(self, w: Tensor) -> Tensor:
        """(N, P): each trajectory's Σ_t w_t ∇ log π_t."""
        lengths = self._offsets.diff()
        number, longest = len(lengths), int(lengths.max()) if len(lengths) else 0
        out = self._inputs[0].new_zeros(number, self._num_params)
        if longest == 0:
            return out
        time = torch.arange(longest, device=lengths.device)
        inside = (time < lengths[:, None]).unsqueeze(-1)  # (N, H, 1)
        place = (self._offsets[:-1, None] + time).clamp(max=len(self._inputs[0]) - 1)
        pulled = self._head.gradient(self._input(w))
        if pulled.log_std is not None:
            out[:, : self._num_free] = (pulled.log_std[place] * inside).sum(1)
        for inputs, delta, (weight, bias) in self._layers_back(pulled.outputs, out):
            rows = torch.where(inside, delta[place], 0.0)  # (N, H, o)
            weight.copy_(torch.bmm(rows.transpose(1, 2), inputs[place]).flatten(1))
            torch.sum(rows, 1, out=bias)
        return out

    def operator(self, weights: _Weights, damping: float) -> None:
        """There is no operator for solvers in `_native`."""

    def _empty(self) -> Tensor:
        return self._inputs[0].new_empty(self._num_params)

    def _input(self, tensor: Tensor) -> Tensor:
        return plain(tensor.to(self._inputs[0].dtype))

    def _free(self, v: Tensor) -> Tensor:
        return self._input(v)[: self._num_free]

    def _split(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views of each layer's weights and bias in (…, P)."""
        views, start = [], self._num_free
        for weight, bias in self._weights:
            end = start + weight.numel()
            views.append((flat[..., start:end], flat[..., end : end + bias.numel()]))
            start = end + bias.numel()
        return views

    def _push(self, v: Tensor, *, bends: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The outputs' tangent (T, k), and of each hidden layer ȧ and φ″(z) ż."""
        tangents: list[Tensor] = []
        bent: list[Tensor] = []
        directions = self._split(self._input(v))
        for number, (inputs, (along_weight, along_bias)) in enumerate(zip(self._inputs, directions, strict=True)):
            weight = self._weights[number][0]
            dot = torch.addmm(along_bias, inputs, along_weight.view_as(weight).T)
            if tangents:
                dot.addmm_(tangents[-1], weight.T)
            if number == len(self._kept):
                return dot, tangents, bent
            tangents.append(self._between.push(self._kept[number], dot, self._mlp.activation, bends=bends))
            bent.append(dot)
        raise AssertionError("a network has at least one layer")

    def _layers_back(self, delta: Tensor, out: Tensor) -> Any:
        """From the last layer to the first: its inputs, the cotangent of its outputs, and views of `out` for it."""
        views = self._split(out)
        for number in reversed(range(len(self._weights))):
            yield self._inputs[number], delta, views[number]
            if number:
                delta = torch.mm(delta, self._weights[number][0])
                self._between.pull(self._kept[number - 1], delta, None, None, self._mlp.activation)

    def _pull(self, pulled: _Pulled, out: Tensor) -> None:
        if pulled.log_std is not None:
            torch.sum(pulled.log_std, 0, out=out[: self._num_free])
        for inputs, delta, (weight, bias) in self._layers_back(pulled.outputs, out):
            torch.mm(delta.T, inputs, out=weight.view(delta.shape[1], inputs.shape[1]))
            torch.sum(delta, 0, out=bias)

    def _apply(self, v: Tensor, weights: _Weights) -> tuple[Tensor, Tensor]:
        """J v, and the product of `second_order`."""
        hessian, fisher, scores = (None if w is None else self._input(w) for w in weights)
        with_hessian = hessian is not None
        tangent, tangents, bent = self._push(v, bends=with_hessian)
        along, moved = self._head.second_order(tangent, self._free(v), hessian, fisher)
        if scores is not None:
            sums = discounted_returns(scores * prefix_sum(along, self._offsets), 1.0, self._offsets)
            of_scores = self._head.gradient(sums)
            moved.outputs.add_(of_scores.outputs)
            if moved.log_std is not None and of_scores.log_std is not None:
                moved.log_std.add_(of_scores.log_std)
        out = self._empty()
        if hessian is None:
            self._pull(moved, out)
            return along, out
        if moved.log_std is not None:
            torch.sum(moved.log_std, 0, out=out[: self._num_free])
        delta, delta_dot = self._head.gradient(hessian).outputs, moved.outputs
        views, directions = self._split(out), self._split(self._input(v))
        for number in reversed(range(len(self._weights))):
            inputs, (weight, _) = self._inputs[number], self._weights[number]
            of_weight, of_bias = views[number]
            of_weight = of_weight.view_as(weight)
            torch.mm(delta_dot.T, inputs, out=of_weight)
            torch.sum(delta_dot, 0, out=of_bias)
            if not number:
                break
            of_weight.addmm_(delta.T, tangents[number - 1])
            delta_dot = torch.mm(delta_dot, weight).addmm_(delta, directions[number][0].view_as(weight))
            delta = torch.mm(delta, weight)
            self._between.pull(self._kept[number - 1], delta, delta_dot, bent[number - 1], self._mlp.activation)
        return along, out


class _Categorical:
    """Derivatives of log-probabilities by the logits (T, V)."""

    def __init__(self, logits: Tensor, actions: Tensor) -> None:
        self._kernels: Any = importlib.import_module("parl_core.kernels.triton_categorical")
        self._logits, self._actions = logits, actions
        self.log_prob, self._logsumexp = self._kernels.log_prob(logits, actions)

    def gradient(self, w: Tensor) -> _Pulled:
        return _Pulled(self._kernels.gradient(self._logits, self._logsumexp, self._actions, w))

    def along(self, tangent: Tensor, _: Tensor) -> Tensor:
        return self._kernels.along(self._logits, self._actions, tangent)

    def second_order(
        self, tangent: Tensor, _: Tensor, hessian: Tensor | None, fisher: Tensor | None
    ) -> tuple[Tensor, _Pulled]:
        """The Hessian is minus the Fisher matrix."""
        zero = torch.zeros_like(self.log_prob)
        scale = (zero if fisher is None else fisher) - (zero if hessian is None else hessian)
        along, image = self._kernels.fisher(self._logits, self._actions, tangent, scale)
        return along, _Pulled(image)


class _Gaussian:
    """Derivatives by the means and, with log_std="state", by what is rescaled to the log standard deviations."""

    def __init__(self, mlp: MlpPolicy, outputs: Tensor, log_std: Tensor | None, actions: Tensor) -> None:
        self._launch: Any = importlib.import_module("parl_core.kernels.triton_gaussian").launch
        self._head, self._like = mlp.head, outputs
        if log_std is None:
            mean, log_std = outputs.chunk(2, dim=-1)
        else:
            mean, log_std = outputs, log_std.detach().expand_as(outputs)
        self._bounds = LOG_STD_BOUNDS if mlp.head == "state" else None
        self.log_prob = outputs.new_empty(len(outputs))
        actions = plain(actions)
        self._launch(actions, mean, log_std, mlp.squash, bounds=self._bounds, value=self.log_prob)
        # What squashing takes off the log-density does not depend on the policy: no derivative knows of it.
        self._state = plain(unsquash(actions, mean, mlp.squash)), mean, log_std, False

    def gradient(self, w: Tensor) -> _Pulled:
        pulled, cotangents = self._cotangents()
        self._launch(*self._state, bounds=self._bounds, weights=w, **cotangents)
        return pulled

    def along(self, tangent: Tensor, free: Tensor) -> Tensor:
        along = self._like.new_empty(len(self._like))
        self._launch(*self._state, bounds=self._bounds, value=along, **self._tangents(tangent, free))
        return along

    def second_order(
        self, tangent: Tensor, free: Tensor, hessian: Tensor | None, fisher: Tensor | None
    ) -> tuple[Tensor, _Pulled]:
        along = self._like.new_empty(len(self._like))
        pulled, cotangents = self._cotangents()
        tangents = self._tangents(tangent, free)
        self._launch(
            *self._state, bounds=self._bounds, weights=hessian, fisher=fisher, value=along, **tangents, **cotangents
        )
        return along, pulled

    def _tangents(self, tangent: Tensor, free: Tensor) -> dict[str, Tensor | None]:
        if self._head == "state":
            of_mean, of_log_std = tangent.chunk(2, dim=-1)
            return {"of_mean": of_mean, "of_log_std": of_log_std}
        return {"of_mean": tangent, "of_log_std": free.expand_as(tangent) if self._head == "global" else None}

    def _cotangents(self) -> tuple[_Pulled, dict[str, Tensor]]:
        """Memory for them, as it is handed on and as kernels write it."""
        outputs = torch.empty_like(self._like)
        if self._head == "state":
            by_mean, by_log_std = outputs.chunk(2, dim=-1)
            return _Pulled(outputs), {"by_mean": by_mean, "by_log_std": by_log_std}
        if self._head == "fixed":
            return _Pulled(outputs), {"by_mean": outputs}
        by_log_std = torch.empty_like(outputs)
        return _Pulled(outputs, by_log_std), {"by_mean": outputs, "by_log_std": by_log_std}
