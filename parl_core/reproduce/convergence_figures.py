"""Pictures of the convergence study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import import_extra
from .fits import Fit
from .study import Row

_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")


def draw_rate(runs: Mapping[int, Sequence[Row]], path: Path) -> Path:
    """T·mean‖∇L‖² by T, and mean‖∇L‖² beside the slope −1; a thin line for each problem, the median thick."""
    pyplot = import_extra("matplotlib.pyplot", "train", needed_for="a figure")
    steps = np.array([row["steps"] for row in next(iter(runs.values()))])
    sums = np.array([[row["sum_squared_norms"] for row in rows] for rows in runs.values()])  # (seeds, T)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8))
    for axis, curves in ((left, sums), (right, sums / steps)):
        for index, curve in enumerate(curves):
            axis.plot(
                steps, curve, color=_colour(index), linewidth=1, alpha=0.7, label=None if index else "one problem"
            )
        axis.plot(steps, np.median(curves, axis=0), color="black", linewidth=2.2, label="median")
        axis.set_xscale("log")
        axis.set_xlabel("upper steps T")
        axis.grid(alpha=0.3)
    left.set_title("T · mean‖∇L‖² stays bounded", fontsize=11)
    left.set_ylim(bottom=0)
    right.set_title("mean‖∇L‖² falls as 1/T", fontsize=11)
    right.set_yscale("log")
    guide = 2.5 * float(np.max(sums[:, -1]))
    right.plot(steps, guide / steps, color="grey", linestyle="--", linewidth=1.2, label="slope −1")
    for axis in (left, right):
        axis.legend(fontsize=9)
    return _save(pyplot, figure, path)


def draw_bias(problems: Mapping[int, Sequence[Row]], fits: Sequence[Fit], floors: Sequence[Row], path: Path) -> Path:
    """Bias of the hypergradient by K with its geometric fits, and ‖∇L‖ where cold- and warm-started runs end."""
    pyplot = import_extra("matplotlib.pyplot", "train", needed_for="a figure")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8))
    for index, (seed, rows) in enumerate(problems.items()):
        steps = np.array([row["lower_steps"] for row in rows])
        left.plot(
            steps, [row["relative_bias"] for row in rows], color=_colour(index), linewidth=1.8, label=f"seed {seed}"
        )
        fitted = fits[index].scale * fits[index].rate ** steps
        left.plot(steps, fitted, color="black", linestyle=":", linewidth=1, label=None if index else "C · rate^K")
        own = [row for row in floors if row["seed"] == seed]
        for start, style, width in (("cold", "-", 1.8), ("warm", "--", 1.2)):
            points = [(row["lower_steps"], row["gradient_norm"]) for row in own if row["start"] == start]
            words = "anew from θ = 0" if start == "cold" else "on from the last θ"
            right.plot(
                *zip(*points, strict=True),
                color=_colour(index),
                linestyle=style,
                linewidth=width,
                marker="o" if start == "cold" else None,
                markersize=3.5,
                label=None if index else f"lower level {words}",
            )
    left.set_ylim(1e-14, 10)
    left.set_title("Relative bias of the hypergradient at θ$^K$", fontsize=11)
    right.set_title(f"‖∇L‖ after {floors[0]['steps']} upper steps", fontsize=11)
    for axis in (left, right):
        axis.set_yscale("log")
        axis.set_xlabel("lower steps K")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, ncols=2 if axis is left and len(problems) > 3 else 1)
    return _save(pyplot, figure, path)


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _save(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
