"""Contests as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import import_extra
from .results import Contest, Entry


def contest_table(contest: Contest) -> list[Any]:
    """What `rich` prints of a contest: a table, the fastest contestant first, and lines on what it cannot show.

    Raises:
        MissingExtraError: rich is not installed.
    """
    table_class = import_extra("rich.table", "train", needed_for="a table of benchmarks").Table
    timed = sorted(
        (entry for entry in contest.entries if entry.median is not None), key=lambda entry: entry.median or 0
    )
    columns = _columns(contest)
    table = table_class(title=f"{contest.topic}: {contest.name}", title_justify="left", title_style="bold")
    table.add_column("contestant", no_wrap=True)
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for entry in timed:
        name = entry.name + (" *" if entry.limited else "")
        style = "bold" if entry is contest.fastest else None
        table.add_row(name, *(cell(entry) for _, cell in columns), style=style)
    return [table, *_remarks(contest)]


def _remarks(contest: Contest) -> list[str]:
    lines = [f"* {limit}" for limit in dict.fromkeys(entry.limited for entry in contest.entries) if limit]
    if contest.floor is not None:
        lines.append(f"floor {duration(contest.floor)}: {contest.floor_of}")
    if contest.gradient is not None:
        lines.append(f"gradient {duration(contest.gradient)}: one forward and backward pass")
    return lines + [f"{entry.name}: {entry.withheld}" for entry in contest.entries if entry.withheld is not None]


def _columns(contest: Contest) -> list[tuple[str, Any]]:
    """Titles and what makes an entry's cell, of the columns that some entry fills."""
    columns: list[tuple[str, Any]] = [
        ("median", lambda entry: duration(entry.median)),
        ("quartiles", _quartiles),
        ("vs best peer", lambda entry: times(entry.speedup)),
        ("vs best without *", lambda entry: times(entry.speedup_unlimited)),
        ("× floor", lambda entry: number(entry.to_floor)),
        ("gradients", lambda entry: number(entry.gradients)),
        ("peak MiB", lambda entry: number(entry.peak_mib)),
    ]
    return [(title, cell) for title, cell in columns if any(cell(entry) for entry in contest.entries)]


def _quartiles(entry: Entry) -> str:
    if entry.lower_quartile is None:
        return ""
    return f"{duration(entry.lower_quartile)} – {duration(entry.upper_quartile)}"


def summary(contests: Sequence[Contest]) -> str:
    """One line: how many contests, in how many ours is the fastest, and what went wrong."""
    raced = [contest for contest in contests if contest.fastest is not None]
    won = sum(contest.fastest.ours for contest in raced if contest.fastest is not None)
    failed = [contest.name for contest in contests if contest.broken]
    noun = "contest" if len(contests) == 1 else "contests"
    line = f"{len(contests)} {noun}; parl-core is the fastest in {won} of {len(raced)}"
    return line + (f"; wrong or broken: {', '.join(failed)}" if failed else "")


def duration(seconds: float | None) -> str:
    """Three digits, in µs, ms or s."""
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds * 1e6)} µs"


def times(ratio: float | None) -> str:
    """A speed-up, as 1.8×."""
    return "" if ratio is None else f"{number(ratio)}×"


def number(value: float | None) -> str:
    """Three digits without an exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
