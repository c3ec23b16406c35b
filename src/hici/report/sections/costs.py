"""Speed and memory of the perplexity measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hici.report.charts.costs import cost_figure
from hici.report.gather import Gathered
from hici.report.numbers import fixed, gib, listing, whole
from hici.report.page import Block, Figure, Table, slug
from hici.report.section import Section
from hici.report.series import Series, by_context, series_of


def _by_protocol(gathered: Gathered) -> list[tuple[str, list[Series]]]:
    found = [
        (name, series_of(gathered.labelled("perplexity", name), gathered.looks,
                         lambda c: bool(c.get("tokens_per_second") or c.get("peak_memory_bytes"))))
        for name in gathered.protocols("perplexity")
    ]  # fmt: skip
    return [(name, series) for name, series in found if series]


def _draw(gathered: Gathered) -> list[Block]:
    machines = {_device(result.record) for result in gathered.of("perplexity")}
    where = f"on {listing(sorted(machines))}"
    if len(machines) > 1:
        where += "; compare only what one machine measured"
    return [
        _figure(name, series, where) if _lengths(series) > 1 else _table(name, series)
        for name, series in _by_protocol(gathered)
    ]


def _device(record: dict[str, Any]) -> str:
    return str((record["provenance"].get("machine") or {}).get("device", "a machine that is not recorded"))


def _lengths(series: Sequence[Series]) -> int:
    return len({entry["context"] for one in series for entry in one.entries})


def _figure(protocol: str, series: Sequence[Series], where: str) -> Figure:
    def draw(narrow: bool) -> object:
        return cost_figure(series, narrow=narrow)

    return Figure(
        f"costs-{slug(protocol)}",
        draw,
        f"Tokens read a second, and the peak memory meanwhile, the model's weights in it, in the measurement of "
        f"perplexity (protocol {protocol}), {where}.",
        f"Speed and memory against context, protocol {protocol}. " + " ".join(map(_sentence, series)),
        _table(protocol, series),
    )


def _sentence(one: Series) -> str:
    last = by_context(one.entries)[-1]
    return (
        f"{one.name}, {last['context']:,} tokens: {whole(last.get('tokens_per_second'))} tokens a second, "
        f"{gib(last.get('peak_memory_bytes'))} GiB."
    )


def _table(protocol: str, series: Sequence[Series]) -> Table:
    rows = [
        [one.name, whole(c["context"]), whole(c.get("tokens_per_second")), gib(c.get("peak_memory_bytes")),
         fixed(c.get("seconds"), 1)]
        for one in series for c in by_context(one.entries)
    ]  # fmt: skip
    columns = ["run and attention", "context", "tokens a second", "peak memory, GiB", "seconds in all"]
    return Table(f"Speed and memory, protocol {protocol}", columns, rows)


SECTION = Section(100, "Speed and memory", lambda gathered: bool(_by_protocol(gathered)), _draw)
