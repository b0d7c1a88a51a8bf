"""Leaders' optima: what ascent by each hypergradient reaches, against an exhaustive search that needs none."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ...envs.tabular.bilevel import ExactHypergradient
from ...envs.tabular.estimators import exact_hypergradient, sobirl_shortcut
from ...envs.tabular.mdp import Array
from ...envs.tabular.perturbed import nudged_contrast
from ...envs.tabular.problems.design import DesignProblem
from ...envs.tabular.problems.search import grid_search, pattern_search
from ...envs.tabular.problems.stackelberg import (
    StackelbergGame,
    audit_game,
    matrix_game,
    random_game,
    simultaneous_play,
    strong_stackelberg,
)
from ...envs.tabular.problems.tax import TaxDesign
from ...errors import ConfigError
from ...results.csv_files import Row, Rows
from ...results.tables import Table
from ..statistics import mean_with_error
from ..study import Study

WITHIN = 1e-3
"""How near the search's optimum an ascent must end to have found it, in units of the objective."""
MAX_EXHAUSTIVE = 2
"""Dimensions of a choice up to which the whole box is searched, and drawn."""
SEARCH_STARTS = 50
"""Of the search of a box of more dimensions."""
SURFACE_POINTS = 61
"""Along each side of what is drawn of the objective."""
RECORDED = 50
"""Steps of an ascent that are written down, about: denser in the beginning."""
STATIONARY = 1e-8
"""Length of a direction below which an ascent ends."""


class Example(NamedTuple):
    """A leader's problem, and how it is ascended."""

    title: str
    problem: Callable[[], DesignProblem]
    axes: tuple[str, ...]
    """Names of the choice's coordinates, where it is drawn."""
    without: str
    """What the leader's alternative to an optimal choice is called."""
    learning_rate: float


EXAMPLES = {
    "matrix-game": Example("Matrix game", matrix_game, ("probability of the first row",), "no commitment", 0.3),
    "audit-game": Example(
        "Audit game", audit_game, ("audits of trusted firms", "audits of watched firms"), "no commitment", 0.3
    ),
    # The best commitments are pure in most states: a softmax gets there as 1/(learning rate × steps).
    "random-game": Example("Random Markov game", random_game, (), "no commitment", 1.0),
    "tax-design": Example("Tax design", TaxDesign, ("tax on the necessity", "tax on the luxury"), "no taxes", 0.3),
}


class Method(NamedTuple):
    """A direction to ascend in."""

    title: str
    direction: Callable[[DesignProblem, Array], tuple[float, Array]]
    """(problem, parameters) to the objective there and the direction (P,)."""


def _total(estimator: Callable[..., ExactHypergradient], **options: Any) -> Callable[..., tuple[float, Array]]:
    def direction(problem: DesignProblem, params: Array) -> tuple[float, Array]:
        result = problem.hypergradient(params, estimator, **options)
        return result.objective, result.total

    return direction


def _direct(problem: DesignProblem, params: Array) -> tuple[float, Array]:
    result = problem.hypergradient(params)
    return result.objective, result.direct


METHODS = {
    "exact": Method("exact hypergradient", _total(exact_hypergradient)),
    "nudged-contrast": Method("nudged contrast, λ = 100", _total(nudged_contrast, penalty=100.0)),
    "sobirl-shortcut": Method("SoBiRL's shortcut", _total(sobirl_shortcut)),
    "direct-only": Method("direct term only", _direct),
}


def ascend(
    problem: DesignProblem, start: Array, method: str, steps: int, learning_rate: float
) -> list[tuple[int, float, Array]]:
    """Gradient ascent in the leader's parameters, gradients clipped to norm 1.

    It ends early at a stationary point.

    Returns:
        (step, objective, choice (D,)) of the first and last step and of some between; steps that an early end spares are
        as the last one made.
    """
    recorded = np.unique(np.geomspace(1, steps, RECORDED).astype(int))
    params, path = np.array(start, dtype=np.float64), []
    for step in range(steps):
        objective, direction = METHODS[method].direction(problem, params)
        if step == 0 or step in recorded:
            path.append((step, objective, problem.choice(params)))
        length = float(np.linalg.norm(direction))
        if length < STATIONARY:
            break
        params = params + learning_rate * direction / max(1.0, length)
    last = problem.objective(params), problem.choice(params)
    path.extend((int(later), *last) for later in recorded if later > path[-1][0])
    return path


