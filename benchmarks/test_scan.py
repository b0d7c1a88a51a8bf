"""Scans over (N trajectories × H steps), float32: in cache, where calls and threads count, and far beyond it.

Dense rows are what peers can do; ours are timed on the same data as ragged trajectories, too. The floor is the traffic
that the operation cannot avoid at the speed of a copy of large arrays: below it where the data fit a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import against, copy_floor
from benchmarks.peers import scans as peers
from benchmarks.peers.scans import DISCOUNT, LAMBDA, Problem, make_problem, reference
from parl_core.ops import available_backends, discounted_returns, gae, prefix_sum, td_lambda, vtrace

IN_CACHE = pytest.mark.parametrize("shape", [(64, 1000), (4096, 50)], ids=["64x1000", "4096x50"])
BEYOND = pytest.mark.parametrize("shape", [(32768, 1024)], ids=["32768x1024"])
RTOL = 1e-5  # of float32 recurrences whose memory is a hundred steps


def traffic(problem: Problem, arrays: int) -> Any:
    """The floor of so many arrays of steps read or written."""
    return copy_floor(arrays * problem.rewards.nbytes)


def right(problem: Problem, op: str) -> Callable[[Any], float]:
    """Rows or flat steps, against the float64 reference."""
    expected = reference(problem)[op]
    check = against(expected, RTOL)
    shape = problem.rewards.shape

    def error(answer: Any) -> float:
        return check([x.reshape(shape) for x in answer] if isinstance(expected, tuple) else answer.reshape(shape))

    return error


def ours(problem: Problem, op: Callable[..., Any], *names: str, **options: Any) -> dict[str, Any]:
    """`op` of the arrays called `names`: on rows, on ragged trajectories, and on rows in numba."""
    rows = [getattr(problem, name) for name in names]
    flat = [x.reshape(-1) for x in rows]

    def dense(backend: str | None) -> Callable[[], Callable[[], Any]]:
        return lambda: lambda: op(*rows, **options, backend=backend)

    contestants = {
        "parl-core": dense(None),
        "parl-core, ragged": lambda: lambda: op(*flat, **options, offsets=problem.offsets),
    }
    if "numba" in available_backends():
        contestants["parl-core, numba"] = dense("numba")
    return contestants


def numba(make: Callable[[Problem, bool], Any], problem: Problem) -> dict[str, Any]:
    return {"numba": lambda: make(problem, False), "numba, parallel": lambda: make(problem, True)}


@IN_CACHE
def test_returns(contest, shape):
    problem = make_problem(*shape)
    contest(
        right(problem, "returns"),
        ours=ours(problem, discounted_returns, "rewards", discount=DISCOUNT),
        peers={
            **numba(peers.numba_returns, problem),
            "SciPy": lambda: peers.scipy_returns(problem),
            "torchrl": lambda: peers.torchrl_returns(problem),
        },
        floor=traffic(problem, 2),
    )


@IN_CACHE
def test_prefix_sum(contest, shape):
    problem = make_problem(*shape)
    contest(
        right(problem, "prefix_sum"),
        ours=ours(problem, prefix_sum, "rewards"),
        peers={**numba(peers.numba_prefix_sum, problem), "torch.cumsum": lambda: lambda: problem.rewards.cumsum(1)},
        floor=traffic(problem, 2),
    )


@IN_CACHE
def test_gae(contest, shape):
    problem = make_problem(*shape)
    options: dict[str, Any] = {"discount": DISCOUNT, "gae_lambda": LAMBDA, "bootstrap": problem.bootstrap}
    contest(
        right(problem, "gae"),
        ours=ours(problem, gae, "rewards", "values", **options),
        peers={**numba(peers.numba_gae, problem), "torchrl": lambda: peers.torchrl_gae(problem)},
        floor=traffic(problem, 3),
    )


@IN_CACHE
def test_td_lambda(contest, shape):
    problem = make_problem(*shape)
    options: dict[str, Any] = {"discount": DISCOUNT, "trace_lambda": LAMBDA, "bootstrap": problem.bootstrap}
    contest(
        right(problem, "td_lambda"),
        ours=ours(problem, td_lambda, "rewards", "values", **options),
        peers={"torchrl": lambda: peers.torchrl_td_lambda(problem)},
        floor=traffic(problem, 3),
    )


@IN_CACHE
def test_vtrace(contest, shape):
    problem = make_problem(*shape)
    options: dict[str, Any] = {"discount": DISCOUNT, "bootstrap": problem.bootstrap}
    contest(
        right(problem, "vtrace"),
        ours=ours(problem, vtrace, "log_ratios", "rewards", "values", **options),
        peers={**numba(peers.numba_vtrace, problem), "torchrl": lambda: peers.torchrl_vtrace(problem)},
        floor=traffic(problem, 5),
    )


@IN_CACHE
def test_returns_and_gradient(contest, shape):
    """Forward and backward; the gradient of Σ y is the scan of ones in the other direction."""
    problem = make_problem(*shape)
    rewards = problem.rewards.clone().requires_grad_()
    ones = torch.ones_like(rewards)

    def run() -> Tensor:
        return torch.autograd.grad(discounted_returns(rewards, DISCOUNT), rewards, ones)[0]

    powers = DISCOUNT ** torch.arange(shape[1], dtype=torch.float64)
    contest(
        against(powers.cumsum(0).expand(shape), RTOL),
        ours={"parl-core": lambda: run},
        floor=traffic(problem, 4),
    )


@BEYOND
def test_beyond_the_cache_returns(contest, shape):
    """Outputs are allocated anew, which costs page faults; `clone` pays them too, and the kernel alone does not."""
    problem = make_problem(*shape)
    native = pytest.importorskip("parl_core._native")
    out = torch.zeros_like(problem.rewards)

    def kernel() -> Tensor:
        native.discounted_scan(problem.rewards, DISCOUNT, None, out, True, torch.get_num_threads())
        return out

    best = ours(problem, discounted_returns, "rewards", discount=DISCOUNT)
    contest(
        right(problem, "returns"),
        ours={**best, "parl-core, kernel alone": lambda: kernel},
        peers=numba(peers.numba_returns, problem),
        floor=traffic(problem, 2),
    )


@BEYOND
def test_beyond_the_cache_gae(contest, shape):
    problem = make_problem(*shape)
    native = pytest.importorskip("parl_core._native")
    out = torch.zeros_like(problem.rewards)
    tensors = (problem.rewards, problem.values, problem.bootstrap, None, out)

    def kernel() -> Tensor:
        native.lambda_returns(*tensors, DISCOUNT, LAMBDA, False, torch.get_num_threads())
        return out

    options: dict[str, Any] = {"discount": DISCOUNT, "gae_lambda": LAMBDA, "bootstrap": problem.bootstrap}
    contest(
        right(problem, "gae"),
        ours={**ours(problem, gae, "rewards", "values", **options), "parl-core, kernel alone": lambda: kernel},
        peers=numba(peers.numba_gae, problem),
        floor=traffic(problem, 3),
    )


@BEYOND
def test_beyond_the_cache_vtrace(contest, shape):
    problem = make_problem(*shape)
    native = pytest.importorskip("parl_core._native")
    outs = [torch.zeros_like(problem.rewards) for _ in range(2)]
    tensors = (problem.log_ratios, problem.rewards, problem.values, problem.bootstrap, None, *outs)

    def kernel() -> list[Tensor]:
        native.vtrace(*tensors, DISCOUNT, 1.0, 1.0, 1.0, torch.get_num_threads())
        return outs

    options: dict[str, Any] = {"discount": DISCOUNT, "bootstrap": problem.bootstrap}
    best = ours(problem, vtrace, "log_ratios", "rewards", "values", **options)
    contest(
        right(problem, "vtrace"),
        ours={**best, "parl-core, kernel alone": lambda: kernel},
        peers=numba(peers.numba_vtrace, problem),
        floor=traffic(problem, 5),
    )
