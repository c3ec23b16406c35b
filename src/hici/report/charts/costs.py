"""Speed and memory against context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hici.report.figures import context_ticks, legend_below, legend_height, new_panels, panel_title, plain
from hici.report.series import Series, by_context


def cost_figure(series: Sequence[Series], *, narrow: bool = False) -> Any:
    """Tokens a second, and peak memory, against context; what was not recorded is left out.

    Args:
        series: entries with context, tokens_per_second, peak_memory_bytes.
    """
    below = legend_height([one.name for one in series], narrow=narrow)
    figure, (speed, memory) = new_panels(2, narrow=narrow, height=3.5, below=below)
    for axis, field, scale, title, unit in (
        (speed, "tokens_per_second", 1.0, "speed", "tokens a second"),
        (memory, "peak_memory_bytes", 2**-30, "peak memory", "GiB"),
    ):
        for one in series:
            points = [point for point in by_context(one.entries) if point.get(field)]
            look = one.look
            axis.plot([point["context"] for point in points], [scale * point[field] for point in points],
                      color=look.colour, linestyle=look.dash, marker=look.marker, markerfacecolor=look.face,
                      markersize=7, markeredgewidth=1.6, linewidth=1.8, label=plain(one.name))  # fmt: skip
        context_ticks(axis, [point["context"] for one in series for point in one.entries])
        axis.set_ylim(0, 1.12 * axis.dataLim.ymax)
        axis.set_ylabel(unit)
        panel_title(axis, title, narrow)
    legend_below(figure, speed, narrow=narrow)
    return figure
