"""Results on disk and on the terminal."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from parl_core.bench.results import Contest, read_files, read_results, write_results
from parl_core.bench.show import contest_table, duration, number, summary
from parl_core.errors import ConfigError
from tests.bench.measured import hvp, results, timed


def scan():
    return Contest(topic="scan", name="returns 64x1000", entries=(timed("parl-core", 3e-5, ours=True),))


def test_every_topic_has_its_file_and_is_read_back(tmp_path):
    written = results(hvp(), scan(), hvp(size="h256"))
    paths = write_results(tmp_path / "new" / "folder", written)
    assert [path.name for path in paths] == ["linearization.json", "scan.json"]
    assert read_results(paths[0]) == results(hvp(), hvp(size="h256"))
    assert read_results(paths[0].parent).contests == (hvp(), hvp(size="h256"), scan())
    (paths[0].parent / "memory.json").write_text('{"results": {}}')  # of another kind
    assert [file.contests[0].topic for file in read_files(paths[0].parent)] == ["linearization", "scan"]
    assert json.loads(paths[1].read_text())["environment"]["cpu"] == "a processor"


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_results(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="holds no results"):
        read_results(tmp_path)
    for text in ("{", "[]", '{"environment": {}}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ConfigError, match=r"other\.json holds no results"):
            read_results(tmp_path / "other.json")
    (tmp_path / "other.json").write_text('{"environment": {}, "contests": [{"name": "a"}]}')
    with pytest.raises(ConfigError, match="another version"):
        read_results(tmp_path)


def test_what_is_broken_and_who_is_fastest():
    contest = hvp()
    assert [entry.name for entry in contest.broken] == ["hypergrad"]
    assert contest.fastest.name == "parl-core"
    assert hvp(ours=3e-3).fastest.name == "JAX"
    assert summary([contest, hvp(ours=3e-3), scan()]) == (
        "3 contests; parl-core is the fastest in 2 of 3; wrong or broken: hvp h64, hvp h64"
    )


def shown(contest):
    console = Console(width=150)
    with console.capture() as capture:
        for part in contest_table(contest):
            console.print(part, markup=False)
    return capture.get()


def test_a_table_has_the_fastest_first_and_no_speed_where_there_is_none():
    text = shown(hvp(ours=3e-3))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]
    assert rows == [
        ["JAX *", "2 ms", "1.8 ms – 2.2 ms", "", "", "", ""],
        ["parl-core", "3 ms", "2.7 ms – 3.3 ms", "0.667×", "6", "1.5", "0.25"],
    ]
    for line in (
        "* compiled for one θ",
        "floor 500 µs: 1e+07 flops",
        "gradient 700 µs: one forward and backward pass",
        "betty: not installed: No module named 'betty'",
        "hypergrad: wrong: its error is 7.2e-01, 1e-04 is allowed",
    ):
        assert line in text


def test_a_table_has_no_empty_columns():
    text = shown(scan())
    assert "floor" not in text
    assert "best peer" not in text


def test_numbers_have_three_digits():
    assert [number(value) for value in (0.01234, 1.0, 12.345, 99.96, 1234.5, None)] == [
        "0.0123", "1", "12.3", "100", "1234", "",
    ]  # fmt: skip
    assert [duration(value) for value in (1.23456e-5, 9.996e-4, 0.0123, 1.5, None)] == [
        "12.3 µs", "1000 µs", "12.3 ms", "1.5 s", "",
    ]  # fmt: skip
