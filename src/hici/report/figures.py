"""Figures without a display, written whole."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any


def new_figure(*, columns: int = 1, width: float = 5.0, height: float = 3.6) -> tuple[Any, Any]:
    """(figure, axes): `columns` axes in a row (a single one is returned bare). Needs no display, changes no global."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    for axis in [axes] if columns == 1 else axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


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
