"""The result of a check, and how it is printed."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from torch import Tensor

_WIDTH = 100
_LONGEST_NAME = 28
_AT_THE_SOFT_OPTIMUM = ("Fisher", "HPGD", "BCHG")
# What each lacks, so that it is exact in special cases at most; printed below a table that holds it.
_INEXACT = {
    "LogProbHessian": "leaves the score products out of the Hessian (PARL as printed)",
    "Identity": "has no curvature",
    "SoBiRL": "drops the reward's effect on later values, of which a single step has none",
    "DirectOnly": "leaves out the implicit term, as classical RLHF does",
    "ZeroOrder": "is random, with an error of about √(number of parameters / directions)",
}


@dataclass(frozen=True)
class CheckRow:
    """One estimator against finite differences; None where there is no number."""

    name: str
    relative_error: float | None
    """‖gradient − reference‖ / ‖reference‖, of the total gradient; where the reference is 0, 0 or inf."""
    cosine: float | None
    """Between the two; None where either is 0."""
    norm_ratio: float | None
    """‖gradient‖ / ‖reference‖."""
    cost: float | None
    """Of the linear solve, in gradients of the policy's log-probabilities, where the solve tells it."""
    seconds: float | None
    """Wall-clock time, the finite differences' not included."""
    note: str
    """How the solve ended, warnings, why the estimator does not apply, or the error it raised."""


@dataclass(frozen=True, repr=False)
class CheckTable:
    """What `check_hypergradient` returns; `print` it."""

    title: str
    """What was checked, how finite differences were taken and how accurate they are."""
    rows: tuple[CheckRow, ...]
    """One for each estimator."""
    reference: Tensor
    """(K,) the finite differences: (num_upper_params,), or along K random directions if there are too many."""
    reference_error: float
    """Their own relative error, as estimated from a second step size; errors below it say nothing. inf where the differences
    do not see the implicit term, as the title then says."""

    def __str__(self) -> str:
        """Plain text of at most 100 columns."""
        names = [_short(row.name) + (" *" if row.name in _INEXACT else "") for row in self.rows]
        width = max(map(len, [*names, "estimator"]))
        head = f"{'estimator':<{width}}  rel. error   cosine  norm ratio   cost  seconds  "
        room = _WIDTH - len(head)
        lines, below = [], []
        for name, row in zip(names, self.rows, strict=True):
            note = row.note
            if len(note) > room:
                if note not in below:
                    below.append(note)
                mark = f"[{below.index(note) + 1}]"
                brief = f"{note.split(', ')[0].split(': ')[0]} {mark}"
                note = brief if len(brief) <= room else mark
            lines.append(
                f"{name:<{width}}  {_number(row.relative_error, '.1e'):>10}  {_number(row.cosine, '.4f'):>7}  "
                f"{_ratio(row.norm_ratio):>10}  {_number(row.cost, '.0f'):>5}  {_number(row.seconds, '.3f'):>7}  {note}"
            )
        rule = "─" * _WIDTH
        text = [textwrap.fill(line, _WIDTH) for line in self.title.splitlines()]
        text += ["", f"{head}note", rule, *(line.rstrip() for line in lines), rule]
        text += [_footnote(f"[{number}] ", note) for number, note in enumerate(below, 1)]
        reasons = [f"{row.name} {_INEXACT[row.name]}" for row in self.rows if row.name in _INEXACT]
        if reasons:
            text.append(_footnote("* ", f"not exact in general: {'; '.join(reasons)}."))
        if any(row.name in _AT_THE_SOFT_OPTIMUM and row.relative_error is not None for row in self.rows):
            text.append("  Fisher, HPGD and BCHG are exact only at a soft optimum that the policy class contains.")
        return "\n".join(text)

    __repr__ = __str__


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _ratio(value: float | None) -> str:
    return _number(value, ".4f" if value is None or 1e-3 <= value < 1e4 else ".1e")


def _footnote(mark: str, sentence: str) -> str:
    return textwrap.fill(sentence, _WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark))
