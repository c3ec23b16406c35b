"""Retrieval: heat maps of length and depth, and accuracy against length for tasks without a depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hici.report.charts.retrieval import accuracy_figure, retrieval_heatmap
from hici.report.gather import Gathered
from hici.report.numbers import fixed, percent, span, whole
from hici.report.page import Block, Figure, Table, slug
from hici.report.section import Section
from hici.report.series import Series, series_of

_NAMES = {"passkey": "passkey retrieval"}


def _draw(gathered: Gathered) -> list[Block]:
    labelled = gathered.labelled("retrieval")
    tasks = list(dict.fromkeys(c["task"] for _, record in labelled for c in record["conditions"]))
    blocks: list[Block] = []
    flat: list[tuple[str, Sequence[Series]]] = []
    for task in tasks:
        for has_depth in (True, False):

            def keep(c: dict[str, Any], task: str = task, has_depth: bool = has_depth) -> bool:
                return c["task"] == task and (c.get("depth") is not None) == has_depth

            series = series_of(labelled, gathered.looks, keep)
            if series and has_depth:
                blocks.append(_heat_map(task, series))
            elif series:
                flat.append((task, series))
    if flat:
        blocks.append(_lines(flat))
    return blocks


def _heat_map(task: str, series: Sequence[Series]) -> Figure:
    def draw(narrow: bool) -> object:
        return retrieval_heatmap(series, narrow=narrow)

    return Figure(
        f"retrieval-{slug(task)}",
        draw,
        f"{_NAMES.get(task, task).capitalize()}: percent of answers that are right, by length of the text and by the "
        "depth at which it is hidden (0 %: at the beginning). Light is right, dark is wrong.",
        f"Heat map of {_NAMES.get(task, task)}. " + " ".join(map(_sentence, series)),
        _table(f"{task}: accuracy by length and depth", [(task, series)]),
    )


def _lines(tasks: Sequence[tuple[str, Sequence[Series]]]) -> Figure:
    def draw(narrow: bool) -> object:
        return accuracy_figure(tasks, narrow=narrow)

    return Figure(
        "retrieval-by-length",
        draw,
        "Percent of answers that are right, by length; bars are 95 % intervals (Wilson).",
        "Accuracy against length. " + " ".join(f"{task}: {_sentence(one)}" for task, series in tasks for one in series),
        _table("Accuracy by length", tasks),
    )


def _sentence(one: Series) -> str:
    samples = sum(entry["samples"] for entry in one.entries)
    right = sum(entry["accuracy"] * entry["samples"] for entry in one.entries)
    worst = min(one.entries, key=lambda entry: entry["accuracy"])
    depth = "" if worst.get("depth") is None else f" and depth {percent(worst['depth'], 0)} %"
    least = f"{percent(worst['accuracy'], 0)} % at {worst['context']:,} tokens{depth}"
    return f"{one.name}: {percent(right / samples)} % of {samples:,} right, the least {least}."


def _table(caption: str, tasks: Sequence[tuple[str, Sequence[Series]]]) -> Table:
    rows = [
        [one.name, task, whole(c["context"]), "-" if c.get("depth") is None else f"{percent(c['depth'], 0)} %",
         percent(c["accuracy"]), span(c.get("accuracy_interval"), 1, scale=100), whole(c["samples"]),
         fixed(c["accuracy"] * c["samples"], 0)]
        for task, series in tasks
        for one in series
        for c in sorted(one.entries, key=lambda c: (c["context"], c.get("depth") or 0))
    ]  # fmt: skip
    columns = ["run and attention", "task", "context", "depth", "correct, %", "95 % interval", "samples", "right"]
    return Table(caption, columns, rows, text_columns=2)


SECTION = Section(40, "Retrieval", lambda gathered: bool(series_of(gathered.labelled("retrieval"))), _draw)
