"""The user's policy and reward as they are now, to be differentiated in copies and aliases of their parameters."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..offsets import is_capturing
from ..trajectories import Trajectories
from .flat import flat_grad, trainable_parameters
from .modules import Chunk, came, reward_chunks, reward_vjp, takes_offsets

R = TypeVar("R")
_CHECKED_STEPS = 64  # random log-probabilities show in any step; this costs little beside a product


class MethodCall(nn.Module):
    """Lets `functional_call`, which calls a module's forward, reach any method of the policy."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, method)(*args, **kwargs)


class CapturedPolicy:
    """A policy at the trainable parameters and buffers it has now; later changes of those are not felt.

    Every call sees the buffers as they were captured: what a call writes into them (running statistics, the vectors of
    a spectral norm) is forgotten. Frozen parameters are not copied, since beside an adapter they are most of a model's
    memory: they must stay as they are for as long as the object is used.

    Attributes:
        module: the policy itself, with its present parameters.
        names: of the parameters that require a gradient, in the order of `named_parameters`.
        params: copies of these parameters.
        buffers: copies of the buffers, by name.
        has_fisher: it offers `distribution_params` and `params_fisher`.
        sees_trajectories: a method that gets observations takes `offsets`.
    """

    def __init__(self, policy: nn.Module) -> None:
        if not callable(getattr(policy, "log_prob", None)):
            raise TypeError(
                f"policy must be a module with log_prob(observations, actions), got {type(policy).__name__}"
            )
        named = trainable_parameters(policy, "policy")
        dtype = next(iter(named.values())).dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"policy's parameters are {dtype}, which has too few digits for second derivatives: policy.float()"
            )
        self.module = policy
        self.names = list(named)
        self._own = list(named.values())
        self.params = [p.detach().clone().requires_grad_() for p in self._own]
        self.buffers = {name: b.detach().clone() for name, b in policy.named_buffers()}
        self._method = MethodCall(policy)
        self.has_fisher = all(
            callable(getattr(policy, name, None)) for name in ("distribution_params", "params_fisher")
        )
        self._takes_offsets = {
            name: takes_offsets(getattr(policy, name, None)) for name in ("log_prob", "distribution_params")
        }
        self.sees_trajectories = any(self._takes_offsets.values())

    def at(self, params: list[Tensor]) -> CapturedPolicy:
        """The same policy at other parameters, shaped as `params`; their graph is kept."""
        moved = copy.copy(self)
        moved.params = params
        return moved

    def check_repeatable(self, trajectories: Trajectories, log_prob: Tensor, chunk_steps: int | None = None) -> None:
        """Refuse a policy whose log-probabilities change from call to call, as those of a dropout layer do.

        Two calls without a graph on up to 64 steps (or one whole trajectory) around the least probable one, where the
        policy's own numbers surely count: language models give their prompts probability 1. None while a CUDA graph is
        captured, since their numbers could not be looked at.

        Args:
            log_prob: (T,) of all steps.
            chunk_steps: the most steps of a call.

        Raises:
            ValueError: the calls disagree; on accelerators, by more than the order of additions explains.
        """
        if not trajectories.num_steps or is_capturing():
            return
        for chunk in self._chunks_around(trajectories, int(log_prob.argmin()), chunk_steps or _CHECKED_STEPS):
            with torch.no_grad():
                _refuse_drawing(self.log_prob(chunk), self.log_prob(chunk), "policy", "policy.log_prob")
            self._refuse_other_names(self.log_prob(chunk))

    def _refuse_other_names(self, log_prob: Tensor) -> None:
        """Refuse a policy that reaches its parameters otherwise than by attribute: the captured would miss that part."""
        if not log_prob.requires_grad:
            return
        found = torch.autograd.grad(log_prob.sum(), self._own, allow_unused=True)
        for name, gradient in zip(self.names, found, strict=True):
            if gradient is not None:
                raise ValueError(
                    f"policy.log_prob reaches its parameter '{name}' by another reference than the "
                    "module's attribute, such as a list of tensors made once: look it up from the module at each call"
                )

    def _chunks_around(self, trajectories: Trajectories, step: int, chunk_steps: int) -> Iterator[Chunk]:
        """About `_CHECKED_STEPS` steps, or the trajectory that `step` is in and some of those after it."""
        if self.sees_trajectories:
            bounds = trajectories.offsets.tolist()
            first = bisect_right(bounds, step) - 1
            last = max(bisect_right(bounds, bounds[first] + min(chunk_steps, _CHECKED_STEPS)) - 1, first + 1)
            offsets = trajectories.offsets[first : last + 1] - bounds[first]
            yield Chunk.of(trajectories, bounds[first], bounds[last], offsets)
            return
        end = min(step + _CHECKED_STEPS, trajectories.num_steps)
        for start in range(max(end - _CHECKED_STEPS, 0), end, chunk_steps):
            yield Chunk.of(trajectories, start, min(start + chunk_steps, end), None)

    def log_prob(self, chunk: Chunk) -> Tensor:
        """(T,) of the chunk's steps."""
        log_prob = self._on_steps("log_prob", chunk, chunk.observations, chunk.actions)
        count = chunk.end - chunk.start
        if not isinstance(log_prob, Tensor) or log_prob.shape != (count,):
            raise ValueError(f"policy.log_prob must return shape (T,) = ({count},), got {came(log_prob)}")
        return log_prob

    def distribution_params(self, chunk: Chunk) -> Tensor:
        """(T, k) of the chunk's steps."""
        params = self._on_steps("distribution_params", chunk, chunk.observations)
        count = chunk.end - chunk.start
        if not isinstance(params, Tensor) or params.dim() != 2 or params.shape[0] != count:
            raise ValueError(
                f"policy.distribution_params must return shape (T, k) = ({count}, k), got {came(params)}: several heads "
                "go side by side in one row"
            )
        return params

    def params_fisher(self, params: Tensor, tangent: Tensor) -> Tensor:
        """(T, k), (T, k) -> (T, k)."""
        product = functional_call(self._method, self._state(), ("params_fisher", params, tangent))
        if not isinstance(product, Tensor) or product.shape != params.shape:
            raise ValueError(
                f"policy.params_fisher must return shape (T, k) = {tuple(params.shape)} as its arguments have, "
                f"got {came(product)}"
            )
        return product

    def _on_steps(self, method: str, chunk: Chunk, *args: Tensor) -> Tensor:
        kwargs = {"offsets": chunk.offsets} if self._takes_offsets[method] else {}
        return functional_call(self._method, self._state(), (method, *args), kwargs)

    def _state(self) -> dict[str, Tensor]:
        """What a call computes with. The buffers are its own, since it may write to them, or put others in the dict."""
        return {
            **{f"module.{name}": b.clone() for name, b in self.buffers.items()},
            **{f"module.{name}": p for name, p in zip(self.names, self.params, strict=True)},
        }


