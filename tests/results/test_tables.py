"""Tables as text."""

from __future__ import annotations

import pytest

from parl_core.results.tables import Table, to_markdown, to_text

TABLE = Table(
    title="Ours | theirs",
    columns=("method", "‖∇f‖", "at"),
    rows=(("published", ".013", "–"), ("a|b", "10 ± 2", ""), ("π̂", "-1.5", "823")),
    note="What it is | was. " * 10,
)


def test_text_is_aligned_by_what_the_eye_sees():
    assert to_text(TABLE).splitlines()[:7] == [
        "Ours | theirs",
        "",
        "method       ‖∇f‖   at",
        "─────────  ──────  ───",
        "published    .013    –",
        "a|b        10 ± 2",
        "π̂            -1.5  823",
    ]
    assert max(map(len, to_text(TABLE).splitlines()[7:])) <= 100


def test_markdown_is_aligned_and_its_pipes_are_escaped():
    assert to_markdown(TABLE).splitlines() == [
        "**Ours | theirs**",
        "",
        "| method    |   ‖∇f‖ |  at |",
        "| --------- | -----: | --: |",
        "| published |   .013 |   – |",
        "| a\\|b      | 10 ± 2 |     |",
        "| π̂         |   -1.5 | 823 |",
        "",
        TABLE.note,
    ]
    backslash = Table("t", ("a",), (("x\\|y\nz",),))
    assert "| x\\\\\\|y z |" in to_markdown(backslash)


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"row of 't' must have 2 cells, got \('x',\)"):
        to_text(Table("t", ("a", "b"), (("x",),)))
