"""Which backend an op takes for tensors on a GPU, by their size: the table choice.json, which the benchmarks write.

A rule holds up to a number of elements and says why: what was measured on which device and when, or, where nothing was, by
what reasoning. `python -m benchmarks.gpu choose` turns measurements into rules.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("choice.json")

DEFAULT_ORDER = ("cuda", "triton", "graph")
"""Of ops without a rule, and of what comes after the backend that a rule names."""
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Rule:
    """For tensors that no rule before it covers."""

    backend: str
    because: str
    """How much faster it was than the other, or the reasoning that stands in for a measurement."""
    up_to: int | None = None
    """The most elements, inclusive; None: any number."""
    device: str | None = None
    """What it was measured on; None: not measured."""
    date: str | None = None

    @property
    def grounds(self) -> str:
        """One line on why."""
        source = NOT_MEASURED if self.device is None else f"{self.device}, {self.date}"
        return f"{source}: {self.because}"


def gpu_order(op: str, num_elements: int) -> tuple[str, ...]:
    """The backends for an op on CUDA tensors of so many elements, best first; `reference` closes the list."""
    for rule in rules().get(op, ()):
        if rule.up_to is None or num_elements <= rule.up_to:
            return _ORDERS[rule.backend]
    return (*DEFAULT_ORDER, "reference")


_ORDERS = {
    first: (
        first,
        *(name for name in DEFAULT_ORDER if name != first),
        *(() if first == "reference" else ("reference",)),
    )
    for first in (*DEFAULT_ORDER, "reference")
}


@functools.cache
def rules() -> Mapping[str, tuple[Rule, ...]]:
    """Those of choice.json, by the ops' names; read once, when a tensor on a GPU first asks."""
    return parse(TABLE.read_text())


def parse(text: str) -> dict[str, tuple[Rule, ...]]:
    """The rules of a table.

    Raises:
        ValueError: it is not one, or an op's rules are not in order of size with one for every size.
    """
    table = {op: tuple(Rule(**fields) for fields in listed) for op, listed in json.loads(text).items()}
    for op, listed in table.items():
        bounds = [float("inf") if rule.up_to is None else rule.up_to for rule in listed]
        if bounds != sorted(set(bounds)) or bounds[-1:] != [float("inf")]:
            raise ValueError(f"rules of {op} must have growing up_to, null at the end, got {bounds}")
        if unknown := [rule.backend for rule in listed if rule.backend not in _ORDERS]:
            raise ValueError(f"rules of {op} must name one of {', '.join(_ORDERS)}, got {unknown[0]}")
    return table


def format_table(table: Mapping[str, Sequence[Rule]]) -> str:
    """The table as `parse` reads it."""
    return (
        json.dumps(
            {op: [asdict(rule) for rule in listed] for op, listed in table.items()}, indent=1, ensure_ascii=False
        )
        + "\n"
    )
