"""Lemma 1 of PARL: how far the trajectories' distribution moves when the policy's parameters do.

    D_f(ρ(·;θ*), ρ(·;θ)) ≤ (H L/2) ‖θ − θ*‖

for trajectories of H steps and L the Lipschitz constant of θ ↦ log π_θ(a|s). For the tabular softmax with logits
W[a, s] + b[a], ∇ log π(a|s) is e_a − π(s) once in column s of W and once in b, so that
‖∇ log π(a|s)‖² = 2 ‖e_a − π(s)‖² ≤ 4, and L = 2: no smaller constant serves, since the policy may be nearly deterministic
and the action the other one. With H = 3 the bound is 3 ‖θ − θ*‖.

Why it holds, and for which f. Along the segment θ_u from θ* to θ, dρ/du = ρ·S(τ)ᵀ(θ − θ*) with S the sum of the H scores,
‖S‖ ≤ H L. Hence TV = ½ Σ_τ |ρ(τ;θ) − ρ(τ;θ*)| ≤ ½ ∫ E|Sᵀ(θ − θ*)| du ≤ (H L/2) ‖θ − θ*‖. Every f-divergence is at most
(f(0) + f'(∞))·TV, where f'(∞) is the limit of f(t)/t: that factor is 1 for 1 − BC and log 2 for Jensen–Shannon, so both are
under the bound. For KL, Jeffreys and χ² it is infinite and nothing follows. |log ρ(τ;θ) − log ρ(τ;θ*)| ≤ H L ‖θ − θ*‖ alone
keeps KL, both ways, below twice and Jeffreys below four times the bound; χ² may grow exponentially in ‖θ − θ*‖.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...envs.tabular import Array
from ...errors import ConfigError
from ...results.csv_files import Row, Rows
from ...results.tables import Table
from ..figures import COLOURS, panels, save_picture
from ..study import Study
from .divergences import DIVERGENCES, f_divergences
from .enumerated import HORIZON, EnumeratedProblem

LIPSCHITZ = 2.0
"""L, of log π in θ."""
STEP_SIZES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""‖θ − θ*‖."""
DIRECTIONS = ("random", "steepest")
BOUNDED = ("total variation", "squared Hellinger", "Jensen-Shannon")
"""The divergences of which Lemma 1 is proved."""

_DRAWS_PER_TASK = 20


@dataclass(frozen=True)
class Lemma1Study(Study):
    """Every f-divergence against Lemma 1's bound, on random enumerated MDPs."""

    name: ClassVar[str] = "lemma1"
    title: ClassVar[str] = "Lemma 1: the trajectories' distribution moves no further than the policy"
    source: ClassVar[str] = (
        "Lemma 1 of Chakraborty et al., PARL, ICLR 2024: D_f(ρ(·;θ*), ρ(·;θ^K)) ≤ (H L/2) ‖θ^K − θ*‖"
    )
    needs_numba = False

    draws: int = 200
    """Random MDPs, each with its own reward, policy and direction."""

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ConfigError(f"draws must be at least 1, got {self.draws}")

    def tasks(self) -> Sequence[Mapping[str, Any]]:
        """Twenty draws each."""
        return [
            {"first": first, "last": min(first + _DRAWS_PER_TASK, self.draws) - 1}
            for first in range(0, self.draws, _DRAWS_PER_TASK)
        ]

    def run(self, task: Mapping[str, Any]) -> Rows:
        """All divergences of some draws."""
        return {"lemma1": [row for draw in range(task["first"], task["last"] + 1) for row in draw_rows(draw)]}

    def tables(self, rows: Rows) -> list[Table]:
        """Largest ratios to the bound, by direction."""
        return [_table([row for row in rows["lemma1"] if row["direction"] == name], name) for name in DIRECTIONS]

    def figures(self, rows: Rows, directory: Path) -> list[Path]:
        """lemma1.png."""
        return [_draw(rows["lemma1"], directory / "lemma1.png")]


def draw_rows(draw: int) -> Iterator[Row]:
    """One MDP at the optimum θ* of its lower level, moved by every step size in both directions.

    "random" is uniform on the sphere; "steepest" the direction that ρ feels most at θ*, the first eigenvector of the
    Fisher matrix of whole trajectories, with a random sign.
    """
    problem = EnumeratedProblem(draw)
    theta = problem.solve(problem.random_reward, np.zeros(problem.num_params))
    rng = np.random.default_rng((draw, 2))
    directions = {"random": rng.normal(size=problem.num_params), "steepest": _steepest(problem, theta)}
    directions["steepest"] *= rng.choice((-1.0, 1.0))
    log_p = problem.log_probabilities(theta)
    for name, direction in directions.items():
        unit = direction / np.linalg.norm(direction)
        for step_size in STEP_SIZES:
            bound = 0.5 * HORIZON * LIPSCHITZ * step_size
            found = f_divergences(log_p, problem.log_probabilities(theta + step_size * unit))
            for divergence, value in found.items():
                yield {
                    "draw": draw,
                    "direction": name,
                    "step_size": step_size,
                    "divergence": divergence,
                    "value": value,
                    "bound": bound,
                    "ratio": value / bound,
                }


