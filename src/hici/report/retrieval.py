"""Tables and heat maps of retrieval results. They are made from a result's record alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hici.eval.conditions import attention_label
from hici.eval.statistics import wilson_interval
from hici.report.charts.heat import annotated_heat_map, label_cells
from hici.report.figures import new_mosaic, save_figure
from hici.report.tables import integer, interval

GRID_DEPTHS = 6  # up to so many depths are columns of the table; of more the mean and the lowest are shown

_NO_DEPTH = "no depth"
_ROW, _FRAME, _LEAST_WIDTH = 0.36, 0.9, 5.5  # inches: a depth, what stands around a panel, a figure


def by_task(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Entries of a record by task, in their order."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for condition in record["conditions"]:
        tasks.setdefault(condition["task"], []).append(condition)
    return tasks


def depths_of(conditions: Sequence[dict[str, Any]]) -> list[float]:
    """Depths of entries, ascending; none for tasks without."""
    return sorted({c["depth"] for c in conditions if c["depth"] is not None})


def table(conditions: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of one task: a row for every attention and length."""
    depths = depths_of(conditions)
    grid = 1 < len(depths) <= GRID_DEPTHS
    columns = ["attention", "length", "prompts", "accuracy", "95 %"]
    columns += [f"at {depth:.2f}" for depth in depths] if grid else (["lowest"] if len(depths) > 1 else [])
    columns += ["answer loss", "prompt tokens", "seconds"]
    rows = []
    for (label, context), cells in _lines(conditions).items():
        samples = sum(cell["samples"] for cell in cells)
        points = sum(cell["accuracy"] * cell["samples"] for cell in cells)
        row = [label, integer(context), str(samples), f"{points / samples:.3f}"]
        row.append(interval(wilson_interval(min(points, samples), samples), 2))
        at = {cell["depth"]: cell["accuracy"] for cell in cells}
        if grid:
            row += [f"{at[depth]:.2f}" for depth in depths]
        elif len(depths) > 1:
            lowest = min(at, key=lambda depth: at[depth])
            row.append(f"{at[lowest]:.2f} at {lowest:.2f}")
        tokens = [cell["prompt_tokens"] for cell in cells]
        row += [_mean_loss(cells), f"{min(low for low, _ in tokens):,}-{max(high for _, high in tokens):,}"]
        rows.append([*row, f"{sum(cell['seconds'] for cell in cells):.1f}"])
    return columns, rows


def heat_maps(target: str | Path, record: dict[str, Any], title: str) -> Path:
    """A PNG of accuracies: a row of panels a task, a panel an attention; length to the right, depth downwards."""
    tasks = by_task(record)
    labels = list(dict.fromkeys(attention_label(c) for c in record["conditions"]))
    panels = [[f"{task}/{label}" for label in labels] for task in tasks]
    most = max(len(_contexts(cells)) for cells in tasks.values())
    rows = [max(1, len(depths_of(cells))) for cells in tasks.values()]
    width = max(_LEAST_WIDTH, len(labels) * (1.8 + 0.75 * most))
    height = 0.7 + len(tasks) * _FRAME + sum(rows) * _ROW
    figure, axes = new_mosaic(panels, width=width, height=height, heights=[_FRAME + n * _ROW for n in rows])
    for task, cells in tasks.items():
        for label in labels:
            own = [c for c in cells if attention_label(c) == label]
            heat_map(axes[f"{task}/{label}"], own, f"{task}, {label}", len(labels))
    figure.suptitle(f"{title}: percent correct", fontsize=11)
    return save_figure(figure, target)


def heat_map(axis: Any, conditions: Sequence[dict[str, Any]], title: str, panels: int) -> None:
    """One panel of `panels` side by side, of one task and attention: percent correct, every cell with its number."""
    contexts = _contexts(conditions)
    depths: list[float | None] = [*depths_of(conditions)] or [None]
    values = {(c["depth"], c["context"]): 100 * c["accuracy"] for c in conditions}
    shown = [[values.get((depth, context), math.nan) for context in contexts] for depth in depths]
    annotated_heat_map(axis, shown, low=0, high=100, narrow=False, panels=panels)
    rows = [_NO_DEPTH if depth is None else f"{100 * depth:.0f} %" for depth in depths]
    label_cells(axis, [f"{context:,}" for context in contexts], rows, narrow=False, panels=panels)
    axis.set_xlabel("length, tokens")
    if depths != [None]:
        axis.set_ylabel("depth")
    axis.set_title(title, fontsize=10)


def _lines(conditions: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for condition in conditions:
        lines.setdefault((attention_label(condition), condition["context"]), []).append(condition)
    return lines


def _contexts(conditions: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({condition["context"] for condition in conditions})


def _mean_loss(cells: Sequence[dict[str, Any]]) -> str:
    losses = [(cell["answer_loss"], cell["samples"]) for cell in cells if cell["answer_loss"] is not None]
    if not losses:
        return "-"
    return f"{sum(loss * n for loss, n in losses) / sum(n for _, n in losses):.3f}"
