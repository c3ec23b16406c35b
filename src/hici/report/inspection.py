"""The table and the picture of a result of `hici inspect` (see `hici.eval.inspection`)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hici.eval.conditions import attention_label
from hici.report.figures import new_mosaic, save_figure
from hici.report.tables import integer, print_table

# names, colours (of cividis but the last) and hatches: told apart without colour vision and in grey print
_GLOBAL, _LOCAL = "#00224e", "#7c7b78"
_PARTS = (
    ("global slots", _GLOBAL, "//", "white"),
    ("local slots", _LOCAL, "..", "black"),
    ("first token of the segment", "#fee838", "xx", "black"),
    ("other tokens of the segment", "#ececec", "", "black"),
)
_NUMBERS_UP_TO = 8  # segments whose similarities are also written into the cells
_TICKS = 9  # about so many on an axis


def print_inspection(record: dict[str, Any]) -> None:
    """Shares of each layer as a table on stdout, means over heads with the least and the greatest head."""
    (condition,) = record["conditions"]
    shares = {name: np.array(each) for name, each in condition["shares"].items()}
    first = np.array(condition["first_token"])
    rows = []
    for row, number in enumerate(condition["layer_numbers"]):
        heads = [_percent_range(shares[name][row]) for name in ("global", "local", "tokens")]
        rows.append([str(number), *heads, _percent(first[row].mean())])
    means = [_percent(shares[name].mean()) for name in ("global", "local", "tokens")]
    rows.append(["mean", *means, _percent(first.mean())])
    columns = ["layer", "global slots (heads)", "local slots (heads)", "tokens (heads)", "of it the first token"]
    print_table(_title(record, condition), columns, rows, _notes(condition))


def draw_inspection(target: str | Path, record: dict[str, Any]) -> Path:
    """A PNG: the slots' share by layer and head, all shares by layer and by segment, and how alike slots are."""
    (condition,) = record["conditions"]
    numbers = condition["layer_numbers"]
    compared = [kind for kind in ("local", "global") if len(condition["slot_similarity"][kind][0]) > 1]
    figure, axes = new_mosaic(
        [["heads"] * 2 + ["layers"] * 2 + ["segments"] * 2,
         [kind for kind in compared for _ in range(2)] + ["alike"] * (6 - 2 * len(compared))],
        width=16.0, height=9.6,
    )  # fmt: skip
    _draw_heads(figure, axes["heads"], condition, numbers)
    first = np.array(condition["first_token"]).mean(1)
    by_layer = [np.array(condition["shares"][name]).mean(1) for name in ("global", "local", "tokens")]
    _draw_stack(axes["layers"], [*by_layer[:2], first, by_layer[2] - first], numbers, "layer")
    axes["layers"].set_title("by layer, mean over heads")
    by_segment = {name: np.array(each).mean(0) for name, each in condition["by_segment"].items()}
    parts = [by_segment["global"], by_segment["local"], by_segment["first_token"]]
    _draw_stack(axes["segments"], [*parts, by_segment["tokens"] - parts[2]], range(1, len(parts[0]) + 1), "segment")
    axes["segments"].set_title("by segment, mean over layers and heads")
    for kind in compared:
        _draw_similarity(figure, axes[kind], condition["slot_similarity"][kind], kind)
    _draw_alike(axes["alike"], condition, numbers)
    handles, labels = axes["layers"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), handlelength=2.5, handleheight=1.4)
    figure.suptitle("\n".join(textwrap.wrap(_title(record, condition), 130)), fontsize=14)
    return save_figure(figure, target)


def _title(record: dict[str, Any], condition: dict[str, Any]) -> str:
    used, available = len(record["protocol"]["windows"]["starts"]), record["protocol"]["windows"]["available"]
    model = (record["model"] or {}).get("path", "a model")
    segments = condition["segments"]
    cut = "1 segment" if segments == 1 else f"{segments} segments of {integer(condition['segment_size'])}"
    return (
        f"Attention of {model}, {attention_label(condition)}: {integer(condition['context'])} tokens in {cut}, "
        f"{'mean of ' if used > 1 else ''}{used} of {available} window{'s' if available > 1 else ''}"
    )


def _notes(condition: dict[str, Any]) -> list[str]:
    first_has_none, segments = condition["visibility"] == "past", condition["segments"]
    over = "all segments" if not first_has_none else "segment 2" if segments == 2 else f"segments 2 to {segments}"
    notes = [f"Mean over the query tokens of {over}; in brackets the least and the greatest head."]
    if first_has_none:
        everywhere = {name: np.mean(each) for name, each in condition["shares_all_tokens"].items()}
        facts = [f"{name} {_percent(everywhere[name])}" for name in ("global", "local", "tokens")]
        notes.append(f"Segment 1 has no slots. With its tokens counted: {', '.join(facts)}.")
    spread = np.array([condition["by_window"][kind] for kind in ("global", "local")]).sum(0)
    if len(spread) > 1:
        notes.append(f"Slots together, window by window: {_percent(spread.min())} to {_percent(spread.max())}.")
    for kind in ("local", "global"):
        across, within = _across(condition["slot_similarity"][kind]), _numbers(condition["slot_likeness"][kind])
        facts = [
            f"{what} {np.nanmean(values):.3f}"
            for what, values in (("of two segments", across), ("of two slots in a segment", within))
            if np.isfinite(values).any()
        ]
        if facts:
            notes.append(f"Cosine of {kind} slots: {', '.join(facts)} (mean over layers).")
    return notes


