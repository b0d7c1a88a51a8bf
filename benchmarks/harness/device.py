"""Clocks for contests on a device: what a call costs whoever makes it, and what it costs the device.

a call          between two synchronisations, over a train of calls: the longer of what the host needs to launch it and
                what the device needs to compute it. Data that fit the cache stay there.
on the device   calls recorded in a CUDA graph and replayed between two events: no host takes part. Where a contest asks
                for cold caches, each call is preceded by a read of twice the L2 cache, whose time, measured by itself, is
                taken off.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from .answers import Absent, Unrecordable, first_line
from .clock import parts, wait_for

Run = Callable[[], Any]

_TURN = 2e-3
"""Seconds that a turn lasts at least."""
_RECORDED = 2e-4
"""Seconds that a graph lasts at least, so that its launch does not count, or as long as `_MOST_CALLS` last."""
_MOST_CALLS = 32
_LONG = 1e-3
"""Seconds from which on it does not matter to a call what the caches hold at its beginning."""


class Clock(Protocol):
    """Of a device."""

    broken: bool
    """Whether only a new process can go on recording."""

    def running(self) -> Any:
        """The context in which contestants are made and run."""

    def a_call(self, run: Run) -> float:
        """Seconds per call, host and device together, in a turn of its own."""

    def recorded(self, run: Run, *, cold: bool) -> Run:
        """The function as `on_device` times it; called, it computes once and returns the answer.

        Raises:
            Absent: it cannot be recorded; `Unrecordable` where that was tried.
        """

    def on_device(self, run: Run) -> float:
        """Seconds per call of what `recorded` returned."""

    def peak_mib(self, call: Run) -> float | None:
        """MiB on the device at the peak of a call, beyond what was allocated before it."""


class HostClock:
    """The CPU in the role of a device, to try contests where there is none: nothing is recorded."""

    def __init__(self, turn: float = _TURN) -> None:
        self.broken = False
        self._turn = turn

    @contextmanager
    def running(self) -> Iterator[None]:
        yield

    def a_call(self, run: Run) -> float:
        return _train(run, lambda: None, self._turn)

    def recorded(self, run: Run, *, cold: bool) -> Run:
        return run

    def on_device(self, run: Run) -> float:
        return self.a_call(run)

    def peak_mib(self, call: Run) -> float | None:
        call()
        return None


class GpuClock:
    """An NVIDIA GPU. Everything runs on one stream that is not the default one, for that can be recorded."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._beyond_cache = torch.ones(2 * max(cache, 1 << 20) // 4, device=device)
        self._sum = torch.empty((), device=device)
        self.broken = False
        """Whether a recording has failed. torch then takes it for still under way, and no other can be made."""
        with self.running():
            self.clear_cache()  # once, so that no recording is the first to load its kernel

    @contextmanager
    def running(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def a_call(self, run: Run) -> float:
        return _train(run, lambda: torch.cuda.synchronize(self._device), _TURN)

    def recorded(self, run: Run, *, cold: bool) -> Run:
        if self.broken:
            raise Absent("the recording of something else failed before, which torch's allocator does not get over")
        answer = run()
        if any(hasattr(part, "block_until_ready") for part in parts(answer)):
            raise Absent("JAX launches on streams of its own, which a CUDA graph of torch does not see")
        return _Recording(self, run, cold)

    def on_device(self, run: Run) -> float:
        assert isinstance(run, _Recording)
        return run.seconds()

    def peak_mib(self, call: Run) -> float | None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        call()
        torch.cuda.synchronize(self._device)
        return round((torch.cuda.max_memory_allocated(self._device) - before) / 2**20, 2)

    def clear_cache(self) -> None:
        """Read more than the cache holds; written lines would have to be written back by whoever comes next."""
        torch.sum(self._beyond_cache, dim=0, out=self._sum)

    def record(self, run: Run) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of one call of `run`, and the answer that its replays write."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: other libraries' threads may allocate meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            answer = run()
        return graph, answer

    def seconds(self, run: Run, calls: int) -> float:
        """Between two events around so many calls."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(self._stream)
        for _ in range(calls):
            run()
        end.record(self._stream)
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls


class _Recording:
    """A function as CUDA graphs: of one call, which gives the answer, and of several, which is timed."""

    def __init__(self, clock: GpuClock, run: Run, cold: bool) -> None:
        self._clock = clock
        try:
            self._once, self._answer = clock.record(run)
            self._once.replay()
            first = clock.seconds(self._once.replay, 3)
            self._calls = max(1, min(_MOST_CALLS, math.ceil(_RECORDED / max(first, 1e-7))))
            self._before: list[Run] = [clock.clear_cache] if cold and first < _LONG else []
            several = self._before or self._calls > 1
            self._many = self._graph(run) if several else self._once
            self._clearing = self._graph() if self._before else None
            self._many.replay()
            self._replays = max(1, math.ceil(_TURN / clock.seconds(self._many.replay, 1)))
        except Exception as error:
            clock.broken = True
            torch.cuda.synchronize()
            raise Unrecordable(f"no CUDA graph can hold it ({type(error).__name__}: {first_line(error)})") from error

    def __call__(self) -> Any:
        self._once.replay()
        return self._answer

    def seconds(self) -> float:
        """Per call."""
        total = self._clock.seconds(self._many.replay, self._replays)
        if self._clearing is not None:
            total -= self._clock.seconds(self._clearing.replay, self._replays)
        return max(total, 1e-9) / self._calls

    def _graph(self, *runs: Run) -> torch.cuda.CUDAGraph:
        """Of all calls, each after what comes before it."""

        def calls() -> None:
            for _ in range(self._calls):
                for run in (*self._before, *runs):
                    run()

        return self._clock.record(calls)[0]


def _train(run: Run, synchronize: Callable[[], None], turn: float) -> float:
    enabled = gc.isenabled()
    gc.disable()
    try:
        synchronize()
        start = time.perf_counter()
        wait_for(run())
        synchronize()
        first = time.perf_counter() - start
        if first >= 10 * turn:
            return first
        calls = max(1, math.ceil(turn / max(first, 1e-7)))
        start = time.perf_counter()
        for _ in range(calls - 1):
            run()
        wait_for(run())
        synchronize()
        return (time.perf_counter() - start) / calls
    finally:
        if enabled:
            gc.enable()
