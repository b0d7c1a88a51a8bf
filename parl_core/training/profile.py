"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.table import Table
from torch import Tensor

SECTIONS = (
    "simulator",
    "policy",
    "reward",
    "SAC update",
    "exploration",
    "replay",
    "queries",
    "reward learning",
    "hypergradient",
    "relabelling",
    "evaluation",
    "logging",
    "checkpoints",
)
"""What `Profile.section` may be asked for, in the order of the table."""


class Profile:
    """Wall-clock seconds by section. Within a section that is entered inside another, only the inner one's clock runs."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        self._open: list[_Section] = []
        self._since = 0.0
        self._sections = {name: _Section(self, name) for name in SECTIONS}

    def section(self, name: str) -> _Section:
        """A context manager; what passes within it counts as `name`, one of `SECTIONS`."""
        return self._sections[name]

    def timed(self, name: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The function, whose time counts as `name`."""

        def wrapped(value: Tensor) -> Tensor:
            with self.section(name):
                return function(value)

        return wrapped


class _Section:
    """Entered tens of times in a step, hence no generator."""

    __slots__ = ("name", "profile")

    def __init__(self, profile: Profile, name: str) -> None:
        self.profile, self.name = profile, name

    def __enter__(self) -> None:
        profile, now = self.profile, time.perf_counter()
        if profile._open:
            profile.seconds[profile._open[-1].name] += now - profile._since
        profile._open.append(self)
        profile._since = now

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        profile, now = self.profile, time.perf_counter()
        profile._open.pop()
        profile.seconds[self.name] += now - profile._since
        profile._since = now


def profile_table(seconds: Mapping[str, float], total: float, steps: int) -> Table:
    """Seconds by section as a table, with their share of `total` seconds and the time per environment step."""
    table = Table(title=f"{steps / total:.0f} environment steps/s: {steps} in {total:.1f} s")
    for column in ("", "seconds", "share", "µs a step"):
        table.add_column(column, justify="left" if not column else "right")
    named = {name: value for name, value in seconds.items() if value > 0.0}
    for name, value in {**named, "everything else": max(total - sum(named.values()), 0.0)}.items():
        table.add_row(name, f"{value:.2f}", f"{100 * value / total:.1f}%", f"{1e6 * value / steps:.1f}")
    return table
