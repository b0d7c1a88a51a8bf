"""How many environment steps each estimator needs for a good hypergradient of Four-Rooms."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...envs.tabular import FourRooms, sampled, soft_policy_iteration
from ...envs.tabular.mdp import Array
from ...envs.tabular.problems.four_rooms import GOALS, HORIZON
from ...envs.tabular.problems.four_rooms_ascent import four_rooms_ascent, initial_weights
from ...envs.tabular.sampled import Episodes, sample_episodes
from ...errors import ConfigError
from ...results.csv_files import Row, Rows
from ...results.tables import Table
from ..study import Study

FROM_EPISODES: dict[str, Callable[..., Any]] = {
    "CertaintyEquivalent": sampled.certainty_equivalent,
    "HPGD": sampled.hpgd,
    "BCHG": sampled.bc_hg,
    "Fisher": sampled.fisher,
    "SoBiRL": sampled.sobirl_shortcut,
}
CONTRASTS = ("NudgedContrast", "ValuePenalty")
"""From two policies, each with half of the steps, for rewards r ± λ r_U or r + λ r_U and r."""
OURS, THEIRS = "CertaintyEquivalent", "HPGD"
LEAST_RATIO = 3.0
"""By which OURS is meant to need fewer steps than THEIRS."""
TEMPERATURES, COST = (0.001, 0.003, 0.005), 1.0
_LEARNING_RATE = 0.5
_STEPS_PER_DIRECTION, _RADIUS = 2000, 0.5
_SMALLEST = 500
_POINTS = {"start": 0, "after 1000 steps": 1000}


@dataclass(frozen=True)
class SamplesStudy(Study):
    """Environment steps until an estimate points the exact way, by estimator."""

    name: ClassVar[str] = "samples"
    title: ClassVar[str] = "Environment steps for a good hypergradient"
    source: ClassVar[str] = (
        "measured here; HPGD is Thoma et al., NeurIPS 2024, BC-HG is ICAPS 2026, SoBiRL is Yang et al., AISTATS 2025"
    )

    seeds: int = 11
    """Draws of the leader's weights and of the episodes, behind every median."""
    most_steps: int = 1_000_000
    """Environment steps after which an estimator is given up."""
    cosine: float = 0.95
    """With the exact hypergradient, that an estimate has to reach."""

    def tasks(self) -> Sequence[Mapping[str, Any]]:
        """One for each temperature, place and seed.

        Raises:
            ConfigError: settings out of range.
        """
        for name, least in (("seeds", 1), ("most_steps", _SMALLEST)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0.0 < self.cosine < 1.0:
            raise ConfigError(f"cosine must be between 0 and 1, got {self.cosine:g}")
        return [
            {"temperature": temperature, "where": where, "seed": seed}
            for temperature in TEMPERATURES
            for where in _POINTS
            for seed in range(self.seeds)
        ]

    def run(self, task: Mapping[str, Any]) -> Rows:
        """The cosine of every estimator at growing prefixes of the same episodes."""
        seed, temperature = task["seed"], task["temperature"]
        problems = [FourRooms(goal, temperature, COST) for goal in range(len(GOALS))]
        weights = initial_weights(seed)
        if _POINTS[task["where"]]:
            temperatures = np.full(_POINTS[task["where"]], temperature)
            weights = four_rooms_ascent("exact", weights, temperatures, COST, _LEARNING_RATE, seed).weights
        exact = np.mean([problem.hypergradient(weights).total for problem in problems], axis=0)
        rows: list[Row] = []
        for name, estimates in self._estimates(problems, weights, seed):
            for steps, estimate in estimates:
                rows.append({**task, "estimator": name, "env_steps": steps, "cosine": _cosine(estimate, exact)})
        return {"cosines": rows}

    def _budgets(self) -> list[int]:
        """Multiples of 4, growing by 2^¼ from _SMALLEST; and `most_steps`."""
        growing = (int(_SMALLEST * 2 ** (k / 4)) // 4 * 4 for k in itertools.count())
        return [*itertools.takewhile(lambda steps: steps < self.most_steps, growing), self.most_steps]

    def _estimates(
        self, problems: Sequence[FourRooms], weights: Array, seed: int
    ) -> Iterator[tuple[str, list[tuple[int, Array]]]]:
        """For every estimator its estimates of the mean over goals, at every budget."""
        budgets = self._budgets()
        half = budgets[-1] // 2  # for each goal
        policies = [problem.response(weights) for problem in problems]
        episodes = [
            sample_episodes(problem.mdp, policy, half, HORIZON, 4 * seed + goal)
            for goal, (problem, policy) in enumerate(zip(problems, policies, strict=True))
        ]
        for name, estimator in FROM_EPISODES.items():
            estimates = []
            for steps in budgets:
                prefixes = [given.prefix(steps // 2) for given in episodes]
                if min(prefix.number for prefix in prefixes) < 3:
                    continue
                totals = [estimator(p, weights, prefix).total for p, prefix in zip(problems, prefixes, strict=True)]
                estimates.append((steps, np.mean(totals, axis=0)))
            yield name, estimates
        for name in CONTRASTS:
            sides = [_nudged(p, weights, name, half // 2, 4 * seed + 2 * g) for g, p in enumerate(problems)]
            estimates = []
            for steps in budgets:
                totals = [
                    _contrast(p, weights, name, above.prefix(steps // 4), below.prefix(steps // 4))
                    for p, (above, below) in zip(problems, sides, strict=True)
                ]
                estimates.append((steps, np.mean(totals, axis=0)))
            yield name, estimates
        yield "ZeroOrder", _zero_order(problems, weights, budgets, seed)
        direct = [
            (
                steps,
                np.mean(
                    [_direct(p, weights, e.prefix(steps // 2)) for p, e in zip(problems, episodes, strict=True)], 0
                ),
            )
            for steps in budgets
        ]
        yield "DirectOnly", direct

    def tables(self, rows: Rows) -> list[Table]:
        """Median environment steps, and their ratio to the certainty-equivalent estimator's."""
        lines_of: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
        for row in rows["cosines"]:
            key = (row["estimator"], row["temperature"], row["where"], row["seed"])
            lines_of.setdefault(key, []).append((row["env_steps"], row["cosine"]))
        names = list(dict.fromkeys(row["estimator"] for row in rows["cosines"]))
        cells = [(temperature, where) for temperature in TEMPERATURES for where in _POINTS]
        needed = {
            (name, *cell): float(
                np.median(
                    [steps_needed(lines_of.get((name, *cell, seed), ()), self.cosine) for seed in range(self.seeds)]
                )
            )
            for name in names
            for cell in cells
        }
        lines = [(name, *(_steps_shown(needed[(name, *cell)], self.most_steps) for cell in cells)) for name in names]
        ratios = [_ratio(needed[(THEIRS, *cell)], needed[(OURS, *cell)], self.most_steps) for cell in cells]
        lines.append((f"{THEIRS} / {OURS}", *(shown for shown, _ in ratios)))
        smallest, least = min(ratios, key=lambda ratio: ratio[1])
        reached = sum(ratio >= LEAST_RATIO for _, ratio in ratios)
        return [
            Table(
                title=f"Environment steps until the cosine with the exact hypergradient stays above {self.cosine:g}",
                columns=("estimator", *(f"λ={temperature:g}, {where}" for temperature, where in cells)),
                rows=tuple(lines),
                note=f"{THEIRS} needs at least {LEAST_RATIO:g} times the steps of {OURS} in {reached} of {len(cells)} "
                f"places; the smallest ratio is {smallest if least else 'not known'}. {OURS} estimates the MDP and the "
                f"others average what episodes did, all from episodes that are cut at {HORIZON} steps. Median over "
                f"{self.seeds} seeds, c = {COST:g}, half of the steps on the way to each goal. Places: the random weights "
                "that every run starts from, and those that 1000 exact steps lead to. Tried budgets grow by 2^¼ from "
                f"{_SMALLEST}, and the last is {self.most_steps:,}: an estimate at each from the first steps of the same "
                "episodes. Counted is the smallest budget from which on all are above; ≤: the first was enough already. "
                f"Contrasts sample two policies with half each; ZeroOrder spends "
                f"{_STEPS_PER_DIRECTION} steps on a direction. Fisher is given reward-to-go and a value baseline. The "
                "cosine is that of direct and implicit term together.",
            )
        ]

    def figures(self, rows: Rows, directory: Path) -> list[Path]:
        """The median cosine by environment steps, a panel for every place."""
        from ..figures import COLOURS, panels, save_picture

        names = list(dict.fromkeys(row["estimator"] for row in rows["cosines"]))
        figure, axes = panels(len(_POINTS), len(TEMPERATURES), width=3.4, height=2.7)
        for i, where in enumerate(_POINTS):
            for j, temperature in enumerate(TEMPERATURES):
                panel = axes[i][j]
                panel.axhline(self.cosine, color="0.4", linestyle="--", linewidth=1)
                for k, name in enumerate(names):
                    by_steps: dict[int, list[float]] = {}
                    for row in rows["cosines"]:
                        if (row["estimator"], row["temperature"], row["where"]) == (name, temperature, where):
                            by_steps.setdefault(row["env_steps"], []).append(row["cosine"])
                    steps = sorted(by_steps)
                    panel.plot(
                        steps, [np.median(by_steps[s]) for s in steps], color=(*COLOURS, "0.5", "0.75")[k], label=name
                    )
                panel.set_xscale("log")
                panel.set_title(f"λ = {temperature:g}, {where}", fontsize=9)
        for panel in axes[-1]:
            panel.set_xlabel("environment steps")
        for line in axes:
            line[0].set_ylabel("cosine")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
        return [save_picture(figure, directory / "cosines.png")]


def steps_needed(line: Sequence[tuple[int, float]], cosine: float) -> float:
    """The smallest of growing budgets from which on all cosines are at least `cosine`; infinite if the last is not."""
    steps = float("inf")
    for budget, reached in reversed(line):
        if not reached >= cosine:
            break
        steps = budget
    return steps


def _nudged(problem: FourRooms, weights: Array, name: str, num_steps: int, seed: int) -> tuple[Episodes, Episodes]:
    """Episodes of the follower's optimum for r + λ r_U, and for r − λ r_U or r."""
    lower, nudge = problem.lower(weights).value, problem.temperature * problem.upper(weights).value
    sides = []
    for k, rewards in enumerate((lower + nudge, lower - nudge if name == "NudgedContrast" else lower)):
        policy = soft_policy_iteration(problem.mdp, rewards, problem.temperature).policy
        sides.append(sample_episodes(problem.mdp, policy, num_steps, HORIZON, 10_000 + 2 * seed + k))
    return sides[0], sides[1]


def _contrast(problem: FourRooms, weights: Array, name: str, above: Episodes, below: Episodes) -> Array:
    """(105,), direct and implicit term from the two policies' mean discounted visits."""
    visits = [sampled.mean_visits(problem.mdp, episodes) for episodes in (above, below)]
    two_sided = name == "NudgedContrast"
    implicit = (visits[0] - visits[1]) / (problem.temperature * (2.0 if two_sided else 1.0))
    direct = 0.5 * (visits[0] + visits[1]) if two_sided else visits[0]
    return np.einsum("sa,sap->p", implicit, problem.lower(weights).jacobian) + np.einsum(
        "sa,sap->p", direct, problem.upper(weights).jacobian
    )


def _direct(problem: FourRooms, weights: Array, episodes: Episodes) -> Array:
    """(105,), the direct term."""
    return np.einsum("sa,sap->p", sampled.mean_visits(problem.mdp, episodes), problem.upper(weights).jacobian)


def _zero_order(
    problems: Sequence[FourRooms], weights: Array, budgets: Sequence[int], seed: int
) -> list[tuple[int, Array]]:
    """Means of (F(w + u z) − F(w)) z/u over as many directions z as each budget pays for, F mean returns of episodes."""
    rng = np.random.default_rng((seed, 1))  # the weights are drawn by that of the seed alone
    steps = _STEPS_PER_DIRECTION // (2 * len(problems))
    estimates, total, spent, directions = [], np.zeros(len(weights)), 0, 0
    for budget in budgets:
        while spent + _STEPS_PER_DIRECTION <= budget:
            direction = rng.normal(size=len(weights))
            change = 0.0
            for problem in problems:
                for sign, at in ((1.0, weights + _RADIUS * direction), (-1.0, weights)):
                    lower = problem.lower(at).value
                    policy = soft_policy_iteration(problem.mdp, lower, problem.temperature).policy
                    episodes = sample_episodes(problem.mdp, policy, steps, HORIZON, int(rng.integers(2**31)))
                    returns = episodes.returns(problem.upper(at).value, problem.mdp.discount)
                    change += sign * float(returns.mean()) / len(problems)
            total += change / _RADIUS * direction
            spent += _STEPS_PER_DIRECTION
            directions += 1
        if directions:
            estimates.append((budget, total / directions))
    return estimates


def _cosine(estimate: Array, exact: Array) -> float:
    """0 for a zero estimate."""
    length = float(np.linalg.norm(estimate) * np.linalg.norm(exact))
    return float(estimate @ exact) / length if length else 0.0


def _steps_shown(steps: float, most: int) -> str:
    if not np.isfinite(steps):
        return f"> {most:,}"
    return f"≤ {steps:,.0f}" if steps <= _SMALLEST else f"{steps:,.0f}"


def _ratio(theirs: float, ours: float, most: int) -> tuple[str, float]:
    """How many times our steps theirs are, as shown, and what that is at least: 0 where nothing is known."""
    (at_least, at_most), (our_least, our_most) = (_bounds(steps, most) for steps in (theirs, ours))
    least = at_least / our_most
    if least > 0.0:
        sign = "> " if np.isinf(theirs) else "≥ " if our_least == 0.0 else ""
        return f"{sign}{least:.1f}", least
    if our_least == 0.0 or np.isinf(at_most):
        return "–", 0.0
    return f"{'<' if np.isinf(ours) else '≤'} {at_most / our_least:.1f}", 0.0


def _bounds(steps: float, most: int) -> tuple[float, float]:
    """Of what is known as a number of steps: the smallest budget may be more than enough, and none may have been enough."""
    if np.isinf(steps):
        return float(most), steps
    return (0.0, steps) if steps <= _SMALLEST else (steps, steps)
