"""Calling the user's policy and reward: where trajectories begin, and chunk by chunk.

A module whose method takes a parameter named `offsets` sees trajectories, not only steps: it is given the (N+1,) int64
offsets of the steps it is called on, by keyword, so that a recurrent network or a transformer knows where each begins.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..trajectories import Trajectories, require_finite
from .flat import differentiating, flat_grad


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


def evaluate_reward(reward: nn.Module, trajectories: Trajectories) -> Tensor:
    """(T,) rewards of all steps in one call, differentiable, checked for shape and finiteness."""
    whole = [values for _, values in reward_chunks(reward, trajectories, None)]
    return whole[0] if whole else trajectories.weights.new_zeros(0)


def reward_values(reward: nn.Module, trajectories: Trajectories, *, chunk_steps: int | None = None) -> Tensor:
    """(T,) rewards of all steps without a graph, called on at most `chunk_steps` steps at once.

    A reward that takes `offsets` is called on whole trajectories.

    Raises:
        TypeError, ValueError: a wrong `chunk_steps`, or a reward of the wrong shape, dtype or device.
        NonFiniteError: a reward is NaN or infinite.
    """
    with torch.no_grad():
        parts = reward_chunks(reward, trajectories, chunk_steps)
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
    for chunk, values in reward_chunks(reward, trajectories, chunk_steps):
        total += flat_grad([values], params, [coefficients[chunk.steps]])
    return total


def reward_chunks(
    reward: nn.Module, trajectories: Trajectories, chunk_steps: int | None
) -> Iterator[tuple[Chunk, Tensor]]:
    """Each chunk with its rewards (n,), checked for shape, dtype and finiteness."""
    check_chunk_steps(chunk_steps)
    own = next((p for p in reward.parameters() if p.requires_grad), next(reward.parameters(), None))
    _check_inputs(trajectories, own, "the reward's parameters")
    whole = takes_offsets(_unwrapped(reward).forward)
    for chunk in chunks(trajectories, chunk_steps, whole=whole):
        values = reward(chunk.observations, chunk.actions, **({"offsets": chunk.offsets} if whole else {}))
        count = chunk.end - chunk.start
        if not isinstance(values, Tensor) or values.shape != (count,):
            raise ValueError(f"reward(observations, actions) must return shape (T,) = ({count},), got {came(values)}")
        if not values.is_floating_point():
            raise ValueError(f"reward(observations, actions) must return floating-point numbers, got {values.dtype}")
        since = f", from step {chunk.start} on," if chunk.start else ""
        require_finite(f"reward(observations, actions){since}", values.detach())
        yield chunk, values


def came(value: object) -> str:
    """What a call returned, for a message: a tensor's shape or another object's type."""
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
