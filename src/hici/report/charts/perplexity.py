"""Perplexity against length, and loss against position."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hici.report.figures import (
    context_ticks,
    fullest,
    legend_below,
    legend_height,
    new_panels,
    panel_title,
    plain,
    plain_log_scale,
    save_figure,
    tokens,
)
from hici.report.series import Series, by_context, series_of

_LATE = 64  # tokens: the loss behind so many is drawn by itself too


def draw_perplexity(target: str | Path, record: dict[str, Any], title: str) -> Path:
    """The PNG of one result: perplexity against length, or, under protocol position, loss by position."""
    series = series_of([("", record)])
    if record["protocol"]["name"] == "position":
        return save_figure(position_figure(series, title=title), target)
    return save_figure(perplexity_figure(series, title=title), target)


def perplexity_figure(series: Sequence[Series], *, title: str = "", narrow: bool = False) -> Any:
    """One line a series, 95 % intervals as bars. Hollow markers: not causal.

    Args:
        series: of one protocol: lines of two must not be compared. Entries: context, ppl, ppl_interval.
        title: names the protocol.
    """
    figure, (axis,) = new_panels(1, narrow=narrow, height=4.2, below=legend_height(_names(series), narrow=narrow))
    shown = []
    contexts = [point["context"] for one in series for point in one.entries]
    for i, one in enumerate(series):
        points = by_context(one.entries)
        aside = beside(i, len(series), contexts)
        values = [point["ppl"] for point in points]
        bounds = [point.get("ppl_interval") or (value, value) for point, value in zip(points, values, strict=True)]
        error_line(axis, [point["context"] * aside for point in points], values, bounds, one)
        shown += values
    context_ticks(axis, contexts)
    axis.set_ylabel("perplexity (bars: 95 % interval)")
    if max(shown) > 3 * min(shown):  # a model beyond its positions would press all else into one line
        plain_log_scale(axis)
    panel_title(axis, title, narrow)
    legend_below(figure, axis, narrow=narrow)
    return figure


def position_figure(series: Sequence[Series], *, title: str = "", narrow: bool = False) -> Any:
    """Loss by position in the window, a panel a context, and one of its later positions; 95 % intervals as bands.

    The first tokens of a window lose so much more than all others that beside them the others look alike.

    Args:
        series: entries with context and bins: first, last (a position: tokens before it), mean_loss, interval.
    """
    contexts = sorted({entry["context"] for one in series for entry in one.entries})
    panels = [(context, low) for context in contexts for low in (1, _LATE) if low == 1 or context >= 4 * _LATE]
    below = legend_height(_names(series), narrow=narrow)
    figure, axes = new_panels(len(panels), narrow=narrow, height=3.8, below=below)
    for (context, low), axis in zip(panels, axes, strict=True):
        for one in series:
            for entry in one.entries:
                if entry["context"] == context:
                    _draw_bins(axis, [b for b in entry["bins"] if b["first"] >= low], one)
        _position_axis(axis, low, context)
        behind = f", behind {low} tokens" if low > 1 else ""
        panel_title(axis, f"windows of {context:,} tokens{behind}", narrow)
    if title:
        figure.suptitle(plain(title), fontsize=11)
    legend_below(figure, fullest(axes), narrow=narrow)
    return figure


def _position_axis(axis: Any, low: int, context: int) -> None:
    axis.set_xscale("log", base=2)
    least, high = math.ceil(math.log2(low)), math.ceil(math.log2(max(context, 2)))
    step = 2 if high - least > 8 else 1
    ticks = [2**i for i in range(least + (high - least) % step, high + 1, step)]
    axis.set_xticks(ticks, [tokens(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("tokens before the predicted one")
    axis.set_ylabel("loss, nats a token")


def beside(number: int, count: int, contexts: Sequence[int]) -> float:
    """The factor that moves line `number` of `count` to the side, or the bars of one context hide each other."""
    octaves = max(1.0, math.log2(max(contexts) / min(contexts)))
    lengths = sorted(set(contexts))
    nearest = min((math.log2(after / before) for before, after in itertools.pairwise(lengths)), default=octaves)
    step = min(0.06, 0.022 * octaves, 0.6 * nearest / max(1, count - 1))  # lines of two lengths stay apart
    return 2 ** (step * (number - (count - 1) / 2))


def error_line(
    axis: Any, at: Sequence[float], values: Sequence[float], bounds: Sequence[Sequence[float]], one: Series
) -> None:
    """A line in its series' look, with bars from low to high."""
    below = [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)]
    look = one.look
    axis.errorbar(at, values, yerr=[below, above], color=look.colour, linestyle=look.dash, marker=look.marker,
                  markerfacecolor=look.face, markeredgecolor=look.colour, markersize=7, markeredgewidth=1.6,
                  linewidth=1.8, elinewidth=1.2, capsize=3.5, label=plain(one.name))  # fmt: skip


def _draw_bins(axis: Any, bins: list[dict[str, Any]], one: Series) -> None:
    middles = [math.sqrt(max(1, b["first"]) * max(1, b["last"])) for b in bins]
    look = one.look
    axis.plot(middles, [b["mean_loss"] for b in bins], color=look.colour, linestyle=look.dash, marker=look.marker,
              markerfacecolor=look.face, markersize=5.5, linewidth=1.8, label=plain(one.name))  # fmt: skip
    banded = [(x, b["interval"]) for x, b in zip(middles, bins, strict=True) if b.get("interval")]
    if banded:
        axis.fill_between([x for x, _ in banded], [low for _, (low, _) in banded], [high for _, (_, high) in banded],
                          color=look.colour, alpha=0.15, linewidth=0)  # fmt: skip


def _names(series: Sequence[Series]) -> list[str]:
    return [one.name for one in series]
