"""A loop that looks from time to time whether it is over, also where it is captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor

from ...offsets import is_capturing


class Repeat(Protocol):
    """What `repeat` does."""

    def __call__(self, body: Callable[[], None], *, at_most: int, going: Tensor) -> None:
        """See `repeat`."""
        ...


def repeat(body: Callable[[], None], *, at_most: int, going: Tensor) -> None:
    """While the number `going` () is not 0, call `body`, which works in place, `at_most` times.

    The host waits for `going`, unless a CUDA graph is captured, which gets all of the calls. Within `repeating` another
    function does it.
    """
    if at_most:
        (_repeat.get() or _repeat_now)(body, at_most=at_most, going=going)


@contextmanager
def repeating(function: Repeat) -> Iterator[None]:
    """Within this context `repeat` is `function`."""
    token = _repeat.set(function)
    try:
        yield
    finally:
        _repeat.reset(token)


def _repeat_now(body: Callable[[], None], *, at_most: int, going: Tensor) -> None:
    for _ in range(at_most):
        if not is_capturing() and not bool(going):
            return
        body()


_repeat: ContextVar[Repeat | None] = ContextVar("parl_core_repeat", default=None)
