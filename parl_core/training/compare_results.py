"""From the runs of a comparison to its tables: what each algorithm reaches on each task, and what it takes to get there."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..reproduce.study import Table
from .config import ALGORITHMS
from .statistics import aligned, area_under_curve, bootstrap_iqm, first_reached, interquartile_mean

SHARES = (50, 75, 90)
"""Per cent of the Oracle's final return that a curve is watched for."""
NOTHING = "–"


@dataclass(frozen=True)
class Run:
    """One run of a comparison that is done."""

    env: str
    algorithm: str
    seed: int
    rows: Sequence[Mapping[str, float]]
    """Of its metrics.csv; a column is left out of a row where it has no value."""
    sittings: Sequence[Mapping[str, Any]]
    """Each time it was worked on: where and with what, `from_step`, `to_step` and the `seconds` between them."""

    @property
    def name(self) -> str:
        """Of its folder, among the runs of the comparison."""
        return run_name(self.env, self.algorithm, self.seed)

    @property
    def seconds(self) -> float:
        """Wall time of its training loop, evaluations included."""
        return sum(sitting["seconds"] for sitting in self.sittings)

    @property
    def steps_per_second(self) -> float | None:
        """Environment steps over that time; None where none was measured."""
        steps = sum(sitting["to_step"] - sitting["from_step"] for sitting in self.sittings)
        return steps / self.seconds if steps and self.seconds else None

    @property
    def final_return(self) -> float:
        """True return of its last evaluation."""
        return self.rows[-1]["true_return"]


def run_name(env: str, algorithm: str, seed: int) -> str:
    """Of a run of a comparison."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', env)}_{algorithm}_seed{seed}"


Grouped = dict[str, dict[str, list[Run]]]


def grouped(runs: Sequence[Run]) -> Grouped:
    """Environment -> algorithm -> runs by seed; algorithms in the order in which they are known."""
    groups: Grouped = {}
    order = list(ALGORITHMS)
    for run in sorted(runs, key=lambda run: (run.env, order.index(run.algorithm), run.seed)):
        groups.setdefault(run.env, {}).setdefault(run.algorithm, []).append(run)
    return groups


def results(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row of numbers for every algorithm on every environment; None where a number does not exist.

    `final` is the return of the last evaluation: its mean, its standard deviation over runs (ddof 1), its interquartile
    mean with a 95% bootstrap interval. `percent_of_oracle` compares the interquartile means. `area_under_curve` is the mean
    return over the evaluations' span of steps, averaged over runs. `steps_to_50` is the first step at which the
    interquartile mean of the runs' returns is at or above half of the Oracle's final one, `labels_to_50` the labels
    that had been used by then, a mean over runs.
    """
    rows = []
    for env, algorithms in grouped(runs).items():
        oracle = _oracle_return(algorithms)
        for algorithm, group in algorithms.items():
            rows.append({"env": env, "algorithm": algorithm, "runs": len(group), **_numbers(group, oracle)})
    return rows


def _oracle_return(algorithms: Mapping[str, Sequence[Run]]) -> float | None:
    """What returns are compared with; None where there is no Oracle, or none with a positive return."""
    if "oracle" not in algorithms:
        return None
    value = float(interquartile_mean([run.final_return for run in algorithms["oracle"]]))
    return value if value > 0 else None


def _numbers(group: Sequence[Run], oracle: float | None) -> dict[str, Any]:
    finals = [run.final_return for run in group]
    interval = bootstrap_iqm([finals])
    steps, returns = aligned([run.rows for run in group], "true_return")
    labels = aligned([run.rows for run in group], "labels")[1].mean(axis=0)
    curve = interquartile_mean(returns)
    reached = {share: first_reached(curve, oracle * share / 100) if oracle else None for share in SHARES}
    success = [run.rows[-1]["success_rate"] for run in group if "success_rate" in run.rows[-1]]
    rates = [run.steps_per_second for run in group if run.steps_per_second is not None]
    return {
        "final_mean": float(np.mean(finals)),
        "final_std": _deviation(finals),
        "final_iqm": float(interval.value),
        "final_iqm_low": float(interval.low),
        "final_iqm_high": float(interval.high),
        "percent_of_oracle": 100 * float(interval.value) / oracle if oracle else None,
        "area_under_curve": float(np.mean([_area(run) for run in group])),
        **{f"steps_to_{share}": None if at is None else int(steps[at]) for share, at in reached.items()},
        **{f"labels_to_{share}": None if at is None else float(labels[at]) for share, at in reached.items()},
        "success_mean": float(np.mean(success)) if success else None,
        "success_std": _deviation(success),
        "wall_seconds": float(np.mean([run.seconds for run in group])),
        "steps_per_second": float(np.mean(rates)) if rates else None,
    }


