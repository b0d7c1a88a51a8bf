"""Drawing with matplotlib, without a screen and into complete files only."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from .errors import RunFolderError, import_extra
from .files import write_atomically


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into memory.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    import_extra("matplotlib", "train", needed_for="a plot").use("Agg")
    return import_extra("matplotlib.pyplot", "train", needed_for="a plot")


def save_picture(figure: Any, path: Path) -> Path:
    """Write a figure in the format that the file's name says, and close it.

    Raises:
        RunFolderError: it could not be drawn or written; what was there before still is.
    """
    picture = io.BytesIO()
    try:
        figure.tight_layout()
        figure.savefig(picture, format=path.suffix[1:] or "png", dpi=120)
    except ValueError as error:
        raise RunFolderError(f"Cannot draw {path}: {error}") from error
    finally:
        pyplot().close(figure)
    write_atomically(path, picture.getvalue())
    return path