@dataclass(frozen=True)
class LeadersStudy(Study):
    """Games of commitment and a tax design problem: ascent by several hypergradients against exhaustive search."""

    name: ClassVar[str] = "leaders"
    title: ClassVar[str] = "Leaders' optima: commitment and taxes"
    source: ClassVar[str] = (
        "No published numbers: the reference is a search of the leader's choices; of the matrix game (Conitzer and "
        "Sandholm, EC 2006) the optimum as τ → 0 is known, 3.5 with commitment and 2 without"
    )

    seeds: int = 10
    """Starts of each ascent: parameters drawn from N(0, 1)."""
    steps: int = 3000
    """Gradient steps of each ascent, at most."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    def tasks(self) -> Sequence[Mapping[str, Any]]:
        """A search for each example, then an ascent for each example, method and start."""
        searches: list[dict[str, Any]] = [{"part": "search", "example": example} for example in EXAMPLES]
        ascents = [
            {"part": "ascent", "example": example, "method": method, "seed": seed}
            for example in EXAMPLES
            for method in METHODS
            for seed in range(self.seeds)
        ]
        return searches + ascents

    def run(self, task: Mapping[str, Any]) -> Rows:
        """One search or one ascent."""
        if task["part"] == "search":
            return _search(task["example"])
        return self._ascent(task["example"], task["method"], task["seed"])

    def _ascent(self, name: str, method: str, seed: int) -> Rows:
        example = EXAMPLES[name]
        problem = example.problem()
        start = np.random.default_rng(seed).normal(size=problem.num_params)
        path = ascend(problem, start, method, self.steps, example.learning_rate)
        identity = {"example": name, "method": method, "seed": seed}
        _, value, choice = path[-1]
        return {
            "ascent": [{**identity, "start": path[0][1], "value": value, "choice": _written(choice)}],
            "path": [{**identity, "step": step, "value": value, "choice": _written(at)} for step, value, at in path],
        }

    def tables(self, rows: Rows) -> list[Table]:
        """What the search found, and how near to it each ascent came."""
        return [_table_of_optima(rows["search"]), _table_of_ascents(rows)]

    def figures(self, rows: Rows, directory: Path) -> list[Path]:
        """The objectives with the ascents' paths on them, and the objective by step."""
        from .leaders_figures import draw_progress, draw_surfaces

        return [
            draw_surfaces(rows, directory / "surfaces.png"),
            draw_progress(rows, directory / "progress.png"),
        ]


def _search(name: str) -> Rows:
    """The optimum, what the leader gets without it, and the objective all over a box that can be drawn."""
    problem = EXAMPLES[name].problem()
    exhaustive = len(problem.low) <= MAX_EXHAUSTIVE
    box = problem.objectives, problem.low, problem.high
    best = grid_search(*box) if exhaustive else pattern_search(*box, starts=SEARCH_STARTS)
    without, gap = _without(problem)
    found = {
        "example": name,
        "exhaustive": exhaustive,
        "value": best.value,
        "choice": _written(best.point),
        "resolution": best.resolution,
        "evaluations": best.evaluations,
        "without": without,
        "without_gap": gap,
    }
    surface: list[Row] = []
    if exhaustive:
        sides = [np.linspace(*ends, SURFACE_POINTS) for ends in zip(problem.low, problem.high, strict=True)]
        points = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, len(sides))
        surface = [
            {"example": name, "choice": _written(point), "value": float(value)}
            for point, value in zip(points, problem.objectives(points), strict=True)
        ]
    return {"search": [found], "surface": surface}


def _without(problem: DesignProblem) -> tuple[float, float]:
    """What the leader gets without commitment or taxes, and how far that is from an equilibrium."""
    if isinstance(problem, StackelbergGame):
        play = simultaneous_play(problem)
        return play.value, play.gap
    return float(problem.objectives(problem.low[None])[0]), 0.0


