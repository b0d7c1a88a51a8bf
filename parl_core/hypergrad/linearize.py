"""Products with the derivatives of a policy's log-probabilities, from what is cached or chunk by chunk.

Steps come in chunks, and every product is a sum (or a concatenation) over them. Without `chunk_steps` there is a single
chunk, whose products are kept ready; with it each chunk is made for a product and freed before the next one.

Who makes a chunk's products: autograd, by the graphs of `ChunkGraphs`, for any policy (the backend `reference`); or kernels,
for the package's own policies: those behind `NativeChunk` on the CPU (`cpp`) and `CudaChunk` on a GPU (`cuda`), chosen by
themselves where they can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import BackendError, discounted_returns, prefix_sum
from ..ops.accelerators import cuda_devices
from ..ops.registry import Op
from ..ops.segments import ON_CPU, SINGLE_AND_DOUBLE
from ..trajectories import Trajectories, require_finite
from .captured import CapturedPolicy
from .chunk_graphs import ChunkGraphs
from .cuda_linearize import cuda_chunk
from .flat import differentiating, without_autocast
from .modules import Chunk, check_chunk_steps, check_policy_inputs, chunks, gather_steps
from .native_linearize import MlpPolicy, NativeChunk, check_mlp_steps, mlp_policy


class Costs(NamedTuple):
    """Nominal cost of each product in gradient equivalents.

    One is the forward and backward pass of Σ_t log π_t on the same T steps. Counted in matrix products, of which a
    wide layer takes one in a forward pass and two in a backward one; a graph that is kept is not counted.
    """

    vjp: float
    jvp: float
    jvp_and_hvp: float
    fisher_vp: float
    scores: float


_CACHED = Costs(vjp=2 / 3, jvp=2 / 3, jvp_and_hvp=6 / 3, fisher_vp=4 / 3, scores=3 / 3)
# The forward pass again, and with a double backward the graph of the VJP too.
_CHUNKED = Costs(vjp=3 / 3, jvp=5 / 3, jvp_and_hvp=9 / 3, fisher_vp=7 / 3, scores=3 / 3)
# Of the kernels: scores have their forward pass behind them, a JVP needs no backward one.
_CACHED_NATIVE = Costs(vjp=2 / 3, jvp=2 / 3, jvp_and_hvp=6 / 3, fisher_vp=4 / 3, scores=2 / 3)
_CHUNKED_NATIVE = Costs(vjp=3 / 3, jvp=3 / 3, jvp_and_hvp=8 / 3, fisher_vp=5 / 3, scores=3 / 3)

_OP = Op("linearize", ChunkGraphs)
_OP.register("cpp", lambda: NativeChunk, device_types=ON_CPU, dtypes=SINGLE_AND_DOUBLE)
_OP.register("cuda", cuda_chunk, device_types=cuda_devices(), dtypes=SINGLE_AND_DOUBLE)


Products = ChunkGraphs | NativeChunk


def linearize(policy: nn.Module, trajectories: Trajectories, *, chunk_steps: int | None = None) -> Linearization:
    """Linearise `policy.log_prob` at the policy's present parameters, on the steps of `trajectories`.

    Trainable parameters and buffers are copied, and every call of the policy sees the buffers as they were: later changes
    of either are not felt. Frozen parameters and the tensors of `trajectories` are not copied and must stay as they are
    while products are taken; autograd notices a change in place only where a kept graph has saved the tensor.

    The package's own policies are differentiated by compiled kernels, all others by autograd. `parl.backend("reference")`
    around the call chooses autograd for those too.

    Args:
        policy: any module with `log_prob(observations, actions) -> (T,)`. The flat parameter vector (P,) holds its
            parameters that require a gradient, in the order of `named_parameters`. If it also offers
            `distribution_params` and `params_fisher` (see `parl_core.models.policies`), Fisher products are exact over
            actions; otherwise they use the actions taken. If `log_prob` or `distribution_params` has a parameter named
            `offsets`, it is given `trajectories.offsets` (N+1,) by keyword: a log-probability may then depend on what
            came before it in its trajectory. Parts of the data come as whole trajectories with offsets of their own.
            Its numbers must be the same at every call, which is looked at on a few steps: dropout wants `policy.eval()`.
        trajectories: T steps in N trajectories.
        chunk_steps: None keeps the graphs of all steps, so that products are cheapest. A number keeps none: each
            product calls the policy on at most that many steps at once, and memory does not grow with T beyond a few
            (T,) vectors. A policy that takes `offsets` is only cut between trajectories, and a longer one stays whole.

    Raises:
        TypeError, ValueError: no log_prob, a log_prob of the wrong shape or that changes from call to call, no trainable
            parameter, mixed dtypes, a `chunk_steps` below 1.
        NonFiniteError: a log-probability is NaN or infinite.
        BackendError: `parl.backend` asks for one that cannot compute this.
    """
    return Linearization(policy, trajectories, chunk_steps)


class Linearization:
    """The result of `linearize`; J is the (T, P) Jacobian of the log-probabilities at the captured parameters."""

    @differentiating
    @without_autocast
    def __init__(self, policy: nn.Module | CapturedPolicy, trajectories: Trajectories, chunk_steps: int | None) -> None:
        check_chunk_steps(chunk_steps)
        self._policy = policy if isinstance(policy, CapturedPolicy) else CapturedPolicy(policy)
        self._num_params = sum(p.numel() for p in self._policy.params)
        check_policy_inputs(trajectories, self._policy.params)
        dtype = self._policy.params[0].dtype
        self._trajectories = trajectories if trajectories.weights.dtype == dtype else trajectories.to(dtype)
        self._chunk_steps = chunk_steps
        self._kernels = _kernels_for(self._policy, self._trajectories)
        # Kept where nothing is cut; otherwise made anew for each product.
        self._kept: list[tuple[Chunk, Products]] | None = None
        if chunk_steps is None:
            self._kept = list(self._graphs())
        with torch.set_grad_enabled(self._kept is not None):
            parts = ((chunk, graphs.log_prob.detach()) for chunk, graphs in self._graphs())
            self._log_prob = gather_steps(parts, self._policy.params[0], trajectories.num_steps)
        require_finite("policy.log_prob(observations, actions)", self._log_prob)
        if self._kernels is None:  # what the kernels compute is no matter of chance
            self._policy.check_repeatable(self._trajectories, self._log_prob, chunk_steps)

    @property
    def num_params(self) -> int:
        """P."""
        return self._num_params

    @property
    def trajectories(self) -> Trajectories:
        """The steps on which the policy is linearised; the weights have the dtype of its parameters."""
        return self._trajectories

    @property
    def policy(self) -> CapturedPolicy:
        """The policy at the parameters it is linearised at."""
        return self._policy

    @property
    def log_prob(self) -> Tensor:
        """(T,) log-probabilities of the actions taken, detached."""
        return self._log_prob

    @property
    def costs(self) -> Costs:
        """What each product costs, in gradient equivalents."""
        if self._kernels is not None:
            return _CACHED_NATIVE if self._chunk_steps is None else _CHUNKED_NATIVE
        return _CACHED if self._chunk_steps is None else _CHUNKED

    @differentiating
    @without_autocast
    def vjp(self, w: Tensor) -> Tensor:
        """Jᵀw: (T,) -> (P,), the weighted sum of the steps' scores."""
        self._check_steps("w", w)
        if (native := self._kept_native()) is not None:
            return native.vjp(w)
        total = self._zeros()
        for chunk, graphs in self._graphs():
            total += graphs.vjp(w[chunk.steps])
        return total

    @differentiating
    @without_autocast
    def jvp(self, v: Tensor) -> Tensor:
        """J v: (P,) -> (T,), each step's score times v."""
        self._check_params("v", v)
        if (native := self._kept_native()) is not None:
            return native.jvp(v)
        parts = ((chunk, graphs.jvp(v)) for chunk, graphs in self._graphs())
        return gather_steps(parts, self._log_prob, self._trajectories.num_steps)

    def hvp(self, w: Tensor, v: Tensor) -> Tensor:
        """(Σ_t w_t ∇² log π_t) v: (T,), (P,) -> (P,)."""
        return self.jvp_and_hvp(w, v)[1]

    @differentiating
    @without_autocast
    def jvp_and_hvp(self, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`jvp(v)` and `hvp(w, v)` in one pass; a graph that is kept is for one w, until another comes."""
        self._check_steps("w", w)
        self._check_params("v", v)
        if (native := self._kept_native()) is not None:
            return native.jvp_and_hvp(w, v)
        total = self._zeros()
        step_products = torch.empty_like(self._log_prob)
        for chunk, graphs in self._graphs():
            step_products[chunk.steps], image = graphs.jvp_and_hvp(w[chunk.steps], v)
            total += image
        return step_products, total

    @differentiating
    @without_autocast
    def fisher_vp(self, w: Tensor, v: Tensor) -> Tensor:
        """(Σ_t w_t F(s_t)) v: (T,), (P,) -> (P,), with F(s) = E_{a∼π(·|s)}[∇log π ∇log πᵀ].

        Exact over actions where the policy gives its Fisher matrix; otherwise the score outer products of the actions
        taken, whose expectation it is.
        """
        self._check_steps("w", w)
        self._check_params("v", v)
        if (native := self._kept_native()) is not None:
            return native.fisher_vp(w, v)
        total = self._zeros()
        for chunk, graphs in self._graphs():
            total += graphs.fisher_vp(w[chunk.steps], v)
        return total

    @differentiating
    @without_autocast
    def second_order(
        self,
        v: Tensor,
        *,
        hessian: Tensor | None = None,
        fisher: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> Tensor:
        """The terms of a trajectory Hessian, times v: (P,) -> (P,).

        (Σ_t hessian_t ∇² log π_t  +  Σ_t fisher_t F(s_t)  +  Σ_i Σ_h scores_ih S_{i,0:h} S_{i,0:h}ᵀ) v

        with S_{i,0:h} the sum of trajectory i's scores up to its step h, and F as in `fisher_vp`.

        Args:
            v: (P,).
            hessian, fisher, scores: (T,) weights of the steps; None leaves the term out.
        """
        for name, weights in (("hessian", hessian), ("fisher", fisher), ("scores", scores)):
            if weights is not None:
                self._check_steps(name, weights)
        self._check_params("v", v)
        if (native := self._kept_native()) is not None:
            return native.second_order(v, (hessian, fisher, scores))
        image, step_products = self._zeros(), None
        if hessian is not None:
            step_products, image = self.jvp_and_hvp(hessian, v)
        if scores is not None:
            offsets = self._trajectories.offsets
            sums = prefix_sum(self.jvp(v) if step_products is None else step_products, offsets)
            image = image + self.vjp(discounted_returns(scores * sums, 1.0, offsets))
        return image if fisher is None else image + self.fisher_vp(fisher, v)

    def second_order_cost(self, *, hessian: bool, fisher: bool, scores: bool) -> float:
        """What a product of `second_order` with these terms costs, in gradient equivalents."""
        costs = self.costs
        if self._kept_native() is not None:
            return costs.jvp_and_hvp if hessian else costs.fisher_vp if fisher or scores else 0.0
        along = costs.jvp_and_hvp if hessian else costs.jvp if scores else 0.0
        return along + scores * costs.vjp + fisher * costs.fisher_vp

    @differentiating
    @without_autocast
    def scores(self, step_weights: Tensor | None = None) -> Tensor:
        """(N, P): each trajectory's Σ_t w_t ∇ log π_t; `step_weights` (T,) are ones by default.

        The only product that holds N×P numbers. A policy is called on one trajectory at a time.
        """
        weights = torch.ones_like(self._log_prob) if step_weights is None else step_weights
        self._check_steps("step_weights", weights)
        if (native := self._kept_native()) is not None:
            return native.scores(weights)
        offsets = self._trajectories.offsets.tolist()
        rows = self._policy.params[0].detach().new_zeros(len(offsets) - 1, self.num_params)
        for row, start, end in zip(rows, offsets[:-1], offsets[1:], strict=True):
            for chunk in self._chunks_of_one(start, end):
                row += self._products(chunk).vjp(weights[chunk.steps])
        return rows

    def native_operator(
        self,
        *,
        hessian: Tensor | None = None,
        fisher: Tensor | None = None,
        scores: Tensor | None = None,
        damping: float = 0.0,
    ) -> Any | None:
        """`second_order` with fixed weights, plus damping, as an operator of `parl_core._native`, for solvers there.

        None where the kernels for CPUs do not compute it: other policies, steps in chunks, or on a GPU.
        """
        native = self._kept_native()
        return native.operator((hessian, fisher, scores), damping) if type(native) is NativeChunk else None

    def _products(self, chunk: Chunk) -> Products:
        if self._kernels is None:
            return ChunkGraphs(self._policy, chunk)
        kind, mlp = self._kernels
        return kind(self._policy, chunk, mlp)

    def _kept_native(self) -> NativeChunk | None:
        """The kernels that hold all steps."""
        if self._kept and isinstance(self._kept[0][1], NativeChunk):
            return self._kept[0][1]
        return None

    def _graphs(self) -> Iterator[tuple[Chunk, Products]]:
        if self._kept is not None:
            yield from self._kept
            return
        whole = self._policy.sees_trajectories or (self._kernels is not None and self._chunk_steps is None)
        for chunk in chunks(self._trajectories, self._chunk_steps, whole=whole):
            yield chunk, self._products(chunk)

    def _chunks_of_one(self, start: int, end: int) -> Iterator[Chunk]:
        """The chunks of the trajectory that holds steps start … end−1."""
        if self._policy.sees_trajectories:
            if end > start:
                yield Chunk.of(self._trajectories, start, end, self._trajectories.offsets.new_tensor([0, end - start]))
            return
        size = self._chunk_steps or max(end - start, 1)
        for first in range(start, end, size):
            yield Chunk.of(self._trajectories, first, min(first + size, end), None)

    def _check_params(self, name: str, tensor: Tensor) -> None:
        if tensor.shape != (self.num_params,):
            raise ValueError(f"{name} must have shape (P,) = ({self.num_params},), got {tuple(tensor.shape)}")

    def _zeros(self) -> Tensor:
        return self._policy.params[0].detach().new_zeros(self.num_params)

    def _check_steps(self, name: str, tensor: Tensor) -> None:
        if tensor.shape != self._log_prob.shape:
            raise ValueError(f"{name} must have shape (T,) = {tuple(self._log_prob.shape)}, got {tuple(tensor.shape)}")


def _kernels_for(policy: CapturedPolicy, trajectories: Trajectories) -> tuple[type[NativeChunk], MlpPolicy] | None:
    """Who computes chunks, and the policy as it is taken there; None if autograd is asked for, or must do it."""
    backend = _OP.select(policy.params[0], None)
    if backend == "reference":
        return None
    kind: type[NativeChunk] = _OP.kernel(backend)  # type: ignore[assignment]
    try:
        mlp = mlp_policy(policy)
        check_mlp_steps(mlp, policy.params[0].dtype, trajectories)
        if kind.max_layers is not None and len(mlp.widths) - 1 > kind.max_layers:
            raise ValueError(f"its network has more than {kind.max_layers} layers")
    except ValueError as reason:
        if _OP.requested(None) == backend:
            raise BackendError(f"linearize: backend '{backend}' cannot be used: {reason}.") from None
        return None
    return kind, mlp
