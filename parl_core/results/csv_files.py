"""Rows as CSV and back, without loss: numbers are numbers again to the last digit, NaN and infinities included."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import RunFolderError
from ..files import write_atomically

Row = dict[str, Any]
"""One line of a CSV: column -> str, int, float or bool."""
Rows = dict[str, list[Row]]
"""CSV name (without .csv) -> its lines. Every line of a CSV has the same columns."""

_INTEGER = re.compile(r"-?[0-9]+")
_FLOAT = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?|nan|-?inf")
_BOOLEANS = {"True": True, "False": False}


def plain_rows(rows: Rows) -> Rows:
    """The same rows in Python's own numbers, which NumPy's scalars become.

    Raises:
        TypeError: a value that is no str, int, float or bool.
        ValueError: rows of one CSV with other columns than its first, or a string that would not be read as the same.
    """
    return {
        name: [
            {column: _plain(f"{name}.{column}", value) for column, value in row.items()} for row in _alike(name, lines)
        ]
        for name, lines in rows.items()
    }


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of the same columns, atomically; no rows make an empty file.

    Raises:
        ValueError: rows with other columns than the first.
        RunFolderError: it could not be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if rows:
        writer.writerow(rows[0])
    writer.writerows([_cell(value) for value in row.values()] for row in _alike(path.stem, rows))
    write_atomically(path, text.getvalue().encode())


def read_csv(path: Path) -> list[Row]:
    """What `write_csv` wrote.

    Raises:
        RunFolderError: there is no such file, or it is no table.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from error
    if any(len(line) != len(lines[0]) for line in lines):
        raise RunFolderError(f"{path} must have {len(lines[0])} cells in every line, as its first has")
    return [dict(zip(lines[0], map(_value, line), strict=True)) for line in lines[1:]]


def _alike(name: str, rows: Iterable[Row]) -> list[Row]:
    rows = list(rows)
    for row in rows:
        if list(row) != list(rows[0]):
            raise ValueError(f"Every row of {name} must have the columns {list(rows[0])}, got {list(row)}")
    return rows


def _plain(place: str, value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    if type(value) not in (str, int, float, bool):
        raise TypeError(f"{place} must be a str, int, float or bool, got {type(value).__name__}")
    if isinstance(value, str) and (set(value) & set("\r\n\0") or not isinstance(_value(value), str)):
        raise ValueError(f"{place} must be one line that does not read as a number or a bool, got {value!r}")
    return value


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _value(cell: str) -> Any:
    if _INTEGER.fullmatch(cell):
        return int(cell)
    if _FLOAT.fullmatch(cell):
        return float(cell)
    return _BOOLEANS.get(cell, cell)
