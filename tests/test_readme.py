"""The README's Python runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import parl_core as parl
from parl_core.bench import page
from parl_core.bench.run import RESULTS

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


def test_published_results_are_those_of_the_results_page():
    """Every count and measurement in the table stands in docs/results.md, up to rounding."""
    page = (README.parent / "docs" / "results.md").read_text()
    table = README.read_text().split("## Reproduce what was published")[1].split("## ")[0]

    def cells(title, first):
        """The page's row that begins with `first`, in the table below `title`."""
        below = page.split(f"**{title}", 1)[1]
        return next(
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in below.splitlines()
            if line.startswith("|") and line.strip("| ").startswith(first)
        )

    for label, method in (
        ("exact gradient", "exact gradient"),
        ("from episodes", "CertaintyEquivalent, 10000 steps"),
        ("best of eight restarts", "exact gradient, restarts"),
    ):
        (reached,) = re.findall(rf"{label} (\d)", table)
        assert f"{method}: {reached} of 9" in page
    steps = "Environment steps until the cosine"
    for name in ("HPGD", "CertaintyEquivalent"):
        measured = [float(cell.replace(",", "")) for cell in cells(steps, name)[1:6:2]]
        told = next(line for line in table.splitlines() if "cosine .95" in line).split("|")[2 if name == "HPGD" else 3]
        numbers = [float(number.replace(" ", "")) for number in re.findall(r"\d[\d ]*\d", told)]
        assert numbers == [float(f"{value:.{2 if value < 1e5 else 3}g}") for value in measured]
    exact = cells("Objective and gradient norm at step 823", "exact gradient")
    assert f"{float(exact[1].split()[0]):.4f}, {exact[3].split()[0].lstrip('0')}" in table
    slopes = [float(cells("T·mean‖∇L‖² by T", f"seed {seed}")[7]) for seed in range(5)]
    assert f"{max(slopes):.3f} to {min(slopes):.3f}".replace("-0", "−") in table
    largest = []
    for name in ("total variation", "squared Hellinger", "Jensen-Shannon"):
        ratios = cells("Largest D_f / bound over the draws, in the direction that", name)[1:8]
        largest.append(f"{max(map(float, ratios)):.2f}".lstrip("0"))
    assert "TV {}, 1−BC {}, JS {}".format(*largest) in table


CONTESTS = [
    path
    for path in (README.parent / RESULTS).glob("*.json")
    if '"contests"' in path.read_text() and not path.name.startswith(page.ON_GPUS)
]


def test_there_is_a_place_for_the_benchmarks():
    page.with_table(README.read_text(), "")


@pytest.mark.skipif(not CONTESTS, reason="no results are committed: make bench, then parl bench --table")
def test_benchmarks_are_those_of_the_results():
    """`parl bench --table` would change nothing."""
    files = page.cpu_results(README.parent)
    assert page.with_table(README.read_text(), page.table(files)) == README.read_text()
    assert (README.parent / page.PAGE).read_text() == page.page(files)
