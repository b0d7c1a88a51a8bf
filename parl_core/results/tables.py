"""A table as text, for the terminal and for Markdown."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from dataclasses import dataclass

_NUMBER = re.compile(r"[-−+<>≤≥~≈]?\s?[\d.]")
_EMPTY = ("", "–", "—")
_NOTE_WIDTH = 100


@dataclass(frozen=True)
class Table:
    """A table for the terminal and the results page."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    """A sentence or two below it: what the columns are, what holds and what does not."""


def to_text(table: Table) -> str:
    """For the terminal: the title, aligned columns, the note wrapped."""
    columns = _padded(table)
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    rule = "  ".join("─" * _width(cells[0]) for cells in columns)
    note = ["", *textwrap.wrap(table.note, _NOTE_WIDTH)] if table.note else []
    return "\n".join([table.title, "", lines[0], rule, *lines[1:], *note])


def to_markdown(table: Table) -> str:
    """For a page: the title in bold, a table whose columns are aligned in the source as well, the note."""
    escaped = Table(
        title=table.title,
        columns=tuple(map(_escaped, table.columns)),
        rows=tuple(tuple(map(_escaped, row)) for row in table.rows),
    )
    columns, right = _padded(escaped, least=3), _right_aligned(escaped)
    lines = ["| " + " | ".join(cells) + " |" for cells in zip(*columns, strict=True)]
    rules = [
        "-" * (_width(cells[0]) - 1) + (":" if is_right else "-")
        for cells, is_right in zip(columns, right, strict=True)
    ]
    note = ["", table.note] if table.note else []
    return "\n".join([f"**{table.title}**", "", lines[0], "| " + " | ".join(rules) + " |", *lines[1:], *note])


def _padded(table: Table, least: int = 0) -> list[list[str]]:
    """Column by column, the heading first, cells of a column padded to the same width."""
    right, padded = _right_aligned(table), []
    for number, heading in enumerate(table.columns):
        cells = [heading, *(row[number] for row in table.rows)]
        width = max(least, *map(_width, cells))
        fill = [" " * (width - _width(cell)) for cell in cells]
        padded.append([f + c if right[number] else c + f for c, f in zip(cells, fill, strict=True)])
    return padded


def _right_aligned(table: Table) -> list[bool]:
    """For each column, whether it holds numbers.

    Raises:
        ValueError: a row with more or fewer cells than there are columns.
    """
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"Every row of '{table.title}' must have {len(table.columns)} cells, got {row}")
    columns = [[row[number] for row in table.rows] for number in range(len(table.columns))]
    return [bool(cells) and all(cell in _EMPTY or _NUMBER.match(cell) for cell in cells) for cells in columns]


def _width(text: str) -> int:
    """Characters that take room: combining ones do not."""
    return sum(not unicodedata.combining(character) for character in text)


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
