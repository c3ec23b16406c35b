"""LongEval: accuracy of predictions by number of topics or lines."""

from __future__ import annotations

from hici.report.charts.scores import score_figure
from hici.report.gather import Gathered
from hici.report.numbers import fixed
from hici.report.page import Block, Figure, slug
from hici.report.section import Section
from hici.report.sections.longbench import score_table
from hici.report.series import Series


def _by_kind(gathered: Gathered) -> dict[str, list[Series]]:
    """{"topics" | "lines": results of `hici score`}."""
    found: dict[str, list[Series]] = {}
    for result in gathered.of("score"):
        if result.record.get("accuracy"):
            kind = str(result.record["protocol"].get("name"))
            entries = [{"number": f"{n} {kind}", "score": value} for n, value in result.record["accuracy"].items()]
            look = gathered.looks[result.label, ""]
            one = Series(result.label, "", f"{result.label}: predictions", look, entries)
            found.setdefault(kind, []).append(one)
    return found


def _draw(gathered: Gathered) -> list[Block]:
    return [_figure(kind, series) for kind, series in _by_kind(gathered).items()]


def _figure(kind: str, series: list[Series]) -> Figure:
    def draw(narrow: bool) -> object:
        return score_figure(series, name="number", value="score", label="correct, percent", narrow=narrow)

    numbers = "; ".join(
        f"{one.name}: " + ", ".join(f"{fixed(entry['score'], 1)} % with {entry['number']}" for entry in one.entries)
        for one in series
    )
    return Figure(
        f"longeval-{slug(kind)}",
        draw,
        f"Percent of predictions that are right, by the number of {kind} in the prompt.",
        f"Accuracy by number of {kind}. {numbers}.",
        score_table(f"LongEval {kind}, percent correct", series, "number"),
    )


SECTION = Section(75, "LongEval", lambda gathered: bool(_by_kind(gathered)), _draw)
