"""Every estimator side by side against finite differences of a re-solved lower level."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

from torch import Tensor

from ..flat import differentiating
from ..result import Hypergradient, HypergradientWarning
from .bilevel import BilevelProblem, bilevel_subject
from .policy import PolicyProblem, policy_subject
from .reference import Reference, finite_differences
from .subject import Candidate, Options, unchanged
from .table import CheckRow, CheckTable
from .tabular import tabular_problem

Problem = BilevelProblem | PolicyProblem


@differentiating
def check_hypergradient(
    problem: Problem | None = None, *, extra: Mapping[str, Options] | None = None, step: float | None = None
) -> CheckTable:
    """Hold every estimator against finite differences of the upper loss with the lower level solved again.

    >>> import parl_core as parl
    >>> table = parl.check_hypergradient(parl.LinearQuadraticGame())
    >>> [row.name for row in table.rows if row.relative_error < 1e-6]
    ['closed form', 'CG', 'MINRES', 'NystromPCG', 'Neumann', 'Dense']

    Args:
        problem: `PolicyProblem`, `BilevelProblem` or `LinearQuadraticGame`; left out, a tabular MDP that is enumerated and
            solved exactly. Modules are left as they were, also when something raises.
        extra: further rows by name, each the keyword arguments of `hypergradient` (for a policy problem) or
            `implicit_gradient` that it is computed with, e.g. {"mine": {"curvature": …, "solver": …}}.
        step: of the differences, in units of the upper parameters; by default eps^(1/5), 7e-4 in float64. Set it where the
            header says that they are inaccurate.

    Returns:
        `CheckTable`, to be printed. An estimator that does not apply or that raises has a row that says so.

    Raises:
        TypeError, ValueError: a problem or `extra` of the wrong kind; `solve`, `data` or a loss returned the wrong kind.
        Whatever `solve`, `data` or the losses raise themselves while the reference is computed.
    """
    if problem is None:
        problem = tabular_problem()
    if not isinstance(problem, Problem):
        raise TypeError(f"problem must be a PolicyProblem or a BilevelProblem, got {type(problem).__name__}")
    if step is not None and not 0 < step < float("inf"):
        raise ValueError(f"step must be positive and finite, got {step}")
    with ExitStack() as stack:
        if isinstance(problem, PolicyProblem):
            stack.enter_context(unchanged(problem.policy, problem.reward))
            subject = policy_subject(problem, extra)
        else:
            subject = bilevel_subject(problem, extra)
        reference = finite_differences(subject.loss_at, subject.start, step)
        if subject.blind():
            reference = replace(reference, error=float("inf"))
        rows = tuple(_row(candidate, reference) for candidate in subject.candidates)
        title = "\n".join((subject.title, *subject.remarks(), f"reference: {reference.describe()}"))
    return CheckTable(title, rows, reference.values, reference.error)


def _row(candidate: Candidate, reference: Reference) -> CheckRow:
    if candidate.compute is None:
        return CheckRow(candidate.name, None, None, None, None, None, candidate.note)
    result: Hypergradient | Tensor | None = None
    failure = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HypergradientWarning)
        begin = time.perf_counter()
        try:
            result = candidate.compute()
        except Exception as error:  # one estimator's failure is a finding; the others still count
            failure = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        seconds = time.perf_counter() - begin
    sentences = []
    for warning in caught:
        if issubclass(warning.category, HypergradientWarning):
            sentences.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if result is None:
        return CheckRow(candidate.name, None, None, None, None, seconds, failure)

    solution = result.solution if isinstance(result, Hypergradient) else None
    notes = [candidate.note] if candidate.note else []
    if solution is not None:
        notes.append(f"{solution.status.name}, {solution.products} product{'s' * (solution.products != 1)}")
    gradient = reference.seen(result.total if isinstance(result, Hypergradient) else result)
    size, length = float(reference.values.norm()), float(gradient.norm())
    both = length * size
    return CheckRow(
        name=candidate.name,
        relative_error=_ratio(float((gradient - reference.values).norm()), size),
        cosine=float(gradient @ reference.values) / both if both else None,
        norm_ratio=_ratio(length, size),
        cost=None if solution is None else solution.cost,
        seconds=seconds,
        note="; ".join([*notes, *sentences]),
    )


def _ratio(numerator: float, denominator: float) -> float:
    if denominator:
        return numerator / denominator
    return float("inf") if numerator else 0.0
