"""Theorem 1 of PARL: (1/T) Σ_{t<T} ‖∇L(ν_t)‖² = O(1/T) + O(η^K), on enumerated problems with exact expectations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ...errors import ConfigError
from ...results.csv_files import Row, Rows
from ...results.tables import Table
from ..study import Study
from .convergence_figures import draw_bias, draw_rate
from .exact_a_parl import bias_rows, convergence_rows, floor_row
from .fits import Fit, geometric_fit, log_log_slope

BIAS_LOWER_STEPS = (*range(20), *range(20, 241, 5))
FLOOR_LOWER_STEPS = (1, 2, 4, 8, 12, 16, 24)
FLOOR_STARTS = ("cold", "warm")

FIT_FROM, FIT_DOWN_TO = 1e-2, 1e-10
"""Relative biases between which the geometric decay is fitted: above, higher orders of θ − θ* show; below, rounding."""
FLOOR_FIT_FROM = 4
"""K from which the floors' geometric decay is fitted."""


@dataclass(frozen=True)
class ConvergenceStudy(Study):
    """Rate of A-PARL, and what too few lower steps cost, with exact gradients on enumerated MDPs."""

    name: ClassVar[str] = "convergence"
    title: ClassVar[str] = "Theorem 1: convergence of A-PARL"
    source: ClassVar[str] = (
        "Theorem 1 of Chakraborty et al., PARL, ICLR 2024: (1/T) Σ ‖∇L(ν_t)‖² = O(1/T) + O(η^K), K lower steps for each of "
        "T upper ones"
    )
    needs_numba = False

    seeds: int = 5
    """Random problems: 3 states, 2 actions, 3 steps."""
    steps: int = 10_000
    """T, upper steps of the run for the rate; the runs for the floors take a fifth of it."""
    lower_steps: int = 10
    """K, ascent steps of the policy before each upper step, in the run for the rate."""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("steps", 10), ("lower_steps", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def tasks(self) -> Sequence[Mapping[str, Any]]:
        """The long runs first."""
        seeds = range(self.seeds)
        return (
            *({"part": "rate", "seed": seed} for seed in seeds),
            *({"part": "bias", "seed": seed} for seed in seeds),
            *(
                {"part": "floor", "seed": seed, "start": start, "lower_steps": lower_steps}
                for seed in seeds
                for start in FLOOR_STARTS
                for lower_steps in FLOOR_LOWER_STEPS
            ),
        )

    def run(self, task: Mapping[str, Any]) -> Rows:
        """One part for one problem."""
        seed = task["seed"]
        if task["part"] == "rate":
            return {"rate": convergence_rows(seed, self.steps, self.lower_steps)}
        if task["part"] == "bias":
            return {"bias": bias_rows(seed, BIAS_LOWER_STEPS)}
        return {"floor": [floor_row(seed, task["start"], task["lower_steps"], self.steps // 5)]}

    def tables(self, rows: Rows) -> list[Table]:
        """Rate, bias and floor."""
        return [_rate_table(by_seed(rows["rate"])), _bias_table(by_seed(rows["bias"])), _floor_table(rows["floor"])]

    def figures(self, rows: Rows, directory: Path) -> list[Path]:
        """convergence-rate.png and convergence-bias.png."""
        bias = by_seed(rows["bias"])
        return [
            draw_rate(by_seed(rows["rate"]), directory / "convergence-rate.png"),
            draw_bias(
                bias, [bias_fit(own) for own in bias.values()], rows["floor"], directory / "convergence-bias.png"
            ),
        ]


def by_seed(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """The rows of each seed, in order."""
    seeds = sorted({row["seed"] for row in rows})
    return {seed: [row for row in rows if row["seed"] == seed] for seed in seeds}


def rate_slope(rows: Sequence[Row]) -> float:
    """Slope of log mean‖∇L‖² against log T over the last three decades of one run."""
    last = rows[-1]["steps"]
    late = [row for row in rows if row["steps"] >= last / 1000]
    return log_log_slope([row["steps"] for row in late], [row["mean_squared_norm"] for row in late])


def bias_fit(rows: Sequence[Row]) -> Fit:
    """Geometric decay of one problem's bias in K."""
    steps, biases = _columns(rows, "lower_steps", "relative_bias")
    # from where it has come below FIT_FROM for good
    above = np.flatnonzero(biases > FIT_FROM)
    kept = (np.arange(len(biases)) > (above[-1] if len(above) else -1)) & (biases > FIT_DOWN_TO)
    return geometric_fit(steps[kept], biases[kept])


def floor_fit(rows: Sequence[Row]) -> Fit:
    """Geometric decay in K of one problem's ‖∇L‖ where cold-started runs end."""
    steps, norms = _columns([row for row in rows if row["start"] == "cold"], "lower_steps", "gradient_norm")
    late = steps >= FLOOR_FIT_FROM
    return geometric_fit(steps[late], norms[late])


def _columns(rows: Sequence[Row], *names: str) -> list[npt.NDArray[np.float64]]:
    return [np.array([row[name] for row in rows], dtype=np.float64) for name in names]


def _rate_table(runs: Mapping[int, Sequence[Row]]) -> Table:
    steps = [row["steps"] for row in next(iter(runs.values()))]
    shown = [n for n in (1, 10, 100, 1000, 10_000) if n in steps]
    if steps[-1] not in shown:
        shown.append(steps[-1])
    body, slopes = [], []
    for seed, rows in runs.items():
        at = {row["steps"]: row for row in rows}
        slopes.append(rate_slope(rows))
        body.append(
            (
                f"seed {seed}",
                *(f"{at[n]['sum_squared_norms']:.3f}" for n in shown),
                f"{max(row['sum_squared_norms'] / row['descent_bound'] for row in rows):.3f}",
                f"{slopes[-1]:.3f}",
                f"{max(row['bias_norm'] / row['gradient_norm'] for row in rows if row['steps'] >= 10):.1e}",
                f"{max(row['engine_difference'] for row in rows):.0e}",
            )
        )
    decades = min(3.0, np.log10(steps[-1]))
    held = sum(slope <= -0.9 for slope in slopes)
    return Table(
        title="T·mean‖∇L‖² by T",
        columns=(
            "",
            *(f"T = {n}" for n in shown),
            "largest / descent bound",
            "slope (theorem: −1)",
            "bias / ‖∇L‖ from T = 10",
            "engine difference",
        ),
        rows=tuple(body),
        note=(
            "T·mean‖∇L‖² never falls with T, so its largest value is that of the last T. The descent bound, which it stays "
            "below if the step size is small enough, is 2 (L(ν_0) − L(ν_T)) / step size. Slope: of log mean‖∇L‖² against "
            f"log T over the last {decades:.1f} decades; at most −0.9 on {held} of {len(slopes)} problems. Bias: of the "
            "hypergradient at θ^K, at worst. Engine difference: the library's hypergradient against the one written out for "
            "these problems, relative to the lengths of its two terms, at worst. The runs start at ν = 0 and θ = θ*(0), and "
            "with warm starts θ stays close to θ*(ν_t): they hardly put O(η^K) to the test, which the next two tables do. "
            "From random starts a plateau may come first, which leaves the slope from T = 10 on above −0.9 on some problems "
            "while T·mean‖∇L‖² stays bounded."
        ),
    )


def _bias_table(problems: Mapping[int, Sequence[Row]]) -> Table:
    shown = (0, 10, 20, 40, 80, 160)
    body = []
    for seed, rows in problems.items():
        at = {row["lower_steps"]: row["relative_bias"] for row in rows}
        fit, predicted = bias_fit(rows), rows[0]["contraction"]
        body.append(
            (
                f"seed {seed}",
                *(f"{at[n]:.1e}" for n in shown),
                f"{fit.rate:.4f}",
                f"{predicted:.4f}",
                f"{fit.r_squared:.5f}",
            )
        )
    return Table(
        title="Relative bias of the hypergradient by lower steps K",
        columns=("", *(f"K = {n}" for n in shown), "fitted rate", "1 − ημ", "R²"),
        rows=tuple(body),
        note=(
            f"From θ = 0 at a random ν. The decay C·rate^K is fitted from where the bias stays below {FIT_FROM:g} down to "
            f"{FIT_DOWN_TO:g}. η is the lower step size and μ the smallest eigenvalue of −∇²V at the optimum among the "
            "directions that change the policy: 1 − ημ is the slowest rate there can be, and a fitted rate below it says "
            "that the slowest direction carries little of the bias."
        ),
    )


def _floor_table(rows: Sequence[Row]) -> Table:
    body = []
    for lower_steps in FLOOR_LOWER_STEPS:
        cells = [str(lower_steps)]
        for start in FLOOR_STARTS:
            norms = [r["gradient_norm"] for r in rows if r["start"] == start and r["lower_steps"] == lower_steps]
            cells.append(f"{np.median(norms):.1e} ({min(norms):.1e} to {max(norms):.1e})")
        body.append(tuple(cells))
    problems = by_seed(rows)
    fits = [floor_fit(own) for own in problems.values()]
    predicted = [own[-1]["contraction"] for own in problems.values()]
    return Table(
        title=f"‖∇L‖ after {rows[0]['steps']} upper steps, by lower steps K",
        columns=("K", "each lower level from θ = 0", "each from the last θ"),
        rows=tuple(body),
        note=(
            "Median and range over problems. A lower level that starts anew leaves a floor that falls with K: fitted from "
            f"K = {FLOOR_FIT_FROM}, by a factor {', '.join(f'{fit.rate:.3f}' for fit in fits)} a step (1 − ημ: "
            f"{', '.join(f'{rate:.3f}' for rate in predicted)}; R² at least {min(fit.r_squared for fit in fits):.3f}). With "
            "the warm starts of A-PARL the bias vanishes as ν comes to rest, whatever K is: what ‖∇L‖ is left there is the "
            "way that T steps have not gone yet, and no floor. That is better than the theorem promises."
        ),
    )
