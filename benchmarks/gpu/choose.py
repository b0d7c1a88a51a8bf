"""Turns results into the table by which ops choose their backend on a GPU, parl_core/ops/choice.json.

At every measured size the backend with the shortest call is taken; between two sizes that differ, the border is their
geometric mean. Several contests of one op and size count by the geometric means of their times. Ops of which at most one
backend was measured keep the rules they have.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

from parl_core.bench.results import Contest, by_name
from parl_core.ops.choice import DEFAULT_ORDER, Rule

from .case import Case

_Times = dict[str, float]
"""Seconds by backend."""


def choose(
    table: Mapping[str, tuple[Rule, ...]],
    cases: Sequence[Case],
    contests: Sequence[Contest],
    environment: Mapping[str, Any],
) -> dict[str, tuple[Rule, ...]]:
    """The table with the rules of all ops that were measured.

    Args:
        table: as it is.
        cases: say which op and which size a contest is about.
        contests, environment: of the results.
    """
    known = by_name(contests)
    measured: dict[str, dict[int | None, list[_Times]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        contest = known.get((case.topic, case.name))
        if case.op is not None and contest is not None and len(times := _times(contest)) > 1:
            measured[case.op][case.size].append(times)
    device, date = str(environment.get("gpu")), str(environment.get("date"))
    return {**table, **{op: _rules(by_size, device, date) for op, by_size in measured.items()}}


def _times(contest: Contest) -> _Times:
    """Of a call, by backend."""
    backends = (*DEFAULT_ORDER, "reference")
    entries = [entry for entry in contest.entries if entry.ours and entry.name in backends]
    return {entry.name: entry.median for entry in entries if entry.median is not None}


def _rules(by_size: Mapping[int | None, Sequence[_Times]], device: str, date: str) -> tuple[Rule, ...]:
    means = {size: _means(times) for size, times in sorted(by_size.items(), key=lambda item: item[0] or 0)}
    best = {size: min(times, key=lambda name: times[name]) for size, times in means.items()}
    runs = [(winner, list(sizes)) for winner, sizes in groupby(means, key=lambda size: best[size])]
    borders = [round(math.sqrt((one[-1] or 1) * (other[0] or 1))) for (_, one), (_, other) in pairwise(runs)]
    rules = []
    for (winner, sizes), border in zip(runs, [*borders, None], strict=True):
        because = "; ".join(dict.fromkeys(_advantage(means[size], winner, size) for size in (sizes[0], sizes[-1])))
        rules.append(Rule(winner, because, border, device, date))
    return tuple(rules)


def _means(contests: Sequence[_Times]) -> _Times:
    """Geometric ones, of the backends that took part in all of the contests."""
    names = [name for name in contests[0] if all(name in times for times in contests)]
    return {name: math.exp(sum(math.log(times[name]) for times in contests) / len(contests)) for name in names}


def _advantage(times: _Times, winner: str, size: int | None) -> str:
    others = {name: seconds for name, seconds in times.items() if name != winner}
    where = "" if size is None else f" at {size:,}"
    if not others:
        return f"alone{where}"
    second = min(others, key=lambda name: others[name])
    return f"{others[second] / times[winner]:.2f} times as fast as {second}{where}"
