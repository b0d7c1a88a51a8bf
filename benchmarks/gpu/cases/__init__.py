"""All cases, by topic."""

from __future__ import annotations

from benchmarks.gpu.case import Case

from . import divergence, gaussian, hypergradient, linearization, preference, sac, scan, token_log_prob

TOPICS = (sac, hypergradient, linearization, token_log_prob, divergence, scan, preference, gaussian)


def all_cases(*, tiny: bool = False) -> list[Case]:
    """The most important first.

    Args:
        tiny: sizes that an interpreter on the CPU can compute, to try the cases where there is no GPU.
    """
    cases = [case for topic in TOPICS for case in topic.cases(tiny)]
    return sorted(cases, key=lambda case: case.rank)
