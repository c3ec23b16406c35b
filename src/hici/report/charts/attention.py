"""Where attention goes: to global slots, local slots and tokens; and how alike the slots of segments are."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from hici.report.charts.heat import annotated_heat_map, colour_bar, label_cells
from hici.report.figures import fullest, legend_below, new_panels, panel_title
from hici.report.series import Series

PARTS = ("global", "local", "tokens")
_NAMES = {"global": "global slots", "local": "local slots", "tokens": "tokens"}
# dark, middle, light, each with a hatch of its own
_FILLS = {"global": ("#0072B2", "", "white"), "local": ("#E69F00", "///", "black"), "tokens": ("#D9D9D9", "", "white")}


def shares_figure(series: Sequence[Series], *, narrow: bool = False) -> Any:
    """Share of attention by layer, mean over heads, stacked to 100 percent; one panel a condition.

    Args:
        series: entries with shares: {"global" | "local" | "tokens": [layer][head]}.
    """
    panels = conditions_of(series)
    figure, axes = new_panels(len(panels), narrow=narrow, height=3.3, below=0.35 if not narrow else 0.8)
    for axis, (name, entry) in zip(axes, panels, strict=True):
        means, layers = mean_shares(entry), layers_of(entry)
        below = [0.0] * len(layers)
        for part in PARTS:
            colour, hatch, edge = _FILLS[part]
            values = [100 * share for share in means[part]]
            axis.bar(layers, values, bottom=below, width=0.86, color=colour, hatch=hatch, edgecolor=edge, linewidth=0.4,
                     label=_NAMES[part])  # fmt: skip
            below = [low + value for low, value in zip(below, values, strict=True)]
        _layer_ticks(axis, layers, narrow)
        axis.set_ylabel("attention, percent")
        axis.set_ylim(0, 100)
        axis.grid(axis="x", visible=False)
        panel_title(axis, name, narrow)
    legend_below(figure, axes[0], narrow=narrow)
    return figure


def heads_figure(series: Sequence[Series], *, narrow: bool = False) -> Any:
    """Attention given to slots (global and local) by layer and head, a panel a condition."""
    panels = conditions_of(series)
    values = [[[100 * share for share in row] for row in slot_shares(entry["shares"])] for _, entry in panels]
    height = 1.1 + (0.2 if narrow else 0.22) * max(len(rows) for rows in values)
    figure, axes = new_panels(len(panels), narrow=narrow, height=max(3.0, height), columns=2)
    high = max(value for rows in values for row in rows for value in row)
    image = None
    for axis, (name, entry), rows in zip(axes, panels, values, strict=True):
        image = annotated_heat_map(axis, rows, low=0, high=max(high, 1e-9), narrow=narrow, panels=min(2, len(panels)))
        heads = [str(i) for i in range(len(rows[0]))]
        label_cells(
            axis,
            heads,
            [str(layer) for layer in layers_of(entry)],
            narrow=narrow,
            panels=1 if narrow else min(2, len(panels)),
        )
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
        panel_title(axis, name, narrow)
    colour_bar(figure, image, axes, "attention to slots, percent", narrow=narrow)
    return figure


def similarity_figure(series: Sequence[Series], *, narrow: bool = False) -> Any:
    """Cosine similarity of the slots of two segments: its mean over all pairs by layer, a line a kind of slot.

    Args:
        series: entries with slot_similarity: {"local" | "global": [layer][segment][segment]}.
    """
    panels = [(name, entry) for name, entry in conditions_of(series) if similarities(entry)]
    figure, axes = new_panels(len(panels), narrow=narrow, height=3.3, below=0.35 if not narrow else 0.6)
    looks = {"local": ("#D55E00", "s", "--"), "global": ("#0072B2", "o", "-")}
    for axis, (name, entry) in zip(axes, panels, strict=True):
        for part, matrices in similarities(entry).items():
            colour, marker, dash = looks[part]
            means = [mean_off_diagonal(matrix) for matrix in matrices]
            axis.plot(layers_of(entry), means, color=colour, marker=marker, linestyle=dash,
                      linewidth=1.8, markersize=6, label=_NAMES[part])  # fmt: skip
        axis.set_ylim(min(-0.02, axis.get_ylim()[0]), 1.02)
        _layer_ticks(axis, layers_of(entry), narrow)
        axis.set_ylabel("cosine similarity")
        panel_title(axis, name, narrow)
    legend_below(figure, fullest(axes), narrow=narrow)
    return figure


def _layer_ticks(axis: Any, layers: Sequence[int], narrow: bool) -> None:
    axis.set_xticks(layers[:: max(1, -(-len(layers) // (8 if narrow else 16)))])
    axis.set_xlabel("layer")


def segments_figure(name: str, entry: dict[str, Any], *, narrow: bool = False) -> Any:
    """Similarity of local slots, segment by segment, at the first, the middle and the last layer."""
    matrices = similarities(entry)["local"]
    layers = sorted({0, len(matrices) // 2, len(matrices) - 1})
    figure, axes = new_panels(len(layers), narrow=narrow, columns=3, height=3.4)
    image = None
    for axis, layer in zip(axes, layers, strict=True):
        image = annotated_heat_map(axis, matrices[layer], low=0, high=1, narrow=narrow, digits=2, panels=len(layers))
        segments = [str(i + 1) for i in range(len(matrices[layer]))]
        label_cells(axis, segments, segments, narrow=narrow, panels=1 if narrow else len(layers))
        axis.set_xlabel("segment")
        axis.set_ylabel("segment")
        panel_title(axis, f"layer {layers_of(entry)[layer]}", narrow)
    colour_bar(figure, image, axes, "cosine similarity", narrow=narrow)
    return figure


def conditions_of(series: Sequence[Series]) -> list[tuple[str, dict[str, Any]]]:
    """(name, condition) of every panel; the context is named where a series has several."""
    panels = []
    for one in series:
        for entry in one.entries:
            context = f", {entry['context']:,} tokens" if len(one.entries) > 1 and entry.get("context") else ""
            panels.append((one.name + context, entry))
    return panels


def layers_of(entry: dict[str, Any]) -> list[int]:
    """Numbers of the layers that were looked at."""
    return list(entry.get("layer_numbers") or range(len(entry["shares"]["tokens"])))


def mean_shares(entry: dict[str, Any]) -> dict[str, list[float]]:
    """Mean over heads: {part: [layer]}."""
    return {part: [fmean(heads) for heads in entry["shares"][part]] for part in PARTS}


def slot_shares(shares: dict[str, Any]) -> list[list[float]]:
    """Global plus local, [layer][head or segment]."""
    return [
        [to_global + to_local for to_global, to_local in zip(*rows, strict=True)]
        for rows in zip(shares["global"], shares["local"], strict=True)
    ]


def similarities(entry: dict[str, Any]) -> dict[str, list[Any]]:
    """The kinds of slots whose similarity was measured, between two segments or more."""
    found = entry.get("slot_similarity") or {}
    return {part: found[part] for part in ("local", "global") if found.get(part) and len(found[part][0]) > 1}


def mean_off_diagonal(matrix: Sequence[Sequence[float]]) -> float:
    """Over all pairs of different segments."""
    return fmean(value for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j)
