"""What the figures of several studies share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..pictures import pyplot, save_picture

__all__ = ["COLOURS", "draw_seeds", "panels", "save_picture"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart by the colour-blind as well (Okabe and Ito 2008), the most contrasting first."""


def panels(down: int, across: int, *, width: float = 5.5, height: float = 3.8) -> tuple[Any, Any]:
    """A figure and its axes, (down, across) of them, each `width` × `height` inches, with a light grid."""
    figure, axes = pyplot().subplots(down, across, figsize=(width * across, height * down), squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_seeds(axis: Any, x: Sequence[float], curves: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """Every seed's curve thin, their median thick; `curves` is (seeds, len(x))."""
    import numpy as np

    for curve in curves:
        axis.plot(x, curve, color=colour, linewidth=0.7, alpha=0.3)
    axis.plot(x, np.median(np.asarray(curves), axis=0), color=colour, linewidth=2.2, label=label)
