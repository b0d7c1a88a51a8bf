"""Curves of several runs in one picture, drawn from their metrics.csv."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RunFolderError
from ..pictures import pyplot, save_picture
from ..training.config import ALGORITHMS
from ..training.run_folder import RunFolder, read_metrics
from .statistics import aligned, bootstrap_iqm, interquartile_mean

SUCCESS = "success_rate"
COLOURS = {"oracle": "#555555", "pebble": "#0072B2", "surf": "#009E73", "a-parl": "#D55E00"}
"""Told apart by the colour-blind as well (Okabe and Ito 2008)."""

Rows = Sequence[Mapping[str, float]]
"""Of one metrics.csv; a column is left out of a row where it has no value."""
Curves = defaultdict[str, defaultdict[str, list[Rows]]]


def draw_runs(paths: Sequence[Path], output: Path) -> Path:
    """Draw the curves of several runs; `draw_curves` says how.

    Raises:
        RunFolderError: a path is no run folder, or no run has an evaluation yet, or the picture cannot be written.
    """
    curves: Curves = defaultdict(lambda: defaultdict(list))
    for path in paths:
        _, config = RunFolder.open(path)
        config.validate()
        rows = read_metrics(path)
        if not rows:
            print(f"parl: {path} has no evaluation yet and is left out", file=sys.stderr)
            continue
        curves[config.env][config.algorithm].append(rows)
    if not curves:
        raise RunFolderError("None of these runs has an evaluation yet")
    return draw_curves(curves, output)


def draw_curves(curves: Mapping[str, Mapping[str, Sequence[Rows]]], output: Path) -> Path:
    """A column per environment: the true return and, where one is reported, the success rate below it.

    Every run is a thin line; the interquartile mean of an algorithm's runs is a bold one with its 95% bootstrap band, at
    the steps that all of them have.

    Args:
        curves: environment -> algorithm -> the rows of each run's metrics.csv.
    """
    panels = [("true_return", "true return")]
    if any(SUCCESS in row for runs in curves.values() for rows in runs.values() for run in rows for row in run):
        panels.append((SUCCESS, "success rate"))
    figure, axes = pyplot().subplots(
        len(panels), len(curves), figsize=(6 * len(curves), 3.8 * len(panels)), squeeze=False, layout="constrained"
    )
    for place, (env, algorithms) in enumerate(sorted(curves.items())):
        axes[0, place].set_title(env, fontsize=10)
        for axis, (column, name) in zip(axes[:, place], panels, strict=True):
            for algorithm in sorted(algorithms, key=list(ALGORITHMS).index):
                _draw_algorithm(axis, algorithm, algorithms[algorithm], column)
            axis.set_xlabel("environment steps")
            axis.set_ylabel(name)
            axis.grid(alpha=0.3)
            if axis.has_data():
                axis.legend(fontsize=8)
                if axis.dataLim.y0 >= 0:
                    axis.set_ylim(bottom=0)
            else:
                axis.set_visible(False)
    return save_picture(figure, output)


def _draw_algorithm(axis: Any, algorithm: str, runs: Sequence[Rows], column: str) -> None:
    colour = COLOURS[algorithm]
    runs = [rows for rows in runs if any(column in row for row in rows)]
    if not runs:
        return
    label = algorithm if len(runs) == 1 else f"{algorithm} (IQM of {len(runs)} runs)"
    steps, values = aligned(runs, column)
    if len(runs) > 1:
        for rows in runs:
            shown = [row for row in rows if column in row]
            axis.plot(
                [row["step"] for row in shown], [row[column] for row in shown], color=colour, alpha=0.3, linewidth=0.8
            )
        band = bootstrap_iqm([values])
        axis.fill_between(steps, band.low, band.high, color=colour, alpha=0.15, linewidth=0)
    axis.plot(steps, interquartile_mean(values), color=colour, linewidth=2.2 if len(runs) > 1 else 1.2, label=label)
