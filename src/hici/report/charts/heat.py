"""A heat map whose every cell says its number, so that nothing is told by colour alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_SMALLEST = 7.0  # points: smaller numbers are left to the colour bar and the table
_GRID_UP_TO = 40  # columns: lines between smaller cells would hide their colours
_MAP = "cividis"  # alike with and without red and green, and from dark to light in grey


def annotated_heat_map(
    axis: Any,
    values: Sequence[Sequence[float]],
    *,
    low: float,
    high: float,
    narrow: bool,
    digits: int = 0,
    panels: int = 2,
) -> Any:
    """Draw rows of values from `low` (dark) to `high` (light); NaN: a dash on grey. Returns the image.

    panels: beside each other, which leaves less room for the numbers.
    """
    from matplotlib import colormaps

    colours = colormaps[_MAP].with_extremes(bad="#e0e0e0")
    image = axis.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axis.grid(False)
    axis.spines[:].set_visible(False)
    columns = max(len(row) for row in values)
    axis.set_xticks([x - 0.5 for x in range(1, columns)], minor=True)
    axis.set_yticks([y - 0.5 for y in range(1, len(values))], minor=True)
    if columns <= _GRID_UP_TO:
        axis.grid(which="minor", color="white", linewidth=1.2 if columns <= 12 else 0.5)
    axis.tick_params(which="both", length=0)
    letters = digits + 3
    size = min(10.5 if not narrow else 9.5, (270 if narrow else 640 / panels) / (columns * letters * 0.62))
    if size >= _SMALLEST:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                ink = "black" if math.isnan(value) else _ink(image.to_rgba(value))
                text = "–" if math.isnan(value) else f"{value:.{digits}f}"  # noqa: RUF001 (a dash is meant)
                axis.text(x, y, text, ha="center", va="center", fontsize=size, color=ink)
    return image


def label_cells(axis: Any, columns: Sequence[str], rows: Sequence[str], *, narrow: bool, panels: int) -> None:
    """Names of columns and rows, as many as have room."""
    room = (44 if narrow else 108) // panels
    every = max(1, -(-len(columns) * (max(map(len, columns)) + 1) // room))
    axis.set_xticks(range(0, len(columns), every), columns[::every])
    inches = axis.figure.get_figheight() / axis.get_subplotspec().get_gridspec().nrows - 0.8
    every = max(1, math.ceil(0.17 * len(rows) / inches))
    axis.set_yticks(range(0, len(rows), every), rows[::every])


def _ink(colour: Sequence[float]) -> str:
    """Black or white, whichever has more contrast on a colour: at least 4.5 to 1 in WCAG's measure."""
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour[:3])
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "black" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "white"


def colour_bar(figure: Any, image: Any, axes: Sequence[Any], label: str, *, narrow: bool) -> None:
    """What the colours mean, where cells of a map are too small for numbers."""
    if all(axis.texts for axis in axes):
        return
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(label, fontsize=10 if narrow else 11)
    bar.ax.tick_params(labelsize=9.5 if narrow else 10.5)
    bar.outline.set_visible(False)
