"""The picture of a run, drawn from its metrics.csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..pictures import pyplot, save_picture
from .run_folder import RunFolder, read_metrics

RATIO = "‖implicit‖ / ‖direct‖ before shortening"


def draw_run(path: Path, random_return: float | None = None) -> Path:
    """Draw one run into its curve.png: true return, reward model, implicit term, linear solve."""
    _, config = RunFolder.open(path)
    rows = read_metrics(path)
    panels = [("True return", "true_return")]
    if any("success_rate" in row for row in rows):
        panels.append(("Success at any step of the episode", "success_rate"))
    if config.learns_reward:
        panels.append(("Accuracy of the reward model", "reward_accuracy"))
    if config.algorithm == "a-parl":
        panels.append((RATIO, "implicit_to_direct"))
        panels.append(("CG iterations", "solver_iterations"))
    across = 1 if len(panels) == 1 else 2
    down = -(-len(panels) // across)
    figure, axes = pyplot().subplots(down, across, figsize=(5.5 * across, 3.2 * down), squeeze=False)
    for axis, (title, column) in zip(axes.flat, panels, strict=False):
        axis.plot(*_points(rows, column), marker="o", markersize=3, label="mean of an evaluation")
        if column == "reward_accuracy":
            axis.lines[0].set_label("on its labels, in its fit")
            axis.plot(*_points(rows, "fresh_accuracy"), marker="o", markersize=3, label="on new labels, before it")
            axis.legend(fontsize=8)
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


def _points(rows: Sequence[Mapping[str, float]], column: str) -> tuple[list[float], list[float]]:
    """Steps and values of a column, where it has one."""
    shown = [(row["step"], row[column]) for row in rows if column in row]
    return [step for step, _ in shown], [value for _, value in shown]
