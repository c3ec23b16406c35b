"""Figures without a display, written whole; each in two widths, since a wide one cannot be read on a phone."""

from __future__ import annotations

import io
import math
import os
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WIDE_INCHES, NARROW_INCHES = 10.0, 4.4
_DPI = {False: 160, True: 220}  # a phone has more pixels an inch
GREY = "#595959"


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


def new_panels(
    count: int, *, narrow: bool, columns: int = 2, height: float = 3.6, below: float = 0.0
) -> tuple[Any, list[Any]]:
    """(figure, `count` axes) as wide as a page, or as a phone where `narrow` (then one column).

    Args:
        columns: at most so many beside each other. height: of a row, in inches. below: more for a legend.
    """
    columns = 1 if narrow else min(count, columns)
    rows = math.ceil(count / columns)
    figure = _bare_figure(NARROW_INCHES if narrow else WIDE_INCHES, height * rows + below)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        _style(axis, narrow)
    return figure, axes[:count]


def _bare_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(axis: Any, narrow: bool = False) -> None:
    """A quiet frame and grid, and text that can be read."""
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9.5 if narrow else 10.5)
    for direction in (axis.xaxis, axis.yaxis):
        direction.label.set_fontsize(10 if narrow else 11)


def panel_title(axis: Any, title: str, narrow: bool = False) -> None:
    """Left, bold, folded where it is longer than its panel."""
    width = axis.get_subplotspec().get_gridspec().ncols
    letters = 42 if narrow else {1: 96, 2: 43, 3: 24}[width]
    axis.set_title(folded(plain(title), letters), loc="left", fontsize=10.5 if narrow else 11.5, fontweight="bold")


def legend_below(figure: Any, axis: Any, *, narrow: bool) -> None:
    """The lines of `axis` named below the figure, in as many columns as fit."""
    handles, labels = axis.get_legend_handles_labels()
    if not handles:
        return
    labels = [folded(label, _legend_letters(narrow)) for label in labels]
    columns = _legend_columns(labels, narrow)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9.5 if narrow else 10.5,
                  frameon=False, handlelength=3.6, columnspacing=1.6)  # fmt: skip


def fullest(axes: Sequence[Any]) -> Any:
    """The one whose legend names the most: a panel may lack a line that another has."""
    return max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1]))


def legend_height(names: Sequence[str], *, narrow: bool) -> float:
    """Inches that `legend_below` takes."""
    labels = [folded(name, _legend_letters(narrow)) for name in names]
    columns = _legend_columns(labels, narrow)
    lines = sum(label.count("\n") + 1 for label in labels) if columns == 1 else math.ceil(len(labels) / columns)
    return 0.15 + 0.22 * lines


def _legend_columns(labels: Sequence[str], narrow: bool) -> int:
    longest = max((len(line) for label in labels for line in label.split("\n")), default=0)
    return 1 if narrow else max(1, min(len(labels), 4, 120 // (longest + 9)))


def _legend_letters(narrow: bool) -> int:
    """That a line of a legend below a figure has room for."""
    return 50 if narrow else 100


def folded(text: str, letters: int) -> str:
    """In lines of at most so many letters, so that a long name is not cut at the figure's edge."""
    return "\n".join(textwrap.wrap(text, letters, drop_whitespace=False)) if len(text) > letters else text


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: no mathematics, and not hidden for its first underscore."""
    return f" {text}".replace("$", r"\$") if text.startswith("_") else text.replace("$", r"\$")


def tokens(count: float) -> str:
    """8192 -> "8K", 3500 -> "3,500"."""
    return f"{count / 1024:g}K" if count >= 1024 and count % 1024 == 0 else f"{count:,.0f}"


def context_ticks(axis: Any, contexts: Sequence[int]) -> None:
    """A logarithmic axis of lengths, with a tick at each that was measured, and names where there is room."""
    contexts = sorted(set(contexts))
    named = _named_ticks(axis, contexts)
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [tokens(context) if context in named else "" for context in contexts])
    axis.minorticks_off()
    if len(contexts) == 1:
        axis.set_xlim(contexts[0] / 2, contexts[0] * 2)
    axis.set_xlabel("context, tokens (K = 1,024)")


def _named_ticks(axis: Any, contexts: Sequence[int]) -> set[int]:
    """The ends, then the roundest numbers, as long as none comes too close to another."""
    inches = 0.85 * axis.figure.get_figwidth() / axis.get_subplotspec().get_gridspec().ncols
    octaves = math.log2(contexts[-1] / contexts[0])
    least = (0.1 + 0.1 * max(len(tokens(context)) for context in contexts)) * octaves / inches
    named: list[int] = []
    # a number's lowest set bit: 4096 is rounder than 5120
    for context in sorted(contexts, key=lambda c: (c not in (contexts[-1], contexts[0]), -(c & -c), c)):
        if all(abs(math.log2(context / other)) >= least for other in named):
            named.append(context)
    return set(named)


def not_recorded(axis: Any) -> None:
    """An axis without numbers says so."""
    axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", va="center", color=GREY)
    axis.set(xticks=[], yticks=[])


def plain_log_scale(axis: Any) -> None:
    """A logarithmic y axis with plain numbers, and some between the powers of ten where there are few of these."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log", nonpositive="mask")
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    low, high = axis.get_ylim()
    axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5) if high < 10 * low else (2, 5)))
    axis.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}") if high < 100 * low else NullFormatter())
    axis.tick_params(which="minor", labelsize=axis.yaxis.get_ticklabels()[0].get_fontsize())


def png_bytes(figure: Any, *, narrow: bool = False) -> bytes:
    """The PNG: the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=_DPI[narrow], format="png", metadata={"Software": None})
    return buffer.getvalue()


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
