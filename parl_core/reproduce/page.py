"""The results page, from result folders and nothing else: the same folders give the same bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import RunFolderError
from ..files import write_atomically
from ..results.sittings import code, dates, processors, versions
from ..results.tables import to_markdown
from .folder import DEFAULT_OUTPUT, Results, read_results, study_of
from .registry import study_from_settings, study_names

DEFAULT_ROOTS = (Path("docs", "results"), DEFAULT_OUTPUT)
"""Where result folders are looked for: those that are kept, else those that were made here."""

_PREAMBLE = """# Published results, reproduced

`parl reproduce page` writes this page from the result folders that it links to; it is never edited by hand. Each study runs
on a CPU by the command printed with it. Published numbers stand beside ours; ± is the standard error over seeds,
std(ddof=1)/√n. What falls short of the published value is printed like what does not.
"""


def write_page(folders: Sequence[Path], output: Path) -> Path:
    """Write the page.

    Args:
        folders: result folders in the order of their sections.
        output: the page, in Markdown; its links are relative to it.

    Raises:
        RunFolderError: a folder is incomplete or cannot be read, or the page cannot be written.
        UnknownNameError: a folder of an unknown study.
    """
    write_atomically(output, page(folders, output.parent).encode())
    return output


def default_folders() -> tuple[Path, tuple[Path, ...]]:
    """The first of `DEFAULT_ROOTS` that holds results, and these.

    Raises:
        RunFolderError: none does.
    """
    for root in DEFAULT_ROOTS:
        if folders := find_folders(root):
            return root, tuple(folders)
    raise RunFolderError(
        f"neither {' nor '.join(map(str, DEFAULT_ROOTS))} holds a result folder: name folders, or make one with parl "
        "reproduce <study>"
    )


def find_folders(root: Path) -> list[Path]:
    """The folders in `root` that belong to known studies, study by study, then by name."""
    names = study_names()
    folders = sorted((path.parent for path in root.glob("*/settings.json")), key=lambda path: path.name)
    known = [(study_of(path), path) for path in folders if study_of(path) in names]
    return [path for _, path in sorted(known, key=lambda pair: names.index(pair[0]))]


def page(folders: Sequence[Path], base: Path) -> str:
    """The page's text; `base` is what its links are relative to."""
    return "\n".join([_PREAMBLE, *(_section(folder, base) for folder in folders)])


def _section(folder: Path, base: Path) -> str:
    results = read_results(folder)
    try:
        study = study_from_settings(results.study, results.settings)
    except TypeError as error:
        raise RunFolderError(f"{folder} was made with settings that {results.study} does not have: {error}") from error
    parts = [
        f"## {study.title}",
        f"Published: {study.source}",
        _provenance(results),
        *(to_markdown(table) for table in study.tables(results.rows)),
        *(f"![{study.title}: {figure.stem}]({_link(figure, base)})" for figure in results.figures),
        "Data: " + ", ".join(f"[{name}.csv]({_link(folder / f'{name}.csv', base)})" for name in results.rows),
    ]
    return "\n\n".join(parts) + "\n"


def _provenance(results: Results) -> str:
    command, sittings, _ = results.record
    settings = ", ".join(f"{name} {_plain(value)}" for name, value in results.settings.items() if value != "")
    tasks = sum(sitting.tasks for sitting in sittings)
    seconds = sum(sitting.wall_seconds for sitting in sittings)
    return (
        f"    {command}\n\n"
        f"{dates(sittings)}, {code(sittings)}; {versions(sittings)}; "
        f"{processors(sittings)}: {tasks} {'task' if tasks == 1 else 'tasks'} in {_duration(seconds)}. "
        f"Settings: {settings or 'none'}."
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _plain(value: Any) -> str:
    return " ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _link(path: Path, base: Path) -> str:
    return quote(Path(os.path.relpath(path, base)).as_posix())