def _table_of_optima(searches: Sequence[Row]) -> Table:
    game = matrix_game()
    limit, _ = strong_stackelberg(game.follower_payoffs[0], game.leader_payoffs[0])
    lines = []
    for row in searches:
        example = EXAMPLES[row["example"]]
        lines.append(
            (
                example.title,
                f"{row['value']:.4f}",
                ", ".join(f"{number:.3f}" for number in read_choice(row)),
                f"{row['resolution']:.0e}",
                f"{row['evaluations']}",
                "whole box" if row["exhaustive"] else f"from {SEARCH_STARTS} starts",
                f"{row['without']:.3f} ({example.without})",
                f"{limit:g}" if row["example"] == "matrix-game" else "–",
            )
        )
    return Table(
        title="Leaders' optima by search",
        columns=("problem", "optimum", "at", "resolution", "evaluations", "searched", "without", "as τ → 0"),
        rows=tuple(lines),
        note=(
            "at: probabilities or tax rates; in the random game conditional probabilities, two for each state. "
            "resolution: spacing of the last grid, as a share of a coordinate's range. A search of the whole box may miss "
            "peaks narrower than its first grid's spacing, or a maximum that many other peaks exceed on that grid; one from "
            "random starts proves no global optimum. "
            "without: no taxes, or the equilibrium of simultaneous play, by fictitious play, where the leader's best "
            f"deviation gains her at most {max(row['without_gap'] for row in searches):.1g}."
        ),
    )


def _table_of_ascents(rows: Rows) -> Table:
    optimum = {row["example"]: row["value"] for row in rows["search"]}
    lines = []
    for name, example in EXAMPLES.items():
        for method, (title, _) in METHODS.items():
            values = [row["value"] for row in of(rows["ascent"], name, method)]
            if not values:
                continue
            found = sum(value >= optimum[name] - WITHIN for value in values)
            lines.append(
                (
                    example.title,
                    title,
                    f"{optimum[name]:.4f}",
                    mean_with_error(values, 4),
                    f"{max(values):.4f}",
                    f"{found} of {len(values)}",
                    _median_steps(of(rows["path"], name, method), optimum[name] - WITHIN),
                )
            )
    return Table(
        title="What gradient ascent reaches",
        columns=("problem", "direction", "search", "reached", "best", f"within {WITHIN:g}", "steps"),
        rows=tuple(lines),
        note=(
            "reached: mean ± standard error over starts of the last step's objective; best: the best of the starts. "
            f"within {WITHIN:g}: starts that end there, of the search's optimum. steps: until they are there for "
            "good, median over those starts; a step solves the follower's problem once, with the nudged contrast thrice. "
            "Ascent is local: starts may end at worse maxima. The direct term takes the follower's behaviour as given: "
            "where it vanishes the leader plays a best response, so that in the games it leads to an equilibrium without "
            "commitment, of which there may be several. The shortcut is exact at discount 0, as in the matrix game."
        ),
    )


def _median_steps(path: Iterable[Row], level: float) -> str:
    """Of the ascents that end at `level` or above, the median of the first recorded step from which they stay there."""
    by_seed: dict[int, list[Row]] = {}
    for row in path:
        by_seed.setdefault(row["seed"], []).append(row)
    reached = []
    for ascent in by_seed.values():
        below = [place for place, row in enumerate(ascent) if row["value"] < level]
        if not below:
            reached.append(ascent[0]["step"])
        elif below[-1] + 1 < len(ascent):
            reached.append(ascent[below[-1] + 1]["step"])
    return f"{statistics.median(reached):.0f}" if reached else "–"


def of(rows: Iterable[Row], example: str, method: str | None = None) -> list[Row]:
    """The rows of an example, and of a method if one is given."""
    return [row for row in rows if row["example"] == example and method in (None, row.get("method"))]


def read_choice(row: Row) -> list[float]:
    """A choice as it stands in a CSV."""
    return [float(number) for number in row["choice"].strip("[]").split()]


def _written(choice: Array) -> str:
    """In brackets, so that a choice of one number is not read as a number."""
    return "[" + " ".join(repr(float(number)) for number in choice) + "]"
