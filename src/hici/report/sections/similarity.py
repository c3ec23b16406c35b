"""How alike the slots of different segments are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hici.report.charts.attention import (
    conditions_of,
    layers_of,
    mean_off_diagonal,
    segments_figure,
    similarities,
    similarity_figure,
)
from hici.report.gather import Gathered
from hici.report.numbers import MISSING, fixed
from hici.report.page import Block, Figure, Table
from hici.report.section import Section
from hici.report.series import Series, series_of

_KINDS = ("local", "global")


def _series(gathered: Gathered) -> list[Series]:
    return series_of(gathered.labelled("inspect"), gathered.looks, lambda condition: bool(similarities(condition)))


def _draw(gathered: Gathered) -> list[Block]:
    series = _series(gathered)

    def draw(narrow: bool) -> object:
        return similarity_figure(series, narrow=narrow)

    blocks: list[Block] = [
        Figure(
            "slot-similarity",
            draw,
            "Cosine similarity of the slots of two segments, mean of all pairs, by layer. At 1 the slots say the same "
            "of every segment; the lower, the more they tell segments apart.",
            "Similarity of slots by layer. " + " ".join(_sentences(series)),
            _table(series),
        )
    ]
    for number, (name, entry) in enumerate(conditions_of(series), start=1):
        if "local" in similarities(entry):
            blocks.append(_segments(number, name, entry))
    return blocks


def _segments(number: int, name: str, entry: dict[str, Any]) -> Figure:
    def draw(narrow: bool) -> object:
        return segments_figure(name, entry, narrow=narrow)

    matrices = similarities(entry)["local"]
    numbers, shown = layers_of(entry), sorted({0, len(matrices) // 2, len(matrices) - 1})
    means = ", ".join(f"{fixed(mean_off_diagonal(matrices[row]), 2)} in layer {numbers[row]}" for row in shown)
    rows = [
        [f"layer {layer}, segment {i}", *(fixed(value, 3) for value in row)]
        for layer, matrix in zip(numbers, matrices, strict=True)
        for i, row in enumerate(matrix, start=1)
    ]
    columns = ["", *(f"segment {i}" for i in range(1, len(matrices[0]) + 1))]
    return Figure(
        f"slot-similarity-segments-{number}",
        draw,
        f"{name}: local slots, segment against segment, at the first, the middle and the last layer. Light is alike.",
        f"Similarity of local slots between segments, {name}: mean of all pairs {means}.",
        Table("Cosine similarity of local slots, all layers", columns, rows),
    )


def _sentences(series: Sequence[Series]) -> list[str]:
    sentences = []
    for name, entry in conditions_of(series):
        for part, matrices in similarities(entry).items():
            first, last = (fixed(mean_off_diagonal(matrices[layer]), 2) for layer in (0, -1))
            sentences.append(f"{name}, {part} slots: {first} in the first layer, {last} in the last.")
    return sentences


def _table(series: Sequence[Series]) -> Table:
    rows = []
    for name, entry in conditions_of(series):
        found = similarities(entry)
        for row, layer in enumerate(layers_of(entry)):
            means = [fixed(mean_off_diagonal(found[part][row]), 4) if part in found else MISSING for part in _KINDS]
            rows.append([name, str(layer), *means])
    columns = ["run and attention", "layer", *(f"{part} slots" for part in _KINDS)]
    return Table("Mean similarity of two segments", columns, rows)


SECTION = Section(60, "Slots across segments", lambda gathered: bool(_series(gathered)), _draw)
