"""Pictures of the convergence study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...results.csv_files import Row
from ..figures import COLOURS, draw_seeds, panels, save_picture
from .fits import Fit


def draw_rate(runs: Mapping[int, Sequence[Row]], path: Path) -> Path:
    """T·mean‖∇L‖² by T, and mean‖∇L‖² beside the slope −1; a thin line for each problem, the median thick."""
    steps = np.array([row["steps"] for row in next(iter(runs.values()))])
    sums = np.array([[row["sum_squared_norms"] for row in rows] for rows in runs.values()])  # (seeds, T)
    figure, ((left, right),) = panels(1, 2)
    for axis, curves in ((left, sums), (right, sums / steps)):
        draw_seeds(axis, steps.tolist(), curves.tolist(), COLOURS[0], "median over problems")
        axis.set_xscale("log")
        axis.set_xlabel("upper steps T")
    left.set_title("T · mean‖∇L‖² stays bounded", fontsize=11)
    left.set_ylim(bottom=0)
    right.set_title("mean‖∇L‖² falls as 1/T", fontsize=11)
    right.set_yscale("log")
    right.plot(steps, 2.5 * sums.max() / steps, color="grey", linestyle="--", linewidth=1.2, label="slope −1")
    for axis in (left, right):
        axis.legend(fontsize=9)
    return save_picture(figure, path)


def draw_bias(problems: Mapping[int, Sequence[Row]], fits: Sequence[Fit], floors: Sequence[Row], path: Path) -> Path:
    """Bias of the hypergradient by K with its geometric fits, and ‖∇L‖ where cold- and warm-started runs end."""
    figure, ((left, right),) = panels(1, 2)
    for index, ((seed, rows), fit) in enumerate(zip(problems.items(), fits, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        steps = np.array([row["lower_steps"] for row in rows])
        left.plot(steps, [row["relative_bias"] for row in rows], color=colour, linewidth=1.8, label=f"seed {seed}")
        last = index == len(fits) - 1
        label = "fit, C · rate$^K$" if last else None
        left.plot(steps, fit.scale * fit.rate**steps, color="black", linestyle=":", linewidth=1.2, label=label)
        for start, style, words in (("cold", "o-", "anew from θ = 0"), ("warm", "--", "on from the last θ")):
            points = [
                (row["lower_steps"], row["gradient_norm"])
                for row in floors
                if row["seed"] == seed and row["start"] == start
            ]
            label = f"lower level {words}" if index == 0 else None
            right.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.5, markersize=3.5, label=label)
    left.set_ylim(1e-14, 10)
    left.set_title("Relative bias of the hypergradient at θ$^K$", fontsize=11)
    right.set_title(f"‖∇L‖ after {floors[0]['steps']} upper steps", fontsize=11)
    for axis in (left, right):
        axis.set_yscale("log")
        axis.set_xlabel("lower steps K")
        axis.legend(fontsize=9)
    return save_picture(figure, path)
