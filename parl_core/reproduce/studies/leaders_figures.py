"""Pictures of the study `leaders`."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from ...results.csv_files import Row, Rows
from ..figures import panels, save_picture
from .leaders import EXAMPLES, MAX_EXHAUSTIVE, METHODS, of, read_choice

COLOURS = dict(zip(METHODS, ("#D55E00", "#E69F00", "#CC79A7", "#0072B2"), strict=True))
DRAWN = ("exact", "direct-only")
"""Methods whose paths are drawn; those of all would hide one another."""
MAX_PATHS = 6
"""Starts of each method that are drawn."""


def draw_surfaces(rows: Rows, path: Path) -> Path:
    """The objective of each problem with one or two choices, the search's optimum, and paths of ascents."""
    shown = [name for name, example in EXAMPLES.items() if 0 < len(example.axes) <= MAX_EXHAUSTIVE]
    figure, (axes,) = panels(1, len(shown), width=5.0, height=4.4)
    for axis, name in zip(axes, shown, strict=True):
        example = EXAMPLES[name]
        surface, optimum = of(rows["surface"], name), of(rows["search"], name)[0]
        points = np.array([read_choice(row) for row in surface])
        values = np.array([row["value"] for row in surface])
        if len(example.axes) == 1:
            axis.plot(points[:, 0], values, color="black", linewidth=1.2)
            axis.set_ylabel("objective")
            place = [*read_choice(optimum), optimum["value"]]
        else:
            sides = [np.unique(column) for column in points.T]
            grid = values.reshape(len(sides[0]), len(sides[1])).T
            image = axis.pcolormesh(*sides, grid, cmap="viridis", shading="nearest", rasterized=True)
            axis.contour(*sides, grid, levels=12, colors="white", linewidths=0.4, alpha=0.6)
            figure.colorbar(image, ax=axis, label="objective")
            axis.set_ylabel(example.axes[1])
            place = read_choice(optimum)
        for method in DRAWN:
            _draw_paths(axis, of(rows["path"], name, method), method)
        axis.plot(*place, marker="*", markersize=15, color="white", markeredgecolor="black", linestyle="", zorder=5)
        axis.set_xlabel(example.axes[0])
        axis.set_title(example.title, fontsize=10)
    figure.axes[0].legend(fontsize=8, loc="upper right", title="○ start, □ end, ☆ optimum by search", title_fontsize=8)
    return save_picture(figure, path)


def _draw_paths(axis: Any, path: list[Row], method: str) -> None:
    label: str | None = METHODS[method].title
    for seed in sorted({row["seed"] for row in path})[:MAX_PATHS]:
        ascent = [row for row in path if row["seed"] == seed]
        places = np.array([(*read_choice(row), row["value"])[:2] for row in ascent])
        axis.plot(*places.T, color=COLOURS[method], linewidth=1.2, marker=".", markersize=3, label=label)
        axis.plot(*places[0], marker="o", markersize=6, color=COLOURS[method], markeredgecolor="white")
        axis.plot(*places[-1], marker="s", markersize=7, color=COLOURS[method], markeredgecolor="black", zorder=6)
        label = None


def draw_progress(rows: Rows, path: Path) -> Path:
    """The objective by step, mean over starts, between what the leader has without and the search's optimum."""
    figure, (axes,) = panels(1, len(EXAMPLES), width=4.0)
    for axis, (name, example) in zip(axes, EXAMPLES.items(), strict=True):
        optimum = of(rows["search"], name)[0]
        for rank, (method, (title, _)) in enumerate(METHODS.items()):
            by_step: dict[int, list[float]] = defaultdict(list)
            for row in of(rows["path"], name, method):
                by_step[row["step"]].append(row["value"])
            steps = sorted(by_step)
            low, mean, high = ([function(by_step[step]) for step in steps] for function in (np.min, np.mean, np.max))
            # the first on top and the thinnest, since several may reach the same
            axis.plot(
                steps, mean, color=COLOURS[method], linewidth=1.2 + 0.7 * rank, zorder=3.0 - 0.1 * rank, label=title
            )
            axis.fill_between(steps, low, high, color=COLOURS[method], alpha=0.12, linewidth=0)
        axis.axhline(optimum["value"], color="black", linestyle="--", linewidth=1, label="optimum by search")
        axis.axhline(
            optimum["without"], color="grey", linestyle=":", linewidth=1.2, label="without commitment or taxes"
        )
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(left=0)
        axis.set_xlabel("gradient steps")
        axis.set_title(example.title, fontsize=10)
    figure.axes[0].set_ylabel("objective: mean and range over starts")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=len(labels))
    return save_picture(figure, path)
