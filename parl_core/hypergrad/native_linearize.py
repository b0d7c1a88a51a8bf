"""The linearization of the package's own policies in C++: the same products as `ChunkGraphs`, without graphs.

The kernels (csrc/cpu/mlp_linearization.h) do one forward pass when they are made and keep its activations. Their
products are then the fewest matrix products there are, fused with what lies between them.
"""

from __future__ import annotations

import importlib
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models import policies
from ..models.policies import CategoricalPolicy, GaussianPolicy
from ..models.unchanged import change_of
from ..ops.segments import plain
from ..trajectories import Trajectories
from .captured import CapturedPolicy
from .modules import Chunk

_ACTIVATIONS: dict[type[nn.Module], str] = {nn.Tanh: "tanh", nn.ReLU: "relu", nn.SiLU: "silu"}
_AS_IMPORTED: dict[type[nn.Module], dict[str, Any]] = {
    kind: dict(vars(kind)) for kind in (GaussianPolicy, CategoricalPolicy)
}
_LOG_STD_BOUNDS = policies.LOG_STD_BOUNDS
_Weights = tuple[Tensor | None, Tensor | None, Tensor | None]


class MlpPolicy(NamedTuple):
    """What the kernels must know of a policy beside its parameters."""

    widths: list[int]
    """Of the observations, the hidden layers and the network's outputs."""
    activation: str
    head: str
    """categorical, or how a Gaussian's log_std comes about: state, global or fixed."""
    squash: bool


