"""Loss by position in the window."""

from __future__ import annotations

from collections.abc import Sequence

from hici.report.charts.perplexity import position_figure
from hici.report.gather import Gathered
from hici.report.numbers import fixed, span, whole
from hici.report.page import Block, Figure, Table
from hici.report.section import Section
from hici.report.series import Series, by_context, series_of


def _draw(gathered: Gathered) -> list[Block]:
    series = series_of(gathered.labelled("perplexity", "position"), gathered.looks)

    def draw(narrow: bool) -> object:
        return position_figure(series, narrow=narrow)

    return [
        Figure(
            "loss-by-position",
            draw,
            "Mean loss by the number of tokens before the predicted one in its window, in bins that grow; bands are "
            "95 % intervals. A model that uses a longer past has a line that goes on falling to the right.",
            "Loss by position in the window. " + " ".join(_sentences(series)),
            _table(series),
        )
    ]


def _sentences(series: Sequence[Series]) -> list[str]:
    return [
        f"{one.name}, windows of {entry['context']:,}: {fixed(entry['bins'][0]['mean_loss'], 2)} nats at the "
        f"beginning, {fixed(entry['bins'][-1]['mean_loss'], 2)} at the end."
        for one in series
        for entry in by_context(one.entries)
    ]


def _table(series: Sequence[Series]) -> Table:
    rows = [
        [one.name, whole(entry["context"]), f"{b['first']:,} to {b['last']:,}", whole(b["tokens"]),
         fixed(b["mean_loss"], 4), span(b.get("interval"), 4)]
        for one in series for entry in by_context(one.entries) for b in entry["bins"]
    ]  # fmt: skip
    columns = ["run and attention", "window", "tokens before it", "tokens", "loss, nats", "95 % interval"]
    return Table("Loss by position", columns, rows)


SECTION = Section(30, "Loss by position", lambda gathered: "position" in gathered.protocols("perplexity"), _draw)