def _area(run: Run) -> float:
    return area_under_curve([row["step"] for row in run.rows], [row["true_return"] for row in run.rows])


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def tables(runs: Sequence[Run]) -> list[Table]:
    """What is reached and what it costs, for every environment; over all of them as well if there are several."""
    rows = results(runs)
    made = []
    for env in dict.fromkeys(row["env"] for row in rows):
        of_env = [row for row in rows if row["env"] == env]
        made += [_reached_table(env, of_env), _cost_table(env, of_env)]
    overall = _overall_table(runs)
    return [*made, overall] if overall else made


def _reached_table(env: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    with_success = any(row["success_mean"] is not None for row in rows)
    return Table(
        title=f"{env}: true return",
        columns=(
            *("algorithm", "runs", "final, mean ± std", "IQM [95% CI]", "% of Oracle", "area under curve"),
            *(["success"] if with_success else []),
        ),
        rows=tuple(
            (
                row["algorithm"],
                str(row["runs"]),
                _with_deviation(row["final_mean"], row["final_std"]),
                f"{_number(row['final_iqm'])} [{_number(row['final_iqm_low'])}, {_number(row['final_iqm_high'])}]",
                _number(row["percent_of_oracle"], digits=0),
                _number(row["area_under_curve"]),
                *([_success(row)] if with_success else []),
            )
            for row in rows
        ),
        note="Final: each run's last evaluation. IQM: interquartile mean over runs, with its bootstrap interval, too short "
        "where there are few runs. % of Oracle: of the IQMs, where the Oracle's is positive. Area under the curve of each "
        "run's evaluations, divided by the steps they span."
        + (" Success: at any step of an episode." if with_success else ""),
    )


def _cost_table(env: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    def reached(what: str, row: Mapping[str, Any]) -> list[str]:
        return [_number(row[f"{what}_to_{share}"], digits=0) for share in SHARES]

    return Table(
        title=f"{env}: what it takes",
        columns=(
            *("algorithm", *(f"steps to {share}%" for share in SHARES), *(f"labels to {share}%" for share in SHARES)),
            *("wall time", "env steps/s"),
        ),
        rows=tuple(
            (
                row["algorithm"],
                *reached("steps", row),
                *reached("labels", row),
                clock(row["wall_seconds"]),
                _number(row["steps_per_second"], digits=0),
            )
            for row in rows
        ),
        note="Steps and labels at the first evaluation at which the IQM over runs is at or above a share of the Oracle's "
        f"final IQM, without interpolation; {NOTHING} where it never is. Wall time of one run, a mean, beside the others.",
    )


def _overall_table(runs: Sequence[Run]) -> Table | None:
    """Over several environments, each normalised by its Oracle; None where that cannot be."""
    groups = grouped(runs)
    oracles = {env: _oracle_return(algorithms) for env, algorithms in groups.items()}
    if len(groups) < 2 or None in oracles.values():
        return None
    rows = []
    for algorithm in ALGORITHMS:
        scores = [
            [100 * run.final_return / (oracles[env] or math.nan) for run in algorithms[algorithm]]
            for env, algorithms in groups.items()
            if algorithm in algorithms
        ]
        if len(scores) == len(groups):
            value, low, high = (_number(float(number)) for number in bootstrap_iqm(scores))
            rows.append((algorithm, str(sum(map(len, scores))), f"{value} [{low}, {high}]"))
    return Table(
        title=f"All {len(groups)} environments: % of the Oracle's final return",
        columns=("algorithm", "runs", "IQM [95% CI]"),
        rows=tuple(rows),
        note="Over the runs of all environments, each divided by the IQM of its environment's Oracle; the bootstrap draws "
        "runs within environments and takes the Oracle as given.",
    )


def clock(seconds: float) -> str:
    """A duration in words, to two units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _with_deviation(mean: float, deviation: float | None) -> str:
    digits = _digits(mean)
    return _number(mean) if deviation is None else f"{_number(mean)} ± {_number(deviation, digits)}"


def _success(row: Mapping[str, Any]) -> str:
    if row["success_mean"] is None:
        return NOTHING
    mean = f"{100 * row['success_mean']:.0f}%"
    return mean if row["success_std"] is None else f"{mean} ± {100 * row['success_std']:.0f}%"


def _number(value: float | None, digits: int | None = None) -> str:
    """With so many digits after the point, or as many as the value's size asks for."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value:.{_digits(value) if digits is None else digits}f}"


def _digits(value: float) -> int:
    return 1 if abs(value) >= 10 else 3
