"""The README's Python runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import parl_core as parl

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example(number, capsys):
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})
    printed = capsys.readouterr().out
    assert "CONVERGED" in printed
    number = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
    for line in printed.splitlines():  # the last digits may differ from machine to machine
        (shown,) = [
            row for row in README.read_text().splitlines() if re.sub(number, "#", row) == re.sub(number, "#", line)
        ]
        for given, found in zip(re.findall(number, shown), re.findall(number, line), strict=True):
            assert float(given) == pytest.approx(float(found), rel=0.1, abs=2e-5)


def test_there_are_examples():
    assert BLOCKS


def test_the_table_is_the_one_that_is_printed():
    """But for the seconds, and the last digits of errors at rounding level."""

    def rows(text: str) -> list[tuple[str, str]]:
        found = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
        return [(row[0], row[2]) for row in found if len(row) >= 6 and re.fullmatch(r"[\d.]+", row[2])]

    printed = rows(str(parl.check_hypergradient()))
    assert len(printed) > 15
    assert [row for row in rows(README.read_text()) if row[0] in dict(printed)] == printed
