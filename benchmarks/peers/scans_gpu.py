"""Scans on a GPU: the problem, its solution in float64 by doubling, and what one would write without this package.

Doubling (Hillis & Steele, Data parallel algorithms, 1986): y_h = x_h + c_h·y_{h+1} is made of ever longer pieces,
y_h += c_h·y_{h+s} and c_h *= c_{h+s} for s = 1, 2, 4, …; links between trajectories are zero from the start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Absent

from .jax_arrays import to_jax

DISCOUNT, LAMBDA = 0.99, 0.95
Run = Callable[[], Any]


@dataclass(frozen=True)
class Problem:
    """Rows (N, H), or, with offsets, trajectories one after another (T,); everything but those float32."""

    log_ratios: Tensor
    rewards: Tensor
    values: Tensor
    bootstrap: Tensor  # (N,)
    links: Tensor  # DISCOUNT everywhere
    offsets: Tensor | None  # (N+1,)


def make_problem(number: int, steps: int, *, ragged: bool, device: torch.device) -> Problem:
    """The same numbers for the same sizes; ragged ones are cut anywhere, so that some are long and some empty."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    shape = (number * steps,) if ragged else (number, steps)
    offsets = None
    if ragged:
        cuts = torch.randint(0, number * steps + 1, (number - 1,), generator=generator, device=device).sort().values
        offsets = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), number * steps)])
    rewards = normal(*shape)
    return Problem(
        log_ratios=normal(*shape).mul_(0.3),
        rewards=rewards,
        values=normal(*shape),
        bootstrap=normal(number),
        links=torch.full_like(rewards, DISCOUNT),
        offsets=offsets,
    )


def solution(problem: Problem, name: str) -> Tensor | tuple[Tensor, Tensor]:
    """Of "returns", "recurrence", "prefix_sum", "gae" or "vtrace"; flat, in float64."""
    rewards, values = problem.rewards.reshape(-1).double(), problem.values.reshape(-1).double()
    last, ends, rounds = _last_steps(problem)
    linked = (~last).double()
    if name in ("returns", "recurrence"):
        return doubled(rewards, DISCOUNT * linked, rounds)
    if name == "prefix_sum":
        return doubled(rewards.flip(0), linked.roll(1).flip(0), rounds).flip(0)
    bootstrap = torch.zeros_like(rewards)
    bootstrap[ends] = problem.bootstrap.double()[_lengths(problem) > 0]
    after = torch.where(last, bootstrap, values.roll(-1))
    errors = rewards + DISCOUNT * after - values
    if name == "gae":
        return doubled(errors, DISCOUNT * LAMBDA * linked, rounds)
    ratios = problem.log_ratios.reshape(-1).double().exp().clamp(max=1.0)
    targets = values + doubled(ratios * errors, DISCOUNT * ratios * linked, rounds)
    after = torch.where(last, bootstrap, targets.roll(-1))
    return targets, ratios * (rewards + DISCOUNT * after - values)


def _lengths(problem: Problem) -> Tensor:
    if problem.offsets is not None:
        return problem.offsets.diff()
    return problem.bootstrap.new_full(problem.bootstrap.shape, problem.rewards.shape[1], dtype=torch.int64)


def _last_steps(problem: Problem) -> tuple[Tensor, Tensor, int]:
    """Whether a step ends its trajectory, where those steps are, and how often to double."""
    lengths = _lengths(problem)
    ends = lengths.cumsum(0)[lengths > 0] - 1
    last = torch.zeros(problem.rewards.numel(), dtype=torch.bool, device=ends.device)
    last[ends] = True
    return last, ends, max(int(lengths.max()) - 1, 0).bit_length()


def doubled(x: Tensor, links: Tensor, rounds: int) -> Tensor:
    """y with y_t = x_t + links_t y_{t+1}, of up to 2^rounds steps that are linked."""
    for shift in (1 << k for k in range(rounds)):
        # Whoever lies further than the end is linked to nothing.
        x = torch.cat([x[:-shift] + links[:-shift] * x[shift:], x[-shift:]])
        links = torch.cat([links[:-shift] * links[shift:], torch.zeros_like(links[-shift:])])
    return x


