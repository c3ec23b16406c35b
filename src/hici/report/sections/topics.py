"""LongEval topics: accuracy of predictions by number of topics."""

from __future__ import annotations

from hici.report.charts.scores import score_figure
from hici.report.gather import Gathered
from hici.report.numbers import fixed
from hici.report.page import Block, Figure
from hici.report.section import Section
from hici.report.sections.longbench import score_series, score_table
from hici.report.series import Series


def _series(gathered: Gathered) -> list[Series]:
    return score_series(gathered, "accuracy", "topics")


def _draw(gathered: Gathered) -> list[Block]:
    series = _series(gathered)

    def draw(narrow: bool) -> object:
        return score_figure(series, name="topics", value="score", label="correct, percent", narrow=narrow)

    numbers = "; ".join(
        f"{one.name}: " + ", ".join(f"{fixed(e['score'], 1)} % with {e['topics']} topics" for e in one.entries)
        for one in series
    )
    return [
        Figure(
            "longeval-topics",
            draw,
            "Percent of conversations whose first topic is named, by the number of topics in them.",
            f"Accuracy by number of topics. {numbers}.",
            score_table("LongEval topics, percent correct by number of topics", series, "topics"),
        )
    ]


SECTION = Section(75, "LongEval topics", lambda gathered: bool(_series(gathered)), _draw)
