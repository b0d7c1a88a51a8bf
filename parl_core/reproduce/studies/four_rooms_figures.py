"""Pictures of Four-Rooms: what the leader spends where, where the follower goes, and values by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...envs.tabular.problems.four_rooms import GOALS, MAP, START, TARGET
from ...pictures import pyplot
from ...results.csv_files import Row
from ..figures import COLOURS, panels, save_picture

if TYPE_CHECKING:
    from .four_rooms import Published


def draw_maps(rows: Sequence[Row], path: Path) -> Path:
    """Two maps for every cell of the table: incentives, and discounted visits, both on a logarithmic scale."""
    pyplot()
    from matplotlib.colors import LogNorm

    temperatures = sorted({row["temperature"] for row in rows})
    costs = sorted({row["cost"] for row in rows})
    kinds: dict[str, tuple[str, str, Any]] = {
        "incentive": ("incentive", "Reds", LogNorm(1e-4, 0.2)),
        "visits": ("discounted visits", "Blues", LogNorm(1e-3, 10.0)),
    }
    figure, axes = panels(len(temperatures), 2 * len(costs), width=2.1, height=2.25)
    images = {}
    for i, temperature in enumerate(temperatures):
        for j, cost in enumerate(costs):
            cell = [row for row in rows if row["temperature"] == temperature and row["cost"] == cost]
            for k, (kind, (_, colours, norm)) in enumerate(kinds.items()):
                picture = np.full((len(MAP), len(MAP[0])), np.nan)
                for row in cell:
                    picture[row["row"], row["column"]] = abs(row[kind])
                panel = axes[i][2 * j + k]
                floored = np.where(np.isnan(picture), np.nan, np.maximum(picture, norm.vmin))
                images[kind] = panel.imshow(floored, cmap=colours, norm=norm)
                panel.set_facecolor("0.35")
                panel.grid(False)
                panel.set_xticks([])
                panel.set_yticks([])
                for sign, (row_, column) in (("S", START), ("G", GOALS[0]), ("G", GOALS[1]), ("+", TARGET)):
                    panel.text(column, row_, sign, ha="center", va="center", fontsize=7, fontweight="bold")
                if k == 0:
                    panel.set_title(f"λ = {temperature:g}, c = {cost:g}", fontsize=9, loc="left")
    for kind, (label, _, _) in kinds.items():
        figure.colorbar(images[kind], ax=axes, label=label, aspect=40, fraction=0.02)
    return save_picture(figure, path)


def draw_curves(rows: Sequence[Row], published: Mapping[tuple[float, float], Published], path: Path) -> Path:
    """The exact objective by step in every cell, a colour for each method, seeds thin, with the best published value."""
    plt = pyplot()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    temperatures = sorted({row["temperature"] for row in rows})
    costs = sorted({row["cost"] for row in rows})
    figure, axes = panels(len(temperatures), len(costs), width=3.6, height=2.4)
    for i, temperature in enumerate(temperatures):
        for j, cost in enumerate(costs):
            panel = axes[i][j]
            panel.axhline(published[temperature, cost].best[0], color="0.4", linestyle="--", linewidth=1)
            for k, method in enumerate(methods):
                cell = [
                    row
                    for row in rows
                    if (row["method"], row["temperature"], row["cost"]) == (method, temperature, cost)
                ]
                for seed in sorted({row["seed"] for row in cell}):
                    line = [(row["step"], row["value"]) for row in cell if row["seed"] == seed]
                    panel.plot(*zip(*line, strict=True), color=COLOURS[k], linewidth=0.7, alpha=0.7)
            panel.set_title(f"λ = {temperature:g}, c = {cost:g}", fontsize=9)
            panel.tick_params(labelsize=7)
    for panel in axes[-1]:
        panel.set_xlabel("outer step", fontsize=8)
    for line_of_panels in axes:
        line_of_panels[0].set_ylabel("leader's value", fontsize=8)
    handles = [plt.Line2D([], [], color=COLOURS[k], label=method) for k, method in enumerate(methods)]
    handles.append(plt.Line2D([], [], color="0.4", linestyle="--", label="best published"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    return save_picture(figure, path)