# Peers, on rows.


def _after(problem: Problem) -> Tensor:
    return torch.cat([problem.values[:, 1:], problem.bootstrap[:, None]], dim=1)


def loop(problem: Problem, name: str) -> Run:
    """Backwards through time, a few small kernels for each step."""

    def returns() -> Tensor:
        carry, out = torch.zeros_like(problem.bootstrap), torch.empty_like(problem.rewards)
        for h in reversed(range(out.shape[1])):
            carry = problem.rewards[:, h] + DISCOUNT * carry
            out[:, h] = carry
        return out

    def gae() -> Tensor:
        errors = problem.rewards + DISCOUNT * _after(problem) - problem.values
        carry, out = torch.zeros_like(problem.bootstrap), torch.empty_like(errors)
        for h in reversed(range(out.shape[1])):
            carry = errors[:, h] + DISCOUNT * LAMBDA * carry
            out[:, h] = carry
        return out

    def vtrace() -> tuple[Tensor, Tensor]:
        ratios = problem.log_ratios.exp().clamp(max=1.0)
        errors = ratios * (problem.rewards + DISCOUNT * _after(problem) - problem.values)
        carry, targets = torch.zeros_like(problem.bootstrap), torch.empty_like(errors)
        for h in reversed(range(targets.shape[1])):
            carry = errors[:, h] + DISCOUNT * ratios[:, h] * carry
            targets[:, h] = problem.values[:, h] + carry
        after = torch.cat([targets[:, 1:], problem.bootstrap[:, None]], dim=1)
        return targets, ratios * (problem.rewards + DISCOUNT * after - problem.values)

    return {"returns": returns, "gae": gae, "vtrace": vtrace}[name]


def _combine(first: Any, second: Any) -> Any:
    """Of pieces (c, y) of a recurrence, `first` the one that is nearer to its beginning."""
    return first[0] * second[0], first[1] * second[0] + second[1]


def compiled_associative_scan(problem: Problem, name: str) -> Run:
    """torch's own primitive, which Inductor turns into one Triton kernel."""
    from torch._higher_order_ops.associative_scan import associative_scan

    if problem.rewards.device.type != "cuda":
        raise Absent("torch's associative_scan is compiled on GPUs only")

    def scan(x: Tensor, link: float) -> Tensor:
        pair = (torch.full_like(x, link), x)
        return associative_scan(_combine, pair, dim=1, reverse=True, combine_mode="pointwise")[1]

    def returns(rewards: Tensor, values: Tensor, after: Tensor) -> Tensor:
        return scan(rewards, DISCOUNT)

    def gae(rewards: Tensor, values: Tensor, after: Tensor) -> Tensor:
        return scan(rewards + DISCOUNT * after - values, DISCOUNT * LAMBDA)

    compiled = torch.compile({"returns": returns, "gae": gae}[name], dynamic=False)
    return lambda: compiled(problem.rewards, problem.values, _after(problem))


def jax_associative_scan(problem: Problem, name: str) -> Run:
    """jit of `jax.lax.associative_scan`."""
    import jax
    import jax.numpy as jnp

    def scan(x: Any, link: float) -> Any:
        return jax.lax.associative_scan(_combine, (jnp.full_like(x, link), x), reverse=True, axis=1)[1]

    @jax.jit
    def returns(rewards: Any, values: Any, bootstrap: Any) -> Any:
        return scan(rewards, DISCOUNT)

    @jax.jit
    def gae(rewards: Any, values: Any, bootstrap: Any) -> Any:
        after = jnp.concatenate([values[:, 1:], bootstrap[:, None]], axis=1)
        return scan(rewards + DISCOUNT * after - values, DISCOUNT * LAMBDA)

    function = {"returns": returns, "gae": gae}[name]
    arrays = to_jax([problem.rewards, problem.values, problem.bootstrap])
    return lambda: function(*arrays)
