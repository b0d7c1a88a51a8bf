"""RandMDP by gradient descent: the objective and the norm of its gradient by step, beside the published ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...envs.tabular import Array, ExactHypergradient, RandMDP, m_sobirl_iteration, m_sobirl_start, rand_mdp
from ...envs.tabular.problems.rand_mdp import OPTIMUM
from ...errors import ConfigError
from ...results.csv_files import Row, Rows
from ...results.tables import Table
from ..figures import COLOURS, draw_seeds, panels, save_picture
from ..statistics import mean_with_error
from ..study import Study

STEP_SIZE = 8e-3
PUBLISHED_STEP, PUBLISHED_NORM = 823, 0.013
OBJECTIVE_WITHIN, NORM_WITHIN = 1e-3, 0.02
"""Arrived: f at most the optimum plus the one, ‖∇f‖ at most the other."""
CURVE_POINTS = 100
GRADIENT_STEPS = (0, 100, 823)
"""Steps at which a method's gradient is compared with finite differences."""

LINES = ("-", (0, (5, 2)), "-.", ":")
METHODS = {
    "exact": "exact gradient",
    "m-sobirl": "M-SoBiRL",
    "shortcut": "SoBiRL's shortcut",
    "direct": "direct term only",
}


@dataclass(frozen=True)
class RandMDPStudy(Study):
    """RandMDP (Yang et al., AISTATS 2025): objective and gradient norm by step, for four gradients."""

    name = "rand-mdp"
    title = "RandMDP"
    source = (
        "Yang et al., “Bilevel reinforcement learning via the development of hyper-gradient without lower-level "
        "convexity” (SoBiRL), AISTATS 2025: f = 1.000 and ‖g‖ ≈ .013 by step 820 or so"
    )

    seeds: int = 10
    """Problems, each drawn anew and started once."""
    steps: int = 1000
    """Outer steps; the published numbers are those of step 823."""

    def tasks(self) -> Sequence[Mapping[str, Any]]:
        """One for every method and seed."""
        for name in ("seeds", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}")
        return [{"method": method, "seed": seed} for method in METHODS for seed in range(self.seeds)]

    def run(self, task: Mapping[str, Any]) -> Rows:
        """Descend; `curves` holds the exact f and ‖∇f‖ along the way, `gradients` what the method took for ∇f."""
        problem, reported = rand_mdp(task["seed"]), min(PUBLISHED_STEP, self.steps)
        shown = {*range(0, self.steps, math.ceil(self.steps / CURVE_POINTS)), reported, self.steps}
        curves: list[Row] = []
        gradients: list[Row] = []
        summary: Row = {**task, "step": reported, "first_step": math.nan}
        for step, (x, exact, gradient) in enumerate(descend(problem, task["method"], self.steps)):
            point = {"objective": exact.objective, "gradient_norm": float(np.linalg.norm(exact.total))}
            if step in shown:
                curves.append({**task, "step": step, **point})
            if step in GRADIENT_STEPS:
                gradients.append({**task, "step": step, **_compare(gradient, finite_differences(problem, x))})
            if step == reported:
                summary.update(point)
            if math.isnan(summary["first_step"]) and _arrived(point):
                summary["first_step"] = step
        return {"seeds": [summary], "curves": curves, "gradients": gradients}

    def tables(self, rows: Rows) -> list[Table]:
        """The published numbers beside ours; how right each method's gradient is."""
        return [_outcomes(rows["seeds"]), _gradients(rows["gradients"])]

    def figures(self, rows: Rows, directory: Path) -> list[Path]:
        """f − f* and ‖∇f‖ by step."""
        figure, axes = panels(1, 2, width=5.6, height=4.0)
        # 1.000 is what rounds to it, so the mark is where that begins
        marks = {
            "objective": (OPTIMUM, 5e-4, "published: f = 1.000"),
            "gradient_norm": (0.0, PUBLISHED_NORM, "published"),
        }
        for axis, (column, (optimum, mark, published)) in zip(axes.flat, marks.items(), strict=True):
            for (method, name), colour, line in zip(METHODS.items(), COLOURS, LINES, strict=False):
                own = [row for row in rows["curves"] if row["method"] == method]
                steps = sorted({row["step"] for row in own})
                seeds = sorted({row["seed"] for row in own})
                curves = [[row[column] - optimum for row in own if row["seed"] == seed] for seed in seeds]
                draw_seeds(axis, steps, curves, colour, name, line)
            axis.plot([PUBLISHED_STEP], [mark], "k*", markersize=11, label=published, zorder=5)
            axis.set(yscale="log", xlabel="outer step", ylabel="f − 1" if optimum else "‖∇f‖")
            axis.legend(fontsize=8, frameon=False, loc="lower left")
        return [save_picture(figure, directory / "curves.png")]


