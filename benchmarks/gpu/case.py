"""A contest on a GPU as it is told before anything of it is computed, and what it needs when it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness import Absent, Floor, Peer
from benchmarks.harness.answers import Check
from benchmarks.harness.device import Clock
from parl_core.bench.results import Contest, Entry
from parl_core.ops import BackendError, support_table

Run = Callable[[], Any]
Make = Callable[[], Run]

BACKENDS = ("triton", "cuda", "reference")
KERNELS = ("triton", "cuda", "graph")
"""What the names of those of ours begin with that count for bars: a reference that is fast reaches none."""


@dataclass(frozen=True)
class Lab:
    """Where a case is set up."""

    device: torch.device
    clock: Clock


@dataclass(frozen=True)
class Setup:
    """The arguments of a contest; see `benchmarks.harness`."""

    check: Check
    ours: Mapping[str, Make]
    peers: Mapping[str, Make | Peer] = field(default_factory=dict)
    floor: Floor | None = None
    gradient: Make | None = None
    cold: bool = False
    """Whether the device's time is taken with empty caches, as where a call's traffic decides."""
    alone: bool = True
    """Whether there is a time on the device alone; not of what reads its outcome, or is a CUDA graph already."""
    unrecorded: tuple[str, ...] = ()
    """Contestants that have none since they read the device, or are a CUDA graph already. Trying costs: after it nothing
    else can be recorded."""


@dataclass(frozen=True)
class Bar:
    """What a contest must show: our best against the floor, against peers, or calls a second."""

    at_least: float
    floor: bool = False
    """The floor's time over ours, on the device: the share of the bandwidth, or of the rate."""
    peers: tuple[str, ...] = ()
    """The time of the best of these over ours."""
    work: float = 0.0
    """So many of something in a call, in a second."""
    on_device: bool = False
    """Whether the times of the device alone count, and not those of a call."""

    def measured(self, called: Contest, alone: Contest | None) -> float | str:
        """What is compared with `at_least`, of our kernels; or why it was not measured."""
        contest = alone if self.on_device or self.floor else called
        if contest is None:
            return "no times on the device"
        ours = best_of_ours(contest, KERNELS)
        if ours is None or ours.median is None:
            return "none of our kernels was timed"
        if self.floor:
            return "no floor" if ours.to_floor is None else 1.0 / ours.to_floor
        if not self.peers:
            return self.work / ours.median
        # The best of them may be the one that is missing.
        known = {entry.name: entry for entry in contest.entries}
        times = []
        for name in self.peers:
            entry = known.get(name)
            if entry is None or entry.median is None:
                return f"{name} {entry.withheld.partition(':')[0] if entry and entry.withheld else 'has no times'}"
            times.append(entry.median)
        return min(times) / ours.median

    def __str__(self) -> str:
        if self.floor:
            return f"≥ {100 * self.at_least:.0f}% of the floor's rate, on the device"
        where = ", on the device" if self.on_device else ""
        if self.peers:
            return f"≥ {self.at_least:g}× the best of {', '.join(self.peers)}{where}"
        return f"≥ {self.at_least:g} a second{where}"


@dataclass(frozen=True)
class Case:
    """A contest: its name, what it is about, and how it is set up."""

    topic: str
    name: str
    setup: Callable[[Lab], Setup]
    tests: tuple[str, ...]
    """Parts of the names of test files: where one of those is red, no time is told."""
    bars: tuple[Bar, ...] = ()
    op: str | None = None
    """The op whose choice of a backend it informs, as the registry names it."""
    size: int | None = None
    """The elements of the tensor that this choice looks at; None: the op has one rule for all sizes."""
    first: bool = False
    """Whether it stands for its bar before all others that have the same."""

    @property
    def id(self) -> str:
        """One for all cases."""
        return f"{self.topic} {self.name}"

    @property
    def rank(self) -> int:
        """Lower ones are run first: one case for each bar, then the others with bars, then those without."""
        return 0 if self.first else 1 if self.bars else 2


def best_of_ours(contest: Contest, names: tuple[str, ...] = ("",)) -> Entry | None:
    """By the median; None where none of ours, of those whose names begin with one of `names`, was timed."""
    ours = [entry for entry in contest.entries if entry.ours and entry.name.startswith(names)]
    timed = [entry for entry in ours if entry.median is not None]
    return min(timed, key=lambda entry: entry.median or 0.0, default=None)


def require(op: str, backend: str, device: torch.device) -> None:
    """For ops whose backend is told by a context, which leaves alone what it does not implement.

    Raises:
        BackendError: the op is not implemented in this backend, for float32 on this device.
    """
    if reason := support_table(device.type)[op][backend]:
        raise BackendError(f"{op}: {reason}")


def by_backend(make: Callable[[str], Run], backends: Sequence[str] = BACKENDS) -> dict[str, Make]:
    """Contestants named after the backends; what the op does not have is absent, and on a GPU all else is broken.

    On the CPU, in the role of a GPU, backends may be missing as well.
    """

    def maker(backend: str) -> Make:
        def run_of_backend() -> Run:
            try:
                run = make(backend)
                run()
            except BackendError as error:
                if torch.cuda.is_available() and "it does not implement" not in str(error):
                    raise
                raise Absent(str(error)) from error
            return run

        return run_of_backend

    return {backend: maker(backend) for backend in backends}