def _draw_heads(figure: Any, axis: Any, condition: dict[str, Any], numbers: Sequence[int]) -> None:
    slots = 100 * (np.array(condition["shares"]["global"]) + np.array(condition["shares"]["local"]))
    image = axis.imshow(slots, cmap="cividis", vmin=0, aspect="auto", interpolation="nearest", origin="lower")
    axis.grid(False)
    _ticks(axis.set_yticks, numbers)
    _ticks(axis.set_xticks, range(slots.shape[1]))
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    axis.set_title("attention to slots, global and local together")
    figure.colorbar(image, ax=axis, label="% of the attention")


def _draw_stack(axis: Any, parts: Sequence[np.ndarray], numbers: Sequence[int], what: str) -> None:
    places, below = np.arange(len(numbers)), np.zeros(len(numbers))
    for values, (name, colour, hatch, hatch_colour) in zip(parts, _PARTS, strict=True):
        axis.bar(places, 100 * values, bottom=below, width=0.9, label=name, color=colour, hatch=hatch,
                 edgecolor=hatch_colour, linewidth=0.4)  # fmt: skip
        below = below + 100 * values
    _ticks(axis.set_xticks, numbers)
    axis.set_ylim(0, 100)
    axis.set_axisbelow(True)
    axis.set_xlabel(what)
    axis.set_ylabel("% of the attention")


def _draw_similarity(figure: Any, axis: Any, layers: Sequence[Any], kind: str) -> None:
    cosines = np.array(layers).mean(0)
    segments = len(cosines)
    image = axis.imshow(cosines, cmap="cividis", vmin=min(0.0, cosines.min()), vmax=1, interpolation="nearest")
    axis.grid(False)
    names = [f"1..{n}" if kind == "global" and n > 1 else str(n) for n in range(1, segments + 1)]
    _ticks(axis.set_xticks, names)
    _ticks(axis.set_yticks, names)
    axis.set_xlabel("over the segments" if kind == "global" else "of segment")
    axis.set_title(f"{kind} slots of two segments: cosine, mean over layers")
    if segments <= _NUMBERS_UP_TO:
        middle = (image.norm.vmin + 1) / 2
        for (row, column), cosine in np.ndenumerate(cosines):
            colour = "black" if cosine > middle else "white"
            axis.text(column, row, f"{cosine:.3f}", ha="center", va="center", color=colour, fontsize=10)
    figure.colorbar(image, ax=axis)


def _draw_alike(axis: Any, condition: dict[str, Any], numbers: Sequence[int]) -> None:
    places = np.arange(len(numbers))
    for kind, colour, marker in (("local", _LOCAL, "o"), ("global", _GLOBAL, "s")):
        across, within = _across(condition["slot_similarity"][kind]), _numbers(condition["slot_likeness"][kind])
        for values, line, what in ((across, "-", "two segments"), (within, ":", "two slots of a segment")):
            if np.isfinite(values).any():
                axis.plot(places, values, line, marker=marker, color=colour, label=f"{kind}, {what}",
                          markerfacecolor=colour if line == "-" else "white")  # fmt: skip
    _ticks(axis.set_xticks, numbers)
    axis.set_xlabel("layer")
    axis.set_ylabel("cosine (1: alike)")
    axis.set_title("how alike slots are, by layer")
    if axis.lines:
        low = min(np.nanmin(line.get_ydata()) for line in axis.lines)
        axis.set_ylim(min(0.0, low) - 0.03, 1.03)  # always to 1: differences of nothing must look like nothing
        axis.legend(handlelength=4)


def _across(layers: Sequence[Sequence[Sequence[float]]]) -> np.ndarray:
    """Mean similarity of two different segments by layer; NaN where there are no two."""
    cosines = np.array(layers)
    segments = cosines.shape[1]
    if segments < 2:
        return np.full(len(cosines), np.nan)
    return np.asarray(cosines[:, ~np.eye(segments, dtype=bool)].mean(1))


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array(values, dtype=float)  # None is NaN


def _ticks(set_ticks: Any, labels: Sequence[Any]) -> None:
    labels = list(labels)
    every = range(0, len(labels), -(-len(labels) // _TICKS))
    set_ticks(list(every), [str(labels[place]) for place in every])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _percent_range(heads: np.ndarray) -> str:
    return f"{_percent(heads.mean())} ({100 * heads.min():.1f} to {100 * heads.max():.1f})"
