"""Calling the user's policy and reward: with captured parameters, where trajectories begin, and chunk by chunk.

A module whose method takes a parameter named `offsets` sees trajectories, not only steps: it is given the (N+1,) int64
offsets of the steps it is called on, by keyword, so that a recurrent network or a transformer knows where each begins.
"""

from __future__ import annotations

import copy
import inspect
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..trajectories import Trajectories, require_finite
from .flat import differentiating, flat_grad, trainable_parameters

R = TypeVar("R")
_CHECKED_STEPS = 64  # random log-probabilities show in any step; this costs little beside a product


class Chunk(NamedTuple):
    """Consecutive steps of `Trajectories` that a module is called on at once."""

    start: int
    end: int
    observations: Tensor
    actions: Tensor
    offsets: Tensor | None
    """(n+1,) offsets within the chunk, for modules that take them."""

    @classmethod
    def of(cls, trajectories: Trajectories, start: int, end: int, offsets: Tensor | None) -> Chunk:
        """Steps start … end−1 of `trajectories`."""
        return cls(start, end, trajectories.observations[start:end], trajectories.actions[start:end], offsets)

    @property
    def steps(self) -> slice:
        """Where they lie among all steps."""
        return slice(self.start, self.end)


def takes_offsets(method: Callable[..., Any] | None) -> bool:
    """Whether `method` has a parameter named `offsets`."""
    try:
        return method is not None and "offsets" in inspect.signature(method).parameters
    except (TypeError, ValueError):  # a compiled callable without a signature
        return False


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module whose signature counts: torch.compile's and DataParallel's wrappers take anything."""
    kinds = {c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.")}
    if "OptimizedModule" in kinds:
        return _unwrapped(module._orig_mod)  # type: ignore[arg-type]
    if kinds & {"DataParallel", "DistributedDataParallel"}:
        return _unwrapped(module.module)  # type: ignore[arg-type]
    return module


def check_chunk_steps(chunk_steps: int | None) -> None:
    """Refuse anything but None or a positive whole number."""
    if chunk_steps is not None and (isinstance(chunk_steps, bool) or not isinstance(chunk_steps, int)):
        raise TypeError(f"chunk_steps must be an int or None, got {type(chunk_steps).__name__}")
    if chunk_steps is not None and chunk_steps < 1:
        raise ValueError(f"chunk_steps must be at least 1, got {chunk_steps}")


def chunks(trajectories: Trajectories, chunk_steps: int | None, *, whole: bool) -> Iterator[Chunk]:
    """Cut the steps into chunks of at most `chunk_steps`; None: a single one. No steps give no chunk.

    With `whole`, trajectories are not cut, a longer one makes a chunk by itself, and chunks carry their offsets.
    """
    num_steps = trajectories.num_steps
    if num_steps == 0:
        return
    if chunk_steps is None or chunk_steps >= num_steps:
        yield Chunk.of(trajectories, 0, num_steps, trajectories.offsets if whole else None)
        return
    bounds = trajectories.offsets.tolist() if whole else []
    first = start = 0
    while start < num_steps:
        end, offsets = min(start + chunk_steps, num_steps), None
        if whole:
            end = bounds[bisect_right(bounds, end) - 1]
            if end == start:
                end = bounds[bisect_right(bounds, start)]
            last = bisect_right(bounds, end) - 1
            offsets = trajectories.offsets[first : last + 1] - start
            first = last
        yield Chunk.of(trajectories, start, end, offsets)
        start = end


def gather_steps(parts: Iterable[tuple[Chunk, Tensor]], like: Tensor, num_steps: int) -> Tensor:
    """(T,) from the chunks' values, which come one after another; without any, of the dtype and device of `like`.

    Written into one tensor as they come: kept pieces, small between large blocks that are freed, fragment the heap, so that
    memory would grow with T after all.
    """
    joined: Tensor | None = None
    for chunk, values in parts:
        if joined is None:
            joined = values.new_empty(num_steps)
        joined[chunk.steps] = values
    return torch.zeros(0, dtype=like.dtype, device=like.device) if joined is None else joined


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
        params: copies of the parameters that require a gradient, in the order of `named_parameters`.
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
        self._names = [f"module.{name}" for name in named]
        self._own = list(named.values())
        self.params = [p.detach().clone().requires_grad_() for p in self._own]
        self._buffers = {f"module.{name}": b.detach().clone() for name, b in policy.named_buffers()}
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
        policy's own numbers surely count: language models give their prompts probability 1.

        Args:
            log_prob: (T,) of all steps.
            chunk_steps: the most steps of a call.

        Raises:
            ValueError: the calls disagree; on accelerators, by more than the order of additions explains.
        """
        if not trajectories.num_steps:
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
        for name, gradient in zip(self._names, found, strict=True):
            if gradient is not None:
                raise ValueError(
                    f"policy.log_prob reaches its parameter '{name.removeprefix('module.')}' by another reference than the "
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
            raise ValueError(f"policy.log_prob must return shape (T,) = ({count},), got {_came(log_prob)}")
        return log_prob

    def distribution_params(self, chunk: Chunk) -> Tensor:
        """(T, k) of the chunk's steps."""
        params = self._on_steps("distribution_params", chunk, chunk.observations)
        count = chunk.end - chunk.start
        if not isinstance(params, Tensor) or params.dim() != 2 or params.shape[0] != count:
            raise ValueError(
                f"policy.distribution_params must return shape (T, k) = ({count}, k), got {_came(params)}: several heads "
                "go side by side in one row"
            )
        return params

    def params_fisher(self, params: Tensor, tangent: Tensor) -> Tensor:
        """(T, k), (T, k) -> (T, k)."""
        product = functional_call(self._method, self._state(), ("params_fisher", params, tangent))
        if not isinstance(product, Tensor) or product.shape != params.shape:
            raise ValueError(
                f"policy.params_fisher must return shape (T, k) = {tuple(params.shape)} as its arguments have, "
                f"got {_came(product)}"
            )
        return product

    def _on_steps(self, method: str, chunk: Chunk, *args: Tensor) -> Tensor:
        kwargs = {"offsets": chunk.offsets} if self._takes_offsets[method] else {}
        return functional_call(self._method, self._state(), (method, *args), kwargs)

    def _state(self) -> dict[str, Tensor]:
        """What a call computes with. The buffers are its own, since it may write to them, or put others in the dict."""
        return {
            **{name: b.clone() for name, b in self._buffers.items()},
            **dict(zip(self._names, self.params, strict=True)),
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

        Raises:
            ValueError: the calls disagree; on accelerators, by more than the order of additions explains.
        """
        first, second = (self.run(_first_values, trajectories) for _ in range(2))
        _refuse_drawing(first, second, "reward", "reward(observations, actions)")


def _first_values(reward: nn.Module, trajectories: Trajectories) -> Tensor:
    for _, values in _reward_chunks(reward, trajectories, _CHECKED_STEPS):
        return values
    return trajectories.weights.new_zeros(0)


class _FunctionCall(nn.Module):
    """Lets `functional_call` serve any function of the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(self.module, *args, **kwargs)


def evaluate_reward(reward: nn.Module, trajectories: Trajectories) -> Tensor:
    """(T,) rewards of all steps in one call, differentiable, checked for shape and finiteness."""
    whole = [values for _, values in _reward_chunks(reward, trajectories, None)]
    return whole[0] if whole else trajectories.weights.new_zeros(0)


def reward_values(reward: nn.Module, trajectories: Trajectories, *, chunk_steps: int | None = None) -> Tensor:
    """(T,) rewards of all steps without a graph, called on at most `chunk_steps` steps at once.

    A reward that takes `offsets` is called on whole trajectories.

    Raises:
        TypeError, ValueError: a wrong `chunk_steps`, or a reward of the wrong shape, dtype or device.
        NonFiniteError: a reward is NaN or infinite.
    """
    with torch.no_grad():
        parts = _reward_chunks(reward, trajectories, chunk_steps)
        return gather_steps(parts, trajectories.weights, trajectories.num_steps)


@differentiating
def reward_vjp(
    reward: nn.Module,
    trajectories: Trajectories,
    coefficients: Tensor,
    params: list[Tensor],
    *,
    chunk_steps: int | None = None,
) -> Tensor:
    """∇ of Σ_t coefficients_t · r(s_t, a_t) with respect to `params`, as one flat vector (R,).

    Args:
        coefficients: (T,).
        params: parameters of `reward`.
        chunk_steps: as in `reward_values`; the graph of one chunk is held at a time.
    """
    if coefficients.shape != (trajectories.num_steps,):
        raise ValueError(
            f"coefficients must have shape (T,) = ({trajectories.num_steps},), got {tuple(coefficients.shape)}"
        )
    total = params[0].new_zeros(sum(p.numel() for p in params))
    for chunk, values in _reward_chunks(reward, trajectories, chunk_steps):
        total += flat_grad([values], params, [coefficients[chunk.steps]])
    return total


def _reward_chunks(
    reward: nn.Module, trajectories: Trajectories, chunk_steps: int | None
) -> Iterator[tuple[Chunk, Tensor]]:
    check_chunk_steps(chunk_steps)
    own = next((p for p in reward.parameters() if p.requires_grad), next(reward.parameters(), None))
    _check_inputs(trajectories, own, "the reward's parameters")
    whole = takes_offsets(_unwrapped(reward).forward)
    for chunk in chunks(trajectories, chunk_steps, whole=whole):
        values = reward(chunk.observations, chunk.actions, **({"offsets": chunk.offsets} if whole else {}))
        count = chunk.end - chunk.start
        if not isinstance(values, Tensor) or values.shape != (count,):
            raise ValueError(f"reward(observations, actions) must return shape (T,) = ({count},), got {_came(values)}")
        if not values.is_floating_point():
            raise ValueError(f"reward(observations, actions) must return floating-point numbers, got {values.dtype}")
        require_finite("reward(observations, actions)", values.detach())
        yield chunk, values


def _came(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def check_policy_inputs(trajectories: Trajectories, params: list[Tensor]) -> None:
    """Refuse trajectories of another floating-point dtype, or on another device, than the policy's parameters."""
    _check_inputs(trajectories, params[0], "the policy's parameters")


def _check_inputs(trajectories: Trajectories, own: Tensor | None, owner: str) -> None:
    given = trajectories.observations
    if own is None:
        return
    if given.device != own.device or (given.is_floating_point() and given.dtype != own.dtype):
        raise ValueError(
            f"observations are {given.dtype} on {given.device}, but {owner} are {own.dtype} on {own.device}"
        )