def _refuse_drawing(first: Tensor, second: Tensor, module: str, method: str) -> None:
    """Refuse two calls on the same steps that disagree."""
    difference = (first - second).abs().max()
    rounding = 0.0 if first.device.type == "cpu" else 1e3 * torch.finfo(first.dtype).eps * first.abs().max()
    if bool(difference > rounding):  # a NaN is named where it is used
        raise ValueError(
            f"{method} must give the same numbers at every call, got some that differ by {difference.item():.2g} between "
            f"two calls on the same steps: dropout in train mode draws anew (call {module}.eval()), or the {module} keeps "
            "state that each call changes; parl_core.preflight names what it is"
        )


class CapturedReward:
    """A reward that is differentiated in aliases of its parameters, so that hooks on these wait for `backward`.

    Attributes:
        module: the reward itself.
        own: its parameters that require a gradient, in the order of `named_parameters`.
        params: aliases of them, which share their memory.
    """

    def __init__(self, reward: nn.Module) -> None:
        named = trainable_parameters(reward, "reward")
        self.module = reward
        self.own: list[nn.Parameter] = list(named.values())
        self.params: list[Tensor] = [p.detach().requires_grad_() for p in self.own]
        self._aliases = {f"module.{name}": alias for name, alias in zip(named, self.params, strict=True)}
        self._call = _FunctionCall(reward)

    def run(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """function(reward, …), with the aliases in place of the parameters and copies in place of the buffers."""
        buffers = {f"module.{name}": b.detach().clone() for name, b in self.module.named_buffers()}
        return functional_call(self._call, {**self._aliases, **buffers}, (function, *args), kwargs)

    def gradient(
        self, outputs: Sequence[Tensor], grad_outputs: Sequence[Tensor], *, retain_graph: bool = False
    ) -> Tensor:
        """(R,) Σ grad_outputs · ∂outputs/∂ν, for what `run` returned.

        Of the aliases and, where the reward or a closure holds its parameters by another name, of the parameters themselves.
        """
        found = flat_grad(outputs, [*self.params, *self.own], grad_outputs, retain_graph=retain_graph)
        return found[: len(found) // 2] + found[len(found) // 2 :]

    def vjp(self, trajectories: Trajectories, coefficients: Tensor, *, chunk_steps: int | None) -> Tensor:
        """(R,) ∇_ν Σ_t coefficients_t · r_ν(s_t, a_t), as `reward_vjp`."""
        found = self.run(reward_vjp, trajectories, coefficients, [*self.params, *self.own], chunk_steps=chunk_steps)
        return found[: len(found) // 2] + found[len(found) // 2 :]

    @torch.no_grad()
    def check_repeatable(self, trajectories: Trajectories) -> None:
        """Refuse a reward whose numbers change from call to call, by two calls on up to 64 steps (or one trajectory).

        None while a CUDA graph is captured.

        Raises:
            ValueError: the calls disagree; on accelerators, by more than the order of additions explains.
        """
        if is_capturing():
            return
        first, second = (self.run(_first_values, trajectories) for _ in range(2))
        _refuse_drawing(first, second, "reward", "reward(observations, actions)")


def _first_values(reward: nn.Module, trajectories: Trajectories) -> Tensor:
    for _, values in reward_chunks(reward, trajectories, _CHECKED_STEPS):
        return values
    return trajectories.weights.new_zeros(0)


class _FunctionCall(nn.Module):
    """Lets `functional_call` serve any function of the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(self.module, *args, **kwargs)
