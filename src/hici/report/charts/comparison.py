"""A training comparison: held-out perplexity by length, with every seed, and the loss while training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from hici.report.figures import (
    context_ticks,
    legend_below,
    legend_height,
    new_panels,
    panel_title,
    plain,
    plain_log_scale,
)
from hici.report.series import Look
from hici.report.training import smoothed, smoothing_window


class Trained(NamedTuple):
    """A way to train, and the attention that it was measured in.

    Attributes:
        losses: {context: mean loss of every seed}, nats.
        curves: training losses of every seed, by step; empty for a base.
    """

    name: str
    look: Look
    losses: dict[int, list[float]]
    curves: list[list[float]]


def comparison_figure(trained: Sequence[Trained], *, narrow: bool = False) -> Any:
    """Left: perplexity by length, mean of the seeds, each seed as a small point. Right: training loss, mean of all."""
    curves = [one for one in trained if one.curves]
    below = legend_height([one.name for one in trained], narrow=narrow)
    figure, axes = new_panels(2 if curves else 1, narrow=narrow, height=3.9, below=below)
    _draw_perplexity(axes[0], trained)
    panel_title(axes[0], "held-out perplexity (small points: seeds)", narrow)
    if curves:
        for number, one in enumerate(curves):
            steps = min(map(len, one.curves))
            means = [fmean(losses[i] for losses in one.curves) for i in range(steps)]
            every = max(1, steps // 6)
            axes[1].plot(range(1, steps + 1), smoothed(means, smoothing_window(steps)), color=one.look.colour,
                         linestyle=one.look.dash, linewidth=1.6, marker=one.look.marker, markersize=5.5,
                         markevery=(every * number // len(curves), every))  # fmt: skip
        axes[1].xaxis.get_major_locator().set_params(integer=True)
        axes[1].set_xlabel("optimizer step")
        axes[1].set_ylabel("training loss, nats a token")
        panel_title(axes[1], "training loss, in own attention", narrow)
    legend_below(figure, axes[0], narrow=narrow)
    return figure


def _draw_perplexity(axis: Any, trained: Sequence[Trained]) -> None:
    shown = []
    for one in trained:
        look, contexts = one.look, sorted(one.losses)
        means = [math.exp(fmean(one.losses[context])) for context in contexts]
        shown += means
        axis.plot(contexts, means, color=look.colour, linestyle=look.dash, marker=look.marker, markersize=7,
                  markerfacecolor=look.face, markeredgewidth=1.6, linewidth=1.8, label=plain(one.name))  # fmt: skip
        for context in contexts:
            seeds = [math.exp(loss) for loss in one.losses[context]]
            axis.plot([context] * len(seeds), seeds, color=look.colour, marker=look.marker, linestyle="", markersize=3)
    context_ticks(axis, [context for one in trained for context in one.losses])
    axis.set_ylabel("perplexity")
    if max(shown) > 3 * min(shown):
        plain_log_scale(axis)