def descend(problem: RandMDP, method: str, steps: int) -> Iterator[tuple[Array, ExactHypergradient, Array]]:
    """x, the exact gradient there and what `method` takes for it, at the start and after each of `steps` steps."""
    x, state = problem.start, m_sobirl_start(problem.mdp)
    for _ in range(steps + 1):
        exact = problem.hypergradient(x)
        if method == "exact":
            gradient = exact.total
        elif method == "direct":
            gradient = exact.direct
        elif method == "shortcut":
            gradient = exact.direct + shortcut(problem, x)
        else:
            # ½ Σ π² has the derivative π
            result = m_sobirl_iteration(problem.mdp, problem.lower(x), np.copy, state, temperature=problem.temperature)
            state, gradient = result.state, x + result.implicit
        yield x, exact, gradient
        x = x - STEP_SIZE * gradient


def shortcut(problem: RandMDP, params: Array) -> Array:
    """The implicit term where ∇Q is taken as ∇r, without γ P ∇V, (P,)."""
    reward, policy = problem.lower(params), problem.response(params)
    mean = np.sum(policy * policy, axis=1, keepdims=True)
    return np.einsum("sa,sap->p", policy * (policy - mean) / problem.temperature, reward.jacobian)


def finite_differences(problem: RandMDP, params: Array, step: float = 1e-5) -> Array:
    """Central differences of f, (P,)."""
    ahead = (problem.objective(params + step * unit) for unit in np.eye(len(params)))
    behind = (problem.objective(params - step * unit) for unit in np.eye(len(params)))
    return np.array([(a - b) / (2.0 * step) for a, b in zip(ahead, behind, strict=True)])


def _compare(gradient: Array, reference: Array) -> Row:
    norms = np.linalg.norm(gradient), np.linalg.norm(reference)
    return {
        "relative_error": float(np.linalg.norm(gradient - reference) / norms[1]),
        "cosine": float(gradient @ reference / (norms[0] * norms[1])),
    }


def _arrived(point: Row) -> bool:
    return bool(point["objective"] <= OPTIMUM + OBJECTIVE_WITHIN and point["gradient_norm"] <= NORM_WITHIN)


def _outcomes(rows: Sequence[Row]) -> Table:
    step = rows[0]["step"]
    lines = [(f"published (M-SoBiRL), step {PUBLISHED_STEP}", "1.000", "", f"{PUBLISHED_NORM:g}", "", "", "")]
    for method, name in METHODS.items():
        own = [row for row in rows if row["method"] == method]
        values, norms, firsts = (
            [row[column] for row in own] for column in ("objective", "gradient_norm", "first_step")
        )
        arrived = [first for first in firsts if first <= step]  # NaN is not
        lines.append(
            (
                name,
                mean_with_error(values, 6),
                f"{max(values):.6f}",
                mean_with_error(norms, 4),
                f"{max(norms):.4f}",
                f"{len(arrived)} of {len(own)}",
                mean_with_error(arrived, 0) if arrived else "–",
            )
        )
    return Table(
        title=f"Objective and gradient norm at step {step}",
        columns=("gradient", "f", "worst f", "‖∇f‖", "worst ‖∇f‖", f"arrived by step {step}", "at step"),
        rows=tuple(lines),
        note=(
            f"Steps of {STEP_SIZE:g} times the gradient; f and ‖∇f‖ are exact, whatever gradient is descended. Mean ± "
            f"standard error over the seeds, and the worst seed. Arrived: f ≤ {OPTIMUM + OBJECTIVE_WITHIN} and "
            f"‖∇f‖ ≤ {NORM_WITHIN} at a step up to {step}, the first of which is the last column. The optimum is "
            f"f = {OPTIMUM:g} at "
            "x = 0, where the implicit term vanishes to third order: every gradient that has the direct term gets there "
            f"at the same rate, 1 − {STEP_SIZE:g} a step, so this benchmark does not tell right implicit terms from "
            "wrong ones."
        ),
    )


def _gradients(rows: Sequence[Row]) -> Table:
    steps = sorted({row["step"] for row in rows})
    lines = []
    for method, name in METHODS.items():
        cells = []
        for step in steps:
            errors = [row["relative_error"] for row in rows if row["method"] == method and row["step"] == step]
            cells += [f"{np.median(errors):.1e}", f"{max(errors):.1e}"]
        lines.append((name, *cells))
    return Table(
        title="Relative error of the gradient against central finite differences of f",
        columns=("gradient", *(f"{what}, step {step}" for step in steps for what in ("median", "worst"))),
        rows=tuple(lines),
        note=(
            "Over the seeds, each at its own iterate. M-SoBiRL begins with zeros for values and adjoint, and makes 10 "
            "sweeps and one adjoint step of .5 at each outer step."
        ),
    )