def _steepest(problem: EnumeratedProblem, theta: Array) -> Array:
    sums = problem.counts @ problem.scores(theta)  # (N, P), S(τ)
    fisher = (np.exp(problem.log_probabilities(theta))[:, None] * sums).T @ sums
    direction = np.linalg.eigh(fisher).eigenvectors[:, -1]
    # an eigenvector's own sign is the linear-algebra library's choice
    return direction * np.sign(direction[np.argmax(np.abs(direction))])


def _ratios(rows: Sequence[Row], divergence: str) -> Array:
    """(draws, step sizes)."""
    flat = [row["ratio"] for row in rows if row["divergence"] == divergence]
    return np.array(flat).reshape(-1, len(STEP_SIZES))


def _table(rows: Sequence[Row], direction: str) -> Table:
    body = []
    for divergence in DIVERGENCES:
        ratios = _ratios(rows, divergence)
        above = int(np.sum((ratios > 1.0).any(axis=1)))
        if divergence in BOUNDED:
            verdict = "VIOLATED" if above else "holds, as proved"
        else:
            verdict = "violated" if above else "not proved, not violated here"
        body.append((divergence, *map(_ratio, ratios.max(axis=0)), f"{above} of {len(ratios)}", verdict))
    chi_squared = _ratios(rows, "chi-squared")
    what = {
        "random": "a random direction",
        "steepest": "the direction that the trajectories' distribution feels most",
    }
    return Table(
        title=f"Largest D_f / bound over the draws, in {what[direction]}",
        columns=("divergence", *(f"‖Δθ‖ = {size:g}" for size in STEP_SIZES), "draws above", "verdict"),
        rows=tuple(body),
        note=(
            f"The bound is (H L/2)‖Δθ‖ = {0.5 * HORIZON * LIPSCHITZ:g}‖Δθ‖. Draws above: at any step size. χ² at "
            f"‖Δθ‖ = {STEP_SIZES[-1]:g} is above it on {int(np.sum(chi_squared[:, -1] > 1.0))} of {len(chi_squared)} draws, "
            f"{_ratio(float(np.median(chi_squared[:, -1])))} times the bound in the median. "
            "TV and 1 − BC are at most 1 and JS log 2, whatever the policies: a larger bound they cannot violate, and so "
            f"only ‖Δθ‖ ≤ {_largest_tested(1.0):g} puts it to the test, for JS only ‖Δθ‖ ≤ {_largest_tested(np.log(2.0)):g}."
        ),
    )


def _largest_tested(largest: float) -> float:
    """The largest step size at which the bound is below the largest value that a divergence can have."""
    return max(size for size in STEP_SIZES if 0.5 * HORIZON * LIPSCHITZ * size < largest)


def _ratio(value: float) -> str:
    return f"{value:.3f}" if 0.001 <= value < 100.0 else f"{value:.0e}"


def _draw(rows: Sequence[Row], path: Path) -> Path:
    """D_f / bound by ‖Δθ‖, a panel for each divergence: median and range over the draws."""
    figure, axes = panels(2, 4, width=3.1, height=2.8)
    for axis, divergence in zip(axes.flat, DIVERGENCES, strict=True):
        for direction, colour in zip(DIRECTIONS, COLOURS, strict=False):
            ratios = _ratios([row for row in rows if row["direction"] == direction], divergence)
            label = f"{direction}: median, range"
            axis.fill_between(STEP_SIZES, ratios.min(axis=0), ratios.max(axis=0), color=colour, alpha=0.18, linewidth=0)
            axis.plot(STEP_SIZES, np.median(ratios, axis=0), color=colour, linewidth=1.8, label=label)
        axis.axhline(1.0, color="black", linestyle="--", linewidth=1.2, label="the bound")
        axis.set_title(divergence, fontsize=10.5)
        axis.set_xscale("log")
        axis.set_yscale("log")
    for axis in axes[-1]:
        axis.set_xlabel("‖Δθ‖")
    for axis in axes[:, 0]:
        axis.set_ylabel("D$_f$ / bound")
    axes.flat[DIVERGENCES.index("chi-squared")].legend(fontsize=8, loc="upper left")  # where there is room
    return save_picture(figure, path)
