"""Figures without a display, written whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def new_mosaic(
    layout: Sequence[Sequence[str]], *, width: float, height: float, heights: Sequence[float] | None = None
) -> tuple[Any, dict[str, Any]]:
    """(figure, axes by name): `layout` names what lies where, as in matplotlib's subplot_mosaic.

    `heights`: of the rows, in proportion; None: all alike.
    """
    figure = _bare_figure(width, height)
    axes = figure.subplot_mosaic([list(row) for row in layout], height_ratios=heights)
    for axis in axes.values():
        _style(axis)
    return figure, axes


def new_figure(*, columns: int = 1, width: float = 5.0, height: float = 3.6) -> tuple[Any, Any]:
    """(figure, axes): `columns` axes in a row (a single one is returned bare). Needs no display, changes no global."""
    figure = _bare_figure(width * columns, height)
    axes = figure.subplots(1, columns)
    for axis in [axes] if columns == 1 else axes:
        _style(axis)
    return figure, axes


def _bare_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(axis: Any) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Any, target: str | Path) -> Path:
    """Write a PNG under a temporary name and move it into place."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".png", dir=target.parent)
    os.close(handle)
    try:
        figure.savefig(name, dpi=150, format="png")
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target
