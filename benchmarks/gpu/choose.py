"""Turns results into the table by which ops choose their backend on a GPU, parl_core/ops/choice.json.

Where Triton's and CUDA's times of a call are known at a size, the faster one is taken there; between two measured sizes that
differ, the border is their geometric mean. Several contests of one op and size count by the geometric mean of their ratios.
Ops without a measurement keep the rules they have.
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
    ratios: dict[str, dict[int | None, list[float]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        contest = known.get((case.topic, case.name))
        if case.op is not None and contest is not None and (ratio := _ratio(contest)) is not None:
            ratios[case.op][case.size].append(ratio)
    device, date = str(environment.get("gpu")), str(environment.get("date"))
    return {**table, **{op: _rules(by_size, device, date) for op, by_size in ratios.items()}}


def _ratio(contest: Contest) -> float | None:
    """Triton's time over CUDA's; None unless both were measured."""
    times = {entry.name: entry.median for entry in contest.entries if entry.ours and entry.median is not None}
    cuda, triton = (times.get(name) for name in DEFAULT_ORDER)
    return None if cuda is None or triton is None else triton / cuda


def _rules(by_size: Mapping[int | None, Sequence[float]], device: str, date: str) -> tuple[Rule, ...]:
    means = {size: math.exp(sum(map(math.log, ratios)) / len(ratios)) for size, ratios in by_size.items()}
    sizes = sorted(means, key=lambda size: size or 0)
    runs = [list(group) for _, group in groupby(sizes, key=lambda size: means[size] >= 1.0)]
    borders = [round(math.sqrt((one[-1] or 1) * (other[0] or 1))) for one, other in pairwise(runs)]
    rules = []
    for group, border in zip(runs, [*borders, None], strict=True):
        is_cuda = means[group[0]] >= 1.0
        advantages = [means[size] if is_cuda else 1.0 / means[size] for size in group]
        winner, loser = DEFAULT_ORDER if is_cuda else DEFAULT_ORDER[::-1]
        low, high = min(advantages), max(advantages)
        told = f"{low:.2f}" if len(group) == 1 else f"{low:.2f}–{high:.2f}"
        where = "" if group[0] is None else f" at {group[0]:,}" + (f" to {group[-1]:,}" if len(group) > 1 else "")
        because = f"{told} times as fast as {loser}{where}"
        rules.append(Rule(winner, because, border, device, date))
    return tuple(rules)
