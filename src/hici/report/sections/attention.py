"""Attention given to global slots, local slots and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from hici.report.charts.attention import (
    PARTS,
    conditions_of,
    heads_figure,
    layers_of,
    mean_shares,
    shares_figure,
    slot_shares,
)
from hici.report.gather import Gathered
from hici.report.numbers import percent
from hici.report.page import Block, Figure, Table
from hici.report.section import Section
from hici.report.series import Series, series_of


def _draw(gathered: Gathered) -> list[Block]:
    series = series_of(gathered.labelled("inspect"), gathered.looks)

    def draw_shares(narrow: bool) -> object:
        return shares_figure(series, narrow=narrow)

    def draw_heads(narrow: bool) -> object:
        return heads_figure(series, narrow=narrow)

    return [
        Figure(
            "attention-shares",
            draw_shares,
            "How a token's attention is divided, by layer: mean over heads and tokens. Dark: global slots; hatched: "
            "local slots; light: tokens.",
            "Attention shares by layer, stacked. " + " ".join(_sentences(series)),
            _shares_table(series),
        ),
        Figure(
            "attention-heads",
            draw_heads,
            "Attention given to slots, global and local together, by layer and head. Light is more.",
            "Heat map of the attention given to slots by layer and head. " + " ".join(_head_sentences(series)),
            _heads_table(series),
        ),
    ]


def _sentences(series: Sequence[Series]) -> list[str]:
    sentences = []
    for name, entry in conditions_of(series):
        means = {part: fmean(values) for part, values in mean_shares(entry).items()}
        sentences.append(f"{name}: {percent(means['global'])} % to global slots, {percent(means['local'])} % to local "
                         f"slots, {percent(means['tokens'])} % to tokens, mean of the layers.")  # fmt: skip
    return sentences


def _head_sentences(series: Sequence[Series]) -> list[str]:
    sentences = []
    for name, entry in conditions_of(series):
        rows = slot_shares(entry["shares"])
        cells = [(share, layer, head) for layer, heads in enumerate(rows) for head, share in enumerate(heads)]
        (most, layer, head), (least, *_) = max(cells), min(cells)
        where = f"layer {layers_of(entry)[layer]}, head {head}"
        ends = f"the most {percent(most)} % in {where}; the least {percent(least)} %"
        sentences.append(f"{name}: {ends}.")
    return sentences


def _shares_table(series: Sequence[Series]) -> Table:
    rows = []
    for name, entry in conditions_of(series):
        means = mean_shares(entry)
        for row, layer in enumerate(layers_of(entry)):
            rows.append([name, str(layer), *(percent(means[part][row], 2) for part in PARTS)])
    columns = ["run and attention", "layer", "global slots, %", "local slots, %", "tokens, %"]
    return Table("Attention by layer, mean over heads", columns, rows)


def _heads_table(series: Sequence[Series]) -> Table:
    panels = [(name, layers_of(entry), slot_shares(entry["shares"])) for name, entry in conditions_of(series)]
    heads = max(len(table[0]) for _, _, table in panels)
    rows = [
        [name, str(layer), *(percent(share) for share in shares), *["-"] * (heads - len(shares))]
        for name, layers, table in panels
        for layer, shares in zip(layers, table, strict=True)
    ]
    columns = ["run and attention", "layer", *(f"head {i}" for i in range(heads))]
    return Table("Attention to slots by layer and head, percent", columns, rows)


SECTION = Section(50, "Attention by layer", lambda gathered: bool(series_of(gathered.labelled("inspect"))), _draw)
