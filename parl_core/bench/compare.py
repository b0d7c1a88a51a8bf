"""Two results side by side, with a verdict that knows how much the times of each scatter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, import_extra
from .results import Contest, Entry, Results, by_name
from .show import duration, number


@dataclass(frozen=True)
class Change:
    """What became of one contestant's time."""

    contest: Contest
    before: Entry
    after: Entry

    @property
    def ratio(self) -> float:
        """The time after over that before."""
        assert self.before.median is not None and self.after.median is not None
        return self.after.median / self.before.median

    @property
    def verdict(self) -> str:
        """Faster or slower only where the quartiles do not overlap."""
        before, after = self.before, self.after
        assert before.lower_quartile is not None and before.upper_quartile is not None
        assert after.lower_quartile is not None and after.upper_quartile is not None
        if after.upper_quartile < before.lower_quartile:
            return "faster"
        if after.lower_quartile > before.upper_quartile:
            return "slower"
        return "within noise"


def changes(before: Results, after: Results) -> tuple[list[Change], list[str]]:
    """Every contestant that was timed in both, and the names of what was timed in one of them only.

    Raises:
        ConfigError: nothing was.
    """
    old, new = dict(_timed(before)), dict(_timed(after))
    both = [Change(contest, old[key][1], entry) for key, (contest, entry) in new.items() if key in old]
    if not both:
        raise ConfigError("the two results have no contestant in common that was timed in both")
    return both, [" ".join(key) for key in [*old, *new] if (key in old) != (key in new)]


def _timed(results: Results) -> Iterator[tuple[tuple[str, str, str], tuple[Contest, Entry]]]:
    for (topic, name), contest in by_name(results.contests).items():
        for entry in contest.entries:
            if entry.median is not None:
                yield (topic, name, entry.name), (contest, entry)


def comparison(before: Results, after: Results) -> list[Any]:
    """What `rich` prints of `changes`, and of where the environments differ.

    Raises:
        ConfigError: nothing was timed in both.
        MissingExtraError: rich is not installed.
    """
    both, alone = changes(before, after)
    table = import_extra("rich.table", "train", needed_for="parl bench --compare").Table()
    for title in ("contest", "contestant"):
        table.add_column(title)
    for title in ("before", "after", "after / before"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    styles = {"faster": "green", "slower": "red"}
    for change in both:
        table.add_row(
            f"{change.contest.topic}: {change.contest.name}",
            change.after.name,
            duration(change.before.median),
            duration(change.after.median),
            number(change.ratio),
            change.verdict,
            style=styles.get(change.verdict),
        )
    lines = [table, *_differences(before, after)]
    if alone:
        lines.append(f"timed in one of the two only: {', '.join(alone)}")
    return lines


def _differences(before: Results, after: Results) -> list[str]:
    """A line for each fact of the environment that differs; what a comparison is meant to differ in comes last."""
    facts = dict.fromkeys([*before.environment, *after.environment])
    return [
        f"{fact}: {before.environment.get(fact)} before, {after.environment.get(fact)} after"
        for fact in sorted(facts, key=lambda fact: fact in ("commit", "dirty", "date"))
        if before.environment.get(fact) != after.environment.get(fact)
    ]
