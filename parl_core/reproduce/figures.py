"""What the studies' figures share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import import_extra


def pyplot() -> Any:
    """matplotlib.pyplot, without a screen."""
    import_extra("matplotlib", "train", needed_for="A figure").use("Agg")
    return import_extra("matplotlib.pyplot", "train", needed_for="A figure")


def save(figure: Any, path: Path) -> Path:
    """Write the figure, and let go of it."""
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
    return path
