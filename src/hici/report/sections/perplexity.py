"""Perplexity against length, a figure a protocol: numbers of two protocols are never joined."""

from __future__ import annotations

from collections.abc import Sequence

from hici.report.charts.perplexity import perplexity_figure
from hici.report.gather import Gathered
from hici.report.numbers import fixed, listing, span, whole
from hici.report.page import Block, Figure, Table, Text, slug
from hici.report.section import Section
from hici.report.series import Series, by_context, series_of

_EXPLAINED = {
    "published": "Protocol published: windows every few hundred tokens over one stream, every position of a window "
    "scored, so it is comparable with the LongLoRA and HiCI tables.",
    "strict": "Protocol strict: document by document, each token scored once, behind as much text as the context "
    "holds.",
}


def _protocols(gathered: Gathered) -> list[str]:
    return [name for name in gathered.protocols("perplexity") if name != "position"]


def _draw(gathered: Gathered) -> list[Block]:
    blocks: list[Block] = []
    names = _protocols(gathered)
    if len(names) > 1:
        blocks.append(
            Text(f"The protocols {listing(names)} score other tokens, so their numbers are not compared.", "note")
        )
    for name in names:
        series = series_of(gathered.labelled("perplexity", name), gathered.looks)
        blocks.append(_figure(name, series))
    return blocks


def _figure(protocol: str, series: Sequence[Series]) -> Figure:
    def draw(narrow: bool) -> object:
        return perplexity_figure(series, title=f"perplexity, protocol {protocol}", narrow=narrow)

    explained = _EXPLAINED.get(protocol, f"Protocol {protocol}.")
    return Figure(
        f"perplexity-{slug(protocol)}",
        draw,
        f"{explained} Lower is better; bars are 95 % intervals{_methods(series)}. Lines lie a little beside each "
        "other, so that no bar hides another.",
        f"Perplexity against context, protocol {protocol}. " + " ".join(_sentence(one) for one in series),
        perplexity_table(f"Perplexity, protocol {protocol}", series),
    )


def _methods(series: Sequence[Series]) -> str:
    """ " (bootstrap, unit: document)", where the results say so."""
    found = dict.fromkeys(entry.get("interval_method") for one in series for entry in one.entries)
    told = [method for method in found if method]
    return f" ({'; '.join(told)})" if told else ""


def _sentence(one: Series) -> str:
    points = by_context(one.entries)
    first, last = points[0], points[-1]
    ends = f"{fixed(first['ppl'], 2)} at {first['context']:,} tokens"
    if last is not first:
        ends += f", {fixed(last['ppl'], 2)} at {last['context']:,}"
    return f"{one.name}: {ends}."


def perplexity_table(caption: str, series: Sequence[Series]) -> Table:
    """All numbers of the lines."""
    rows = [
        [one.name, whole(c["context"]), whole(c.get("segments")), fixed(c["ppl"], 3), span(c.get("ppl_interval"), 3),
         fixed(c["mean_loss"], 4), fixed(c.get("standard_error"), 4), whole(c.get("tokens_scored"))]
        for one in series for c in by_context(one.entries)
    ]  # fmt: skip
    columns = [
        "run and attention",
        "context",
        "segments",
        "perplexity",
        "95 % interval",
        "loss, nats",
        "s.e.",
        "tokens scored",
    ]
    return Table(caption, columns, rows)


SECTION = Section(20, "Perplexity against length", lambda gathered: bool(_protocols(gathered)), _draw)
