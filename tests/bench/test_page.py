"""README's table and the page of all contests."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parl_core.bench.page import BEGIN, END, cpu_results, page, table, with_table, write_table
from parl_core.bench.results import Contest, Entry, write_results
from parl_core.errors import ConfigError
from tests.bench.measured import hvp, results, timed


def test_table_tells_ranges_over_the_sizes():
    files = [results(hvp(), hvp(ours=4e-3, peer=6e-3, size="h256"))]
    assert table(files).splitlines() == [
        "| benchmark | sizes | time | × floor | vs best peer | best peers |",
        "|---|---|---|---|---|---|",
        "| linearization: hvp | 2 | 1 ms – 4 ms | 2 – 8 | 1.5× – 2× | JAX (compiled for one θ) |",
        "",
        "Measured on a processor, 2 threads of 2 cores, Python 3.11.7, torch 2.13.0, jax 0.10.2, 2026-11-21, "
        "commit 0123456789ab.",
    ]


def test_ours_is_the_first_of_ours():
    contest = Contest(
        topic="t",
        name="n",
        entries=(timed("peer", 3.0), timed("default", 2.0, ours=True), timed("other", 1.0, ours=True)),
    )
    assert "| t: n | 1 | 2 s | – | – | peer |" in table([results(contest)])
    assert len(table([results(hvp(), Contest(topic="t", name="n", entries=(timed("peer", 3.0),)))]).splitlines()) == 5


def test_no_other_of_ours_stands_in_for_the_first():
    wrong = Contest(
        topic="t",
        name="n h64",
        entries=(Entry(name="default", ours=True, withheld="wrong: x"), timed("other", 1.0, ours=True)),
    )
    right = Contest(topic="t", name="n h256", entries=(timed("default", 2.0, ours=True),))
    assert "| t: n | 1 | – (1 withheld) | – | – |  |" in table([results(wrong)])
    assert "| t: n | 2 | 2 s (1 withheld) | – | – |  |" in table([results(wrong, right)])


def test_environments_that_differ_are_told_one_by_one():
    scan = Contest(topic="scan", name="returns", entries=(timed("parl-core", 1.0, ours=True),))
    lines = table([results(hvp()), results(scan, dirty=True, jax=None)]).splitlines()[-2:]
    assert lines[0].startswith("linearization: measured on a processor")
    assert lines[1].startswith("scan: measured on a processor")
    assert "commit 0123456789ab with changes" in lines[1]
    assert "jax" not in lines[1]


def test_page_has_everything():
    text = page([results(hvp())])
    for line in (
        "## linearization",
        "**hvp h64** (floor 500 µs: 1e+07 flops)",
        "| **parl-core** | 1 ms | 900 µs – 1.1 ms | 2 | 2× |  | 1.5 | 0.25 |",
        "| JAX (compiled for one θ) | 2 ms | 1.8 ms – 2.2 ms |  |  |  |  |  |",
        "| betty | not installed: No module named 'betty' | | | | | | |",
        "| hypergrad | wrong: its error is 7.2e-01, 1e-04 is allowed | | | | | | |",
    ):
        assert line in text.splitlines()


def test_write_table(tmp_path):
    write_results(tmp_path / "benchmarks" / "results", results(hvp()))
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    write_table(tmp_path)
    assert readme.read_text() == f"above\n{BEGIN}\n{table([results(hvp())])}{END}\nbelow\n"
    assert (tmp_path / "docs" / "benchmarks.md").read_text() == page([results(hvp())])
    write_table(tmp_path)
    assert readme.read_text().count("old") == 0


def test_results_of_gpus_have_a_page_of_their_own(tmp_path):
    (tmp_path / "docs").mkdir()
    on_gpu = replace(hvp(), topic="gpu-linearization")
    write_results(tmp_path / "benchmarks" / "results", results(hvp(), on_gpu))
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}")
    write_table(tmp_path)
    assert [file.contests[0].topic for file in cpu_results(tmp_path)] == ["linearization"]
    assert "gpu-" not in readme.read_text() + (tmp_path / "docs" / "benchmarks.md").read_text()


@pytest.mark.parametrize("text", ["", BEGIN, END + BEGIN, BEGIN + END + BEGIN + END, BEGIN + END + END])
def test_readme_without_its_marks(text):
    with pytest.raises(ConfigError, match="once each, in this order"):
        with_table(text, "")
