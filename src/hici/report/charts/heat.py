"""A heat map whose every cell says its number, so that nothing is told by colour alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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
    axis.grid(which="minor", color="white", linewidth=1.2)
    axis.tick_params(which="both", length=0)
    letters = digits + 3
    size = min(10.5 if not narrow else 9.5, (270 if narrow else 640 / panels) / (columns * letters * 0.62))
    if size >= 5:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                dark = math.isnan(value) or image.norm(value) > 0.55
                text = "–" if math.isnan(value) else f"{value:.{digits}f}"  # noqa: RUF001 (a dash is meant)
                axis.text(x, y, text, ha="center", va="center", fontsize=size, color="black" if dark else "white")
    return image


def colour_bar(figure: Any, image: Any, axes: Any, label: str, *, narrow: bool) -> None:
    """What the colours mean, where cells are too small for numbers."""
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(label, fontsize=10 if narrow else 11)
    bar.ax.tick_params(labelsize=9.5 if narrow else 10.5)
    bar.outline.set_visible(False)
