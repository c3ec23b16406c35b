"""Retrieval: accuracy by length and depth as a heat map, and by length as lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hici.report.charts.heat import annotated_heat_map, colour_bar, label_cells
from hici.report.charts.perplexity import beside, error_line
from hici.report.figures import context_ticks, legend_below, legend_height, new_panels, panel_title, tokens
from hici.report.series import Series, by_context


def retrieval_heatmap(series: Sequence[Series], *, narrow: bool = False) -> Any:
    """Accuracy in percent, length (across) by depth (down), one panel a series; the number stands in every cell.

    Args:
        series: entries of one task: context, depth (0: the text's beginning), accuracy.
    """
    depths = sorted({entry["depth"] for one in series for entry in one.entries})
    contexts = sorted({entry["context"] for one in series for entry in one.entries})
    height = 0.95 + (0.3 if narrow else 0.34) * max(3, len(depths))
    columns = 3 if len(series) >= 3 and len(contexts) <= 6 else 2
    figure, axes = new_panels(len(series), narrow=narrow, columns=columns, height=height)
    image = None
    for axis, one in zip(axes, series, strict=True):
        found = {(entry["context"], entry["depth"]): 100 * entry["accuracy"] for entry in one.entries}
        values = [[found.get((context, depth), math.nan) for context in contexts] for depth in depths]
        image = annotated_heat_map(axis, values, low=0, high=100, narrow=narrow, panels=1 if narrow else columns)
        names = [tokens(context) for context in contexts], [f"{100 * depth:.0f} %" for depth in depths]
        label_cells(axis, *names, narrow=narrow, panels=1 if narrow else columns)
        axis.set_xlabel("context, tokens (K = 1,024)")
        axis.set_ylabel("depth")
        panel_title(axis, one.name, narrow)
    colour_bar(figure, image, axes, "correct, percent", narrow=narrow)
    return figure


def accuracy_figure(tasks: Sequence[tuple[str, Sequence[Series]]], *, narrow: bool = False) -> Any:
    """Accuracy in percent against length, one panel a task, one line a series; 95 % intervals as bars.

    Args:
        tasks: (name, series): entries with context, accuracy, accuracy_interval.
    """
    names = list(dict.fromkeys(one.name for _, series in tasks for one in series))
    below = legend_height(names, narrow=narrow)
    figure, axes = new_panels(len(tasks), narrow=narrow, columns=2, height=3.3, below=below)
    for axis, (task, series) in zip(axes, tasks, strict=True):
        contexts = [entry["context"] for one in series for entry in one.entries]
        for one in series:
            points = by_context(one.entries)
            aside = beside(names.index(one.name), len(names), contexts)
            values = [100 * point["accuracy"] for point in points]
            bounds = [[100 * bound for bound in point.get("accuracy_interval") or [point["accuracy"]] * 2]
                      for point in points]  # fmt: skip
            error_line(axis, [point["context"] * aside for point in points], values, bounds, one)
        context_ticks(axis, contexts)
        axis.set_ylim(-3, 103)
        axis.set_ylabel("correct, percent")
        panel_title(axis, task, narrow)
    fullest = max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    legend_below(figure, fullest, narrow=narrow)
    return figure
