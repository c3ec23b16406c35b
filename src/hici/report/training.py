"""The picture of training runs: losses, gradient norms, learning rates, speed and memory by optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from hici.eval.labels import NOT_CAUSAL
from hici.report.figures import (
    GREY,
    NARROW_INCHES,
    folded,
    new_mosaic,
    not_recorded,
    plain,
    plain_log_scale,
    save_figure,
)
from hici.report.numbers import is_number
from hici.report.runs import RunLog
from hici.report.tables import size

# Okabe and Ito's colours, which stay apart without full colour vision; every line has a style of its own as well
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
_MARKERS = {"full": "o", "hici": "s", "hici_s2": "^"}
_HELDOUT_COLOURS = {"full": "#D55E00", "hici": "#009E73", "hici_s2": "#CC79A7"}

_LEGEND_LETTERS = 56  # of a line; inside of the losses' panel, or as wide as a phone

_LAYOUT = (("loss", "loss", "hici_norm"), ("loss", "loss", "other_norm"), ("rate", "speed", "memory"))
_NARROW_LAYOUT = (("loss",), ("loss",), ("hici_norm",), ("other_norm",), ("rate",), ("speed",), ("memory",))
_TITLES = {
    "loss": ("loss", "nats a token"),
    "hici_norm": ("gradient norm: HiCI modules", "before clipping"),
    "other_norm": ("gradient norm: LoRA, embeddings, norms", "before clipping"),
    "rate": ("learning rates", ""),
    "speed": ("speed", "tokens a second"),
    "memory": ("peak memory so far", "GiB"),
}


class _Look(NamedTuple):
    colour: str
    style: Any
    label: str | None  # None: a single run, whose name stands in the title


def plot_training(runs: Sequence[RunLog], target: str | Path) -> Path:
    """`training_figure` as a PNG."""
    return save_figure(training_figure(runs), target)


def training_figure(runs: Sequence[RunLog], *, narrow: bool = False) -> Any:
    """One run, or several over one another. A number that no run has is said to be not recorded.

    Args:
        narrow: as wide as a phone, and without the title.
    """
    if narrow:
        figure, axes = new_mosaic(_NARROW_LAYOUT, width=NARROW_INCHES, height=18.0)
    else:
        figure, axes = new_mosaic(_LAYOUT, width=14.0, height=9.6)
    for name, (title, unit) in _TITLES.items():
        large = 15 if name == "loss" else 13
        axes[name].set_title(title, fontsize=11 if narrow else large)
        axes[name].set_ylabel(unit)
        axes[name].set_xlabel("optimizer step")
    single = len(runs) == 1
    for i, run in enumerate(runs):
        look = _Look(_COLOURS[i % len(_COLOURS)], _STYLES[i % len(_STYLES)], None if single else plain(name_of(run)))
        _draw_run(axes, run, look)
    _finish(axes, 9.5 if narrow else 11)
    if narrow and axes["loss"].get_legend():  # it would hide half of the losses
        handles, labels = axes["loss"].get_legend_handles_labels()
        axes["loss"].get_legend().remove()
        labels = [folded(label, _LEGEND_LETTERS) for label in labels]
        figure.legend(handles, labels, loc="outside upper center", fontsize=9.5, frameon=False)
    elif not narrow:
        figure.suptitle(plain(describe_run(runs[0])) if single else f"{len(runs)} runs", fontsize=16)
    return figure


def _draw_run(axes: dict[str, Any], run: RunLog, look: _Look) -> None:
    _draw_loss(axes["loss"], run, look)
    _draw_norms(axes, run, look)
    _draw_rates(axes["rate"], run, look)
    _draw_line(axes["speed"], run, "tokens_per_second", look, smooth=True)
    _draw_line(axes["memory"], run, "peak_memory_bytes", look, scale=2**-30)
    for axis in axes.values():
        for step in run.resumes:
            colour = GREY if look.label is None else look.colour
            label = _once(axis, "resumed") if axis is axes["loss"] else None
            axis.axvline(step, color=colour, linestyle=(0, (1, 2)), linewidth=1.2, label=label)


def name_of(run: RunLog) -> str:
    """Its label, and whether its training loss sees the future."""
    return f"{run.label} (training loss {NOT_CAUSAL})" if run.method in run.leaks_future else run.label


def describe_run(run: RunLog) -> str:
    """Name, method and progress in one line."""
    parts = [run.label]
    if run.method:
        parts.append(f"method {run.method}" + (f", visibility {run.visibility}" if run.visibility else "")
                     + (f" ({NOT_CAUSAL})" if run.method in run.leaks_future else ""))  # fmt: skip
    done = f"{run.steps[-1]['step']:,}"
    parts.append(f"{done} steps" if run.total_steps is None else f"{done} of {run.total_steps:,} steps")
    return "   |   ".join(parts)


def run_facts(run: RunLog) -> dict[str, str]:
    """Names and values of the summary; what a run did not record is left out."""
    facts = {"method": f"{run.method}, visibility {run.visibility}" if run.visibility else run.method or "not recorded"}
    if run.method in run.leaks_future:
        facts["method"] += f" ({NOT_CAUSAL})"
    done = f"{run.steps[-1]['step']:,}" + ("" if run.total_steps is None else f" of {run.total_steps:,}")
    facts["steps done"] = done + ("" if run.ended else " (goes on, or was stopped)")
    if run.resumes:
        facts["resumed at step"] = ", ".join(f"{step:,}" for step in run.resumes)
    _, losses = run.points("loss")
    if losses:
        window = smoothing_window(len(losses))
        facts["last loss"] = f"{losses[-1]:.4f}"
        if window > 1:
            facts["mean loss at the end"] = f"{sum(losses[-window:]) / window:.4f} ({window} steps)"
    timed = [entry for entry in run.steps if is_number(entry.get("tokens")) and is_number(entry.get("seconds"))]
    timed = [entry for entry in timed if entry["tokens"] and entry["seconds"]]
    if timed:
        tokens, seconds = (sum(entry[key] for entry in timed) for key in ("tokens", "seconds"))
        facts["tokens a second"] = f"{tokens / seconds:,.0f}"
        facts["seconds a step"] = f"{seconds / len(timed):,.2f}"
    _, memory = run.points("peak_memory_bytes")
    if memory:
        facts["peak memory"] = size(max(memory))
    for attention, points in run.heldout.items():
        (first, before), (last, after) = points[0], points[-1]
        moved = f"{before:.4f} (step {first:,}) -> {after:.4f} (step {last:,})" if last > first else f"{before:.4f}"
        facts[heldout_label(run, attention)] = moved
    return facts


def heldout_label(run: RunLog, attention: str) -> str:
    """What stands beside every held-out loss: its attention, and whether tokens saw their future."""
    mark = f" ({NOT_CAUSAL}: visibility {run.visibility})" if attention in run.leaks_future else ""
    return f"held-out, {attention} attention{mark}"


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Means of the `window` values around each one (fewer at the ends)."""
    sums = [0.0, *accumulate(values)]
    means = []
    for i in range(len(values)):
        begin, end = max(0, i - window // 2), min(len(values), i + (window + 1) // 2)
        means.append((sums[end] - sums[begin]) / (end - begin))
    return means


def smoothing_window(steps: int) -> int:
    """Steps in a mean: a 25th of the run, at least 5; 1 (no smoothing) for a run of under 10."""
    return max(5, steps // 25) if steps >= 10 else 1


def _draw_loss(axis: Any, run: RunLog, look: _Look) -> None:
    steps, losses = run.points("loss")
    window = smoothing_window(len(losses))
    if window > 1:
        axis.plot(steps, losses, color=look.colour, alpha=0.3, linewidth=0.8, label=_only(look, "training"))
    label = look.label or ("training" if window == 1 else f"training, mean of {window} steps")
    axis.plot(steps, smoothed(losses, window), label=label, **_line(look, steps, width=2.2))
    for attention, points in run.heldout.items():
        colour = _HELDOUT_COLOURS.get(attention, GREY) if look.label is None else look.colour
        hollow = attention in run.leaks_future
        options = {"linestyle": "none", "marker": _MARKERS.get(attention, "D"), "markersize": 9, "markeredgewidth": 1.8}
        legend_colour = colour if look.label is None else GREY  # several runs: the form is named, once
        axis.plot(
            [],
            [],
            color=legend_colour,
            markerfacecolor="white" if hollow else legend_colour,
            label=_once(axis, heldout_label(run, attention)),
            **options,
        )
        axis.plot(
            *zip(*points, strict=True), color=colour, markerfacecolor="white" if hollow else colour, zorder=3, **options
        )


def _draw_norms(axes: Any, run: RunLog, look: _Look) -> None:
    for group in ("hici", "other"):
        axis = axes[f"{group}_norm"]
        _draw_line(axis, run, f"{group}_grad_norm", look, smooth=True)
        if group in run.clips and axis.lines:
            label = _once(axis, f"clip {run.clips[group]:g}")
            if label is not None:
                axis.axhline(run.clips[group], color=GREY, linestyle=(0, (8, 3)), linewidth=1.2, label=label)


def _draw_rates(axis: Any, run: RunLog, look: _Look) -> None:
    for key, name, style in (("hici_learning_rate", "HiCI modules", "--"), ("learning_rate", "the rest", "-")):
        steps, rates = run.points(key)
        if steps:
            options = _line(look, steps, width=1.8) | {"linestyle": style if look.label is None else look.style}
            if look.label is None and key == "hici_learning_rate":
                options["color"] = _COLOURS[1]
            axis.plot(steps, rates, label=_only(look, name), **options)


def _draw_line(axis: Any, run: RunLog, key: str, look: _Look, *, smooth: bool = False, scale: float = 1.0) -> None:
    steps, values = run.points(key)
    if not steps:
        return
    values = [value * scale for value in values]
    window = smoothing_window(len(values)) if smooth else 1
    if window > 1:
        axis.plot(steps, values, color=look.colour, alpha=0.3, linewidth=0.8)
    axis.plot(steps, smoothed(values, window), **_line(look, steps, width=1.8))


def _line(look: _Look, steps: Sequence[int], *, width: float) -> dict[str, Any]:
    marker = "." if len(steps) < 3 else None  # a line of one point shows nothing
    return {"color": look.colour, "linestyle": look.style, "linewidth": width, "marker": marker}


def _once(axis: Any, label: str) -> str | None:
    """The label, unless the axis has it already."""
    return None if label in axis.get_legend_handles_labels()[1] else label


def _only(look: _Look, label: str) -> str | None:
    """A label for a single run: several runs are named once, in the loss."""
    return label if look.label is None else None


def _finish(axes: Any, size: float) -> None:
    from matplotlib.ticker import StrMethodFormatter

    for name, axis in axes.items():
        if not any(len(line.get_xdata()) for line in axis.lines):
            not_recorded(axis)
            continue
        axis.tick_params(labelsize=size)
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if name.endswith("norm"):
            plain_log_scale(axis)
        elif name == "rate":
            axis.set_yscale("log", nonpositive="mask")
        elif name in ("speed", "memory"):
            axis.set_ylim(0, 1.1 * axis.dataLim.ymax)
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        pairs = sorted(
            zip(*axis.get_legend_handles_labels(), strict=True), key=lambda pair: pair[0].get_linestyle() == "None"
        )
        if pairs:  # lines, then markers
            handles, labels = zip(*pairs, strict=True)
            axis.legend(handles, [folded(label, _LEGEND_LETTERS) for label in labels], fontsize=size)
