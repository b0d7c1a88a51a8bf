"""From the runs of a comparison to its tables: what each algorithm reaches on each task, and what it takes to get there."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..results.tables import Table
from ..training.config import ALGORITHMS
from .statistics import aligned, area_under_curve, bootstrap_iqm, first_reached, interquartile_mean

SHARES = (50, 75, 90)
"""Per cent of what the Oracle ends at that a curve is watched for."""
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

    @property
    def final_success(self) -> float | None:
        """Success rate of its last evaluation; None where the environment reports no success."""
        return self.rows[-1].get("success_rate")


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
    that had been used by then, a mean over runs. `success_…` is the same of the success rate.
    """
    rows = []
    for env, algorithms in grouped(runs).items():
        oracle, success = _oracle_return(algorithms), _oracle_success(algorithms)
        for algorithm, group in algorithms.items():
            numbers = _numbers(group, oracle, success)
            rows.append({"env": env, "algorithm": algorithm, "runs": len(group), **numbers})
    return rows


def _oracle_return(algorithms: Mapping[str, Sequence[Run]]) -> float | None:
    """What returns are compared with; None where there is no Oracle, or none with a positive return."""
    return _goal([run.final_return for run in algorithms.get("oracle", ())])


def _oracle_success(algorithms: Mapping[str, Sequence[Run]]) -> float | None:
    """What success rates are compared with; None where there is no Oracle, or none that succeeds."""
    return _goal(_final_successes(algorithms.get("oracle", ())))


def _goal(finals: Sequence[float]) -> float | None:
    value = float(interquartile_mean(finals)) if finals else 0.0
    return value if value > 0 else None


def _final_successes(group: Sequence[Run]) -> list[float]:
    return [run.final_success for run in group if run.final_success is not None]


def _numbers(group: Sequence[Run], oracle: float | None, oracle_success: float | None) -> dict[str, Any]:
    finals, success = [run.final_return for run in group], _final_successes(group)
    interval = bootstrap_iqm([finals])
    rates = [run.steps_per_second for run in group if run.steps_per_second is not None]
    by_success = _what_it_takes(group, "success_rate", oracle_success)
    return {
        "final_mean": float(np.mean(finals)),
        "final_std": _deviation(finals),
        "final_iqm": float(interval.value),
        "final_iqm_low": float(interval.low),
        "final_iqm_high": float(interval.high),
        "percent_of_oracle": 100 * float(interval.value) / oracle if oracle else None,
        "area_under_curve": _mean_area(group, "true_return"),
        **_what_it_takes(group, "true_return", oracle),
        "success_mean": float(np.mean(success)) if success else None,
        "success_std": _deviation(success),
        "success_area_under_curve": _mean_area(group, "success_rate"),
        **{f"success_{name}": value for name, value in by_success.items()},
        "wall_seconds": float(np.mean([run.seconds for run in group])),
        "steps_per_second": float(np.mean(rates)) if rates else None,
    }


def _what_it_takes(group: Sequence[Run], column: str, goal: float | None) -> dict[str, float | None]:
    """Steps and labels to shares of `goal`; without one, or where it is never reached, None."""
    steps, values = aligned([run.rows for run in group], column)
    curve = interquartile_mean(values)
    reached = [first_reached(curve, goal * share / 100) if goal else None for share in SHARES]
    at = [None if index is None else int(steps[index]) for index in reached]
    return {
        **{f"steps_to_{share}": step for share, step in zip(SHARES, at, strict=True)},
        **{
            f"labels_to_{share}": None if step is None else _mean_labels(group, step)
            for share, step in zip(SHARES, at, strict=True)
        },
    }


def _mean_labels(group: Sequence[Run], step: int) -> float:
    return float(np.mean([row["labels"] for run in group for row in run.rows if row["step"] == step]))


def _mean_area(group: Sequence[Run], column: str) -> float | None:
    """Mean over the runs that have the column at all."""
    curves = [[(row["step"], row[column]) for row in run.rows if column in row] for run in group]
    areas = [area_under_curve(*zip(*curve, strict=True)) for curve in curves if curve]
    return float(np.mean(areas)) if areas else None


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def tables(runs: Sequence[Run]) -> list[Table]:
    """What is reached and what it costs, for every environment; over all of them as well if there are several."""
    rows = results(runs)
    made = []
    for env in dict.fromkeys(row["env"] for row in rows):
        of_env = [row for row in rows if row["env"] == env]
        made += [_reached_table(env, of_env), _cost_table(env, of_env)]
        if _reports_success(of_env):
            made.append(_success_table(env, of_env))
    overall = _overall_table(runs)
    return [*made, overall] if overall else made


def _reports_success(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(row["success_mean"] is not None for row in rows)


def _reached_table(env: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    return Table(
        title=f"{env}: true return",
        columns=(*("algorithm", "runs", "final, mean ± std", "IQM [95% CI]", "% of Oracle", "area under curve"),),
        rows=tuple(
            (
                row["algorithm"],
                str(row["runs"]),
                _with_deviation(row["final_mean"], row["final_std"]),
                f"{_number(row['final_iqm'])} [{_number(row['final_iqm_low'])}, {_number(row['final_iqm_high'])}]",
                _number(row["percent_of_oracle"], digits=0),
                _number(row["area_under_curve"]),
            )
            for row in rows
        ),
        note="Final: each run's last evaluation. IQM: interquartile mean over runs, with its bootstrap interval, too short "
        "where there are few runs. % of Oracle: of the IQMs, where the Oracle's is positive. Area under the curve of each "
        "run's evaluations, divided by the steps they span.",
    )


_SHARE_COLUMNS = (*(f"steps to {share}%" for share in SHARES), *(f"labels to {share}%" for share in SHARES))
_SHARES_NOTE = (
    "Steps and labels at the first evaluation at which the IQM over runs is at or above a share of the Oracle's final IQM, "
    f"without interpolation; {NOTHING} where it never is."
)


def _shares(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    return [_number(row[f"{prefix}{what}_to_{share}"], digits=0) for what in ("steps", "labels") for share in SHARES]


def _cost_table(env: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    return Table(
        title=f"{env}: what it takes",
        columns=("algorithm", *_SHARE_COLUMNS, "wall time", "env steps/s"),
        rows=tuple(
            (
                row["algorithm"],
                *_shares(row),
                clock(row["wall_seconds"]),
                _number(row["steps_per_second"], digits=0),
            )
            for row in rows
        ),
        note=f"{_SHARES_NOTE} Wall time of one run, a mean, beside the others.",
    )


def _success_table(env: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Apart from the return, which can rise without any success."""
    return Table(
        title=f"{env}: success rate",
        columns=("algorithm", "final, mean ± std", "area under curve", *_SHARE_COLUMNS),
        rows=tuple(
            (
                row["algorithm"],
                _percent(row["success_mean"], row["success_std"]),
                _percent(row["success_area_under_curve"]),
                *_shares(row, "success_"),
            )
            for row in rows
        ),
        note=f"Success: at any step of an episode. {_SHARES_NOTE}",
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


def _percent(share: float | None, deviation: float | None = None) -> str:
    if share is None:
        return NOTHING
    return f"{100 * share:.0f}%" + ("" if deviation is None else f" ± {100 * deviation:.0f}%")


def _number(value: float | None, digits: int | None = None) -> str:
    """With so many digits after the point, or as many as the value's size asks for."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value:.{_digits(value) if digits is None else digits}f}"


def _digits(value: float) -> int:
    return 1 if abs(value) >= 10 else 3
