"""Cross-fitting: one batch for all three factors of the hypergradient, without the bias of a shared sample."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..solvers import Solution
from .base import Estimator, Outcome
from .problem import Problem


def cross_fit(estimator: Estimator, problem: Problem, x0: Tensor | None, folds: int) -> Outcome:
    """The mean over k of the estimates with b from fold k, H from fold k + 1 and C from fold k + 2, modulo `folds`.

    Fold k holds the samples and trajectories whose number is k modulo `folds`; a third one is needed only where b, H and C
    all share their data. What is independent anyway is cut as well.

    Raises:
        ValueError: too few folds for the data, data with given weights, or fewer samples than folds.
    """
    one_batch = problem.cross is problem.lower
    with_cross = any(part is problem.cross for part in problem.parts)
    least = 3 if one_batch and with_cross else 2
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < least:
        why = "upper and lower share trajectories" if least == 3 else "H and C need one each"
        raise ValueError(f"folds must be 1, or a whole number from {least} up since {why}, got {folds!r}")
    if not (problem.is_sample and problem.lower.is_sample and problem.cross.is_sample):
        raise ValueError("folds needs samples, that is trajectories and pairs without given weights")
    counts = {
        "upper": problem.weights.shape[0],
        "lower": problem.lower.num_trajectories,
        "cross": problem.cross.num_trajectories,
    }
    for name, count in counts.items():
        if count < folds:
            raise ValueError(f"folds must be at most the number of samples, got {folds} for {count} in {name}")
    third = 2 if folds > 2 else int(with_cross)  # of two folds, the one that what shares data with C does not have
    device = problem.weights.device

    def numbers(name: str, fold: int) -> Tensor:
        return torch.arange(fold % folds, counts[name], folds, device=device)

    parts = [
        problem.fold(numbers("upper", k), numbers("lower", k + 1), numbers("cross", k + third)) for k in range(folds)
    ]
    for number, part in enumerate(parts):
        for name, trajectories in (("lower", part.lower), ("cross", part.cross)):
            if trajectories.num_steps == 0:
                raise ValueError(f"folds must leave steps in each fold, but {name} of fold {number} has none")
    outcomes = [estimator.implicit(part, x0) for part in parts]
    solutions = [outcome.solution for outcome in outcomes if outcome.solution is not None]
    return Outcome(
        implicit=torch.stack([outcome.implicit for outcome in outcomes]).mean(0),
        solution=_combined(solutions) if solutions else None,
    )


def _combined(solutions: list[Solution]) -> Solution:
    """The mean value and summed effort of several solves, with the status and residuals of the worst."""
    worst = max(solutions, key=lambda s: (not s.status.ok, float(s.residuals[-1])))
    costs = [s.cost for s in solutions]
    return dataclasses.replace(
        worst,
        value=torch.stack([s.value for s in solutions]).mean(0),
        iterations=max(s.iterations for s in solutions),
        negative_curvature=any(s.negative_curvature for s in solutions),
        products=sum(s.products for s in solutions),
        cost=None if None in costs else sum(c for c in costs if c is not None),
    )
