"""One contestant's turn."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

_TURN = 2e-3
"""Seconds that a turn lasts at least, so that reading the clock does not count."""
_REST = 3e-3
"""Seconds between turns: the workers of one thread pool spin for a while after it has finished, on the next one's cores."""
_SHORT = 0.02
"""Seconds below which the caches and the threads, cold after another's turn, would count: such a turn begins untimed."""


def seconds_per_call(run: Callable[[], Any], *, timer: Callable[[], float] = time.perf_counter) -> float:
    """The mean duration of a call in a turn of its own."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        time.sleep(_REST)
        start = timer()
        wait_for(run())
        first = timer() - start
        if first >= _SHORT:
            return first
        calls = max(1, math.ceil(_TURN / max(first, 1e-7)))
        start = timer()
        for _ in range(calls):
            wait_for(run())
        return (timer() - start) / calls
    finally:
        if enabled:
            gc.enable()


def wait_for(answer: Any) -> Any:
    """`answer`, once what is computed asynchronously (by JAX) has been computed."""
    for part in parts(answer):
        if hasattr(part, "block_until_ready"):
            part.block_until_ready()
    return answer


def parts(answer: Any) -> Sequence[Any]:
    """Of a tuple or list, or the answer as the only one."""
    return answer if isinstance(answer, tuple | list) else (answer,)
