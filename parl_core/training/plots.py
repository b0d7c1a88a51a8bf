"""Pictures of runs, drawn from their metrics.csv."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..errors import RunFolderError
from ..pictures import pyplot, save_picture
from .config import ALGORITHMS, TrainConfig
from .run_folder import RunFolder, mean_by_step, read_metrics

RATIO = "‖implicit‖ / ‖direct‖ before shortening"
COLOURS = dict(zip(ALGORITHMS, ("#555555", "#1f77b4", "#d62728"), strict=True))


def draw_run(path: Path, random_return: float | None = None) -> Path:
    """Draw one run into its curve.png: true return, reward model, implicit term, linear solve."""
    _, config = RunFolder.open(path)
    rows = read_metrics(path)
    panels = [("True return", "true_return")]
    if any("success_rate" in row for row in rows):
        panels.append(("Success at any step of the episode", "success_rate"))
    if config.learns_reward:
        panels.append(("Reward model accuracy on its labels", "reward_accuracy"))
    if config.algorithm == "a-parl":
        panels.append((RATIO, "implicit_to_direct"))
        panels.append(("CG iterations", "solver_iterations"))
    across = 1 if len(panels) == 1 else 2
    down = -(-len(panels) // across)
    figure, axes = pyplot().subplots(down, across, figsize=(5.5 * across, 3.2 * down), squeeze=False)
    for axis, (title, column) in zip(axes.flat, panels, strict=False):
        shown = [(row["step"], row[column]) for row in rows if column in row]
        axis.plot([s for s, _ in shown], [v for _, v in shown], marker="o", markersize=3, label="mean of an evaluation")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("environment steps")
        axis.set_yscale("log" if title == RATIO else "linear")
        axis.grid(alpha=0.3)
    first = axes.flat[0]
    if rows and "true_return_std" in rows[0]:
        low, high = zip(
            *((r["true_return"] - r["true_return_std"], r["true_return"] + r["true_return_std"]) for r in rows),
            strict=True,
        )
        first.fill_between([r["step"] for r in rows], low, high, alpha=0.2, label="± std over its episodes")
    if random_return is not None:
        first.axhline(random_return, color="grey", linestyle="--", linewidth=1, label="random policy")
    if min(row["true_return"] for row in rows) >= 0:
        first.set_ylim(bottom=0)
    first.legend(fontsize=8)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(f"{config.algorithm} on {config.env}, preset {config.preset}, seed {config.seed}", fontsize=11)
    return save_picture(figure, path / "curve.png")


def draw_runs(paths: Sequence[Path], output: Path) -> Path:
    """Draw the true return of several runs, a panel per environment: each run thin, the mean of an algorithm bold.

    Raises:
        RunFolderError: a path is no run folder, or no run has an evaluation yet, or the picture cannot be written.
    """
    groups: dict[str, dict[str, list[tuple[TrainConfig, list[dict[str, float]]]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for path in paths:
        _, config = RunFolder.open(path)
        config.validate()
        rows = read_metrics(path)
        if not rows:
            print(f"parl: {path} has no evaluation yet and is left out", file=sys.stderr)
            continue
        groups[config.env][config.algorithm].append((config, rows))
    if not groups:
        raise RunFolderError("None of these runs has an evaluation yet")
    figure, axes = pyplot().subplots(1, len(groups), figsize=(6 * len(groups), 4), squeeze=False)
    for axis, (env, algorithms) in zip(axes.flat, sorted(groups.items()), strict=True):
        for algorithm in sorted(algorithms):
            runs = [rows for _, rows in algorithms[algorithm]]
            colour = COLOURS[algorithm]
            for rows in runs:
                steps = [row["step"] for row in rows]
                axis.plot(steps, [row["true_return"] for row in rows], color=colour, alpha=0.35, linewidth=1)
            steps, means = mean_by_step(runs, "true_return")
            seeds = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
            axis.plot(steps, means, color=colour, linewidth=2.2, label=f"{algorithm} (mean of {seeds})")
        axis.set_title(env, fontsize=10)
        axis.set_xlabel("environment steps")
        axis.set_ylabel("true return")
        if min(row["true_return"] for runs in algorithms.values() for _, rows in runs for row in rows) >= 0:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return save_picture(figure, output)