def mlp_policy(policy: CapturedPolicy) -> MlpPolicy:
    """Read a `GaussianPolicy` or `CategoricalPolicy` that is as the package made it.

    Raises:
        ValueError: it is another policy, or was changed in a way that the kernels do not know; the message says how.
    """
    module = policy.module
    if type(module) not in (GaussianPolicy, CategoricalPolicy):
        raise ValueError(f"policy is {type(module).__name__}, not exactly GaussianPolicy or CategoricalPolicy")
    if policies.LOG_STD_BOUNDS != _LOG_STD_BOUNDS:
        raise ValueError("LOG_STD_BOUNDS are not the kernels'")
    for key, value in _AS_IMPORTED[type(module)].items():
        if callable(value) and vars(type(module)).get(key) is not value:
            raise ValueError(f"{type(module).__name__}.{key} was replaced")
    if (change := change_of(module, "the policy")) is not None:
        raise ValueError(change)
    layers = list(module.network) if type(module.network) is nn.Sequential else []
    linears = [layer for layer in layers[::2] if type(layer) is nn.Linear]
    kinds = {type(layer) for layer in layers[1::2]}
    if len(layers) != 2 * len(linears) - 1 or len(kinds) > 1 or not kinds <= _ACTIVATIONS.keys():
        raise ValueError("its network is not linear layers with one of tanh, relu and silu between them")
    widths = [linears[0].in_features, *(layer.out_features for layer in linears)]
    head, squash = "categorical", False
    if isinstance(module, GaussianPolicy):
        head = module.log_std_kind if isinstance(module.log_std_kind, str) else "fixed"
        squash = module.squash
    shapes: dict[str, tuple[int, ...]] = {"log_std": (widths[-1],)} if head == "global" else {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        shapes |= {f"network.{2 * i}.weight": (outputs, inputs), f"network.{2 * i}.bias": (outputs,)}
    if policy.names != list(shapes):
        raise ValueError("not all of its parameters, or others than its own, are to be differentiated")
    if head == "fixed" and "log_std" not in policy.buffers:
        raise ValueError("its log_std is not a buffer")
    if 0 in widths or (head == "state" and widths[-1] % 2):
        raise ValueError(f"its layers have {widths} units")
    if any(not p.is_leaf for p in policy.params):
        raise ValueError("its parameters are not leaves")
    tensors = dict(zip(policy.names, policy.params, strict=True))
    if head == "fixed":
        tensors["log_std"], shapes["log_std"] = policy.buffers["log_std"], (widths[-1],)
    dtype, device = policy.params[0].dtype, policy.params[0].device
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device != device or tensor.dtype != dtype:
            raise ValueError(f"its {name} is not a plain tensor of {dtype} on {device}")
        if tensor.shape != shapes[name]:
            raise ValueError(f"its {name} is of shape {tuple(tensor.shape)}, not {shapes[name]}")
    activation = _ACTIVATIONS[kinds.pop()] if kinds else "tanh"
    return MlpPolicy(widths, activation, head, squash)


def check_mlp_steps(mlp: MlpPolicy, dtype: torch.dtype, trajectories: Trajectories) -> None:
    """Refuse, by a ValueError, steps that the kernels do not know; the policy may still know them.

    Of integer actions on a GPU the host reads the range, once.
    """
    observations, actions = trajectories.observations, trajectories.actions
    if type(observations) is not Tensor or type(actions) is not Tensor:
        raise ValueError("observations or actions are not plain tensors")
    if observations.dtype != dtype or observations.shape[1:] != (mlp.widths[0],):
        raise ValueError(f"observations are not {mlp.widths[0]} numbers of {dtype} a step")
    if mlp.head == "categorical":
        if actions.is_floating_point() or actions.numel() != len(actions):
            raise ValueError("actions are not one integer a step")
        if actions.numel():
            smallest, largest = torch.stack(torch.aminmax(actions)).tolist()
            if smallest < 0 or largest >= mlp.widths[-1]:
                raise ValueError(f"actions are not in 0 … {mlp.widths[-1] - 1}")
        return
    action_dim = mlp.widths[-1] // (2 if mlp.head == "state" else 1)
    if actions.dtype != dtype or actions.shape != (len(observations), action_dim):
        raise ValueError(f"actions are not {action_dim} numbers of {dtype} a step")


class NativeChunk:
    """Products with the (T, P) Jacobian J of a chunk's log-probabilities, as `ChunkGraphs` has them.

    Memory: the chunk's activations, (T, sum of the hidden widths), thrice that for SiLU; a Hessian product keeps twice as
    much for its w until another comes, and score products as much again.
    """

    max_layers: int | None = None
    """Deeper networks the kernels do not take; None: any."""

    def __init__(self, policy: CapturedPolicy, chunk: Chunk, mlp: MlpPolicy) -> None:
        self._like = policy.params[0].detach()
        self._num_steps = chunk.end - chunk.start
        # Multiplied, not written out: numbers on a GPU would be waited for.
        whole = torch.arange(2, device=self._like.device) * self._num_steps
        offsets = whole if chunk.offsets is None else chunk.offsets
        self._num_trajectories = len(offsets) - 1
        actions = chunk.actions.reshape(-1).long() if mlp.head == "categorical" else chunk.actions
        self._native: Any = self._linearize(
            *mlp,
            torch.cat([p.detach().reshape(-1) for p in policy.params]),
            plain(policy.buffers["log_std"]) if mlp.head == "fixed" else None,
            plain(chunk.observations),
            plain(actions),
            plain(offsets),
        )
        self._operators: dict[tuple[bool, ...], tuple[tuple[Any, ...], Any]] = {}

    @property
    def log_prob(self) -> Tensor:
        """(T,)."""
        out = self._like.new_empty(self._num_steps)
        self._log_prob(out)
        return out

    def vjp(self, w: Tensor) -> Tensor:
        """Jᵀw: (P,)."""
        out = self._like.new_empty(self._native.num_params)
        self._native.vjp(self._input(w), out, self._where())
        return out

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (T,)."""
        out = self._like.new_empty(self._num_steps)
        self._native.jvp(self._input(v), out, self._where())
        return out

    def jvp_and_hvp(self, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """J v (T,) and (Σ_t w_t ∇² log π_t) v (P,)."""
        along = self._like.new_empty(self._num_steps)
        return along, self._apply((w, None, None), v, along)

    def fisher_vp(self, w: Tensor, v: Tensor) -> Tensor:
        """(Σ_t w_t F(s_t)) v: (P,)."""
        return self._apply((None, w, None), v, None)

    def second_order(self, v: Tensor, weights: _Weights) -> Tensor:
        """`Linearization.second_order` with the weights of Hessian, Fisher and score terms: (P,)."""
        return self._apply(weights, v, None)

    def scores(self, w: Tensor) -> Tensor:
        """(N, P): each trajectory's Σ_t w_t ∇ log π_t."""
        out = self._like.new_empty(self._num_trajectories, self._native.num_params)
        self._native.scores(self._input(w), out, self._where())
        return out

    def operator(self, weights: _Weights, damping: float) -> Any:
        """v ↦ `second_order(v, weights)` + damping·v as an object of `_native`, for solvers there.

        Without damping it is kept until other weights come for the same terms; on the CPU their numbers tell.
        """
        if damping:
            return self._made(weights, damping)
        terms = tuple(w is not None for w in weights)
        built_for, operator = self._operators.get(terms, ((), None))
        if operator is None or not all(map(self._is_remembered, built_for, weights)):
            operator = self._made(weights, 0.0)
            self._operators[terms] = tuple(map(self._remember, weights)), operator
        return operator

    def _made(self, weights: _Weights, damping: float) -> Any:
        return self._curvature(*(None if w is None else self._input(w) for w in weights), damping)

    def _apply(self, weights: _Weights, v: Tensor, along: Tensor | None) -> Tensor:
        out = self._like.new_empty(self._native.num_params)
        self.operator(weights, 0.0).apply(self._input(v), out, along, self._where())
        return out

    def _input(self, tensor: Tensor) -> Tensor:
        return plain(tensor.to(self._like.dtype))

    # What depends on where the kernels run.

    def _linearize(self, *arguments: Any) -> Any:
        return importlib.import_module("parl_core._native").linearize_mlp(*arguments, self._where())

    def _log_prob(self, out: Tensor) -> None:
        self._native.log_prob(out)

    def _curvature(self, *arguments: Any) -> Any:
        return self._native.curvature(*arguments, self._where())

    def _where(self) -> int:
        """The last argument of all calls: how many threads compute, or on which stream."""
        return torch.get_num_threads()

    def _remember(self, weights: Tensor | None) -> Any:
        """What tells later whether an operator was made for the same weights."""
        return None if weights is None else weights.detach().clone()

    def _is_remembered(self, kept: Any, weights: Tensor | None) -> bool:
        return kept is weights or (kept is not None and weights is not None and torch.equal(kept, weights))
