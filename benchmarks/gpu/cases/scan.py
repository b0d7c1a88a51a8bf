"""Scans, GAE and V-trace: rows and ragged trajectories, short and long, from 10³ to 10⁸ steps.

The floor is what must be read and written once, at the speed of a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.gpu.case import Bar, Case, Lab, Run, Setup, by_backend
from benchmarks.harness import Absent, agrees_with, copy_floor
from benchmarks.peers import scans_gpu as peers
from benchmarks.peers.scans_gpu import DISCOUNT, LAMBDA, Problem, make_problem, solution
from parl_core.ops import discounted_returns, gae, linear_recurrence, prefix_sum, vtrace

SHAPES = ((20, 50), (256, 64), (64, 1000), (2048, 1024), (98304, 1024), (4, 8388608))
"""Trajectories × steps, of GAE: where launches decide, where the traffic does, and where few trajectories must keep all
multiprocessors at work."""
FEW, RAGGED = ((256, 64), (2048, 1024), (98304, 1024)), ((4096, 50), (98304, 1024))
TINY = ((3, 70),)
LARGE = 1 << 24
"""Steps from which on no cache holds the data, and the bars hold."""
RTOL = 2e-5  # of float32 recurrences whose memory is a hundred steps
RTOL_OF_SUMS = 2e-4  # whose memory is the whole trajectory
_LOOP = 1024
"""The longest trajectory over which a loop in Python is tried."""


@dataclass(frozen=True)
class _Scan:
    op: str
    arrays: int
    """Read and written."""
    tests: tuple[str, ...]


_SCANS = {
    "returns": _Scan("discounted_returns, prefix_sum", 2, ("recurrence", "scan")),
    "gae": _Scan("gae, td_lambda", 3, ("gae", "td_lambda", "scan")),
    "vtrace": _Scan("vtrace", 5, ("vtrace", "scan")),
    "prefix_sum": _Scan("discounted_returns, prefix_sum", 2, ("recurrence", "scan")),
    "recurrence": _Scan("linear_recurrence", 3, ("recurrence", "scan")),
}


def cases(tiny: bool) -> list[Case]:
    """Rows, and trajectories of differing lengths."""
    found = []
    for name, scan in _SCANS.items():
        for ragged in (False, True):
            shapes = TINY if tiny else RAGGED if ragged else SHAPES if name == "gae" else FEW
            for number, steps in shapes:
                large = number * steps >= LARGE
                found.append(
                    Case(
                        topic="scan",
                        name=f"{name} {'ragged ' if ragged else ''}{number}x{steps}",
                        setup=partial(_setup, name, number, steps, ragged),
                        tests=(*scan.tests, "configurations"),
                        bars=(Bar(0.8, floor=True),) if large else (),
                        op=scan.op,
                        size=number * steps,
                        first=(name, ragged, (number, steps)) == ("gae", False, (98304, 1024)),
                    )
                )
    return found


def _setup(name: str, number: int, steps: int, ragged: bool, lab: Lab) -> Setup:
    problem = make_problem(number, steps, ragged=ragged, device=lab.device)
    return Setup(
        check=agrees_with(solution(problem, name), RTOL_OF_SUMS if name == "prefix_sum" else RTOL),
        ours=by_backend(lambda backend: _ours(problem, name, steps, backend)),
        peers={} if ragged else _peers(problem, name),
        floor=copy_floor(_SCANS[name].arrays * problem.rewards.nbytes, device=lab.device),
        cold=True,
        unrecorded=("reference",),  # it pads to the longest trajectory
    )


def _ours(problem: Problem, name: str, steps: int, backend: str) -> Run:
    # Trajectories that are cut anywhere are up to about ten times as long as on average.
    if backend == "reference" and steps * (1 if problem.offsets is None else 10) > _LOOP:
        raise Absent(f"the reference loops over time in Python; not tried beyond {_LOOP} steps")
    options: dict[str, Any] = {"offsets": problem.offsets, "backend": backend}
    rewards, values, bootstrap = problem.rewards, problem.values, problem.bootstrap
    calls: dict[str, Run] = {
        "returns": lambda: discounted_returns(rewards, DISCOUNT, **options),
        "prefix_sum": lambda: prefix_sum(rewards, **options),
        "recurrence": lambda: linear_recurrence(rewards, problem.links, reverse=True, **options),
        "gae": lambda: gae(rewards, values, DISCOUNT, LAMBDA, bootstrap=bootstrap, **options),
        "vtrace": lambda: vtrace(problem.log_ratios, rewards, values, DISCOUNT, bootstrap=bootstrap, **options),
    }
    return calls[name]


def _peers(problem: Problem, name: str) -> dict[str, Callable[[], Run]]:
    found: dict[str, Callable[[], Run]] = {}
    if name == "prefix_sum":
        found["torch.cumsum"] = lambda: lambda: problem.rewards.cumsum(1)
    if name in ("returns", "gae"):
        found["torch.compile of associative_scan"] = lambda: peers.compiled_associative_scan(problem, name)
        found["JAX associative_scan"] = lambda: peers.jax_associative_scan(problem, name)
    if problem.rewards.shape[1] <= _LOOP and name in ("returns", "gae", "vtrace"):
        found["torch, loop over time"] = lambda: peers.loop(problem, name)
    return found
