"""Plots of measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hici.report.figures import new_figure, save_figure

Point = tuple[int, float, tuple[float, float] | None]  # context, loss, 95 % interval


def loss_by_context(target: str | Path, series: Mapping[str, Sequence[Point]], title: str) -> Path:
    """A PNG: loss in nats by context length, one line a series, 95 % intervals as bars."""
    figure, axes = new_figure(width=7.0, height=4.5)
    contexts = sorted({context for points in series.values() for context, _, _ in points})
    for i, (label, points) in enumerate(series.items()):
        points = sorted(points)
        aside = 2 ** (0.04 * (i - (len(series) - 1) / 2))  # or the bars of one context hide each other
        losses = [loss for _, loss, _ in points]
        below = [loss - interval[0] if interval else 0.0 for _, loss, interval in points]
        above = [interval[1] - loss if interval else 0.0 for _, loss, interval in points]
        axes.errorbar(
            [c * aside for c, _, _ in points], losses, yerr=[below, above], marker="o", capsize=3, label=label
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("loss, nats a token (bars: 95 % interval)")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=2)
    return save_figure(figure, target)
