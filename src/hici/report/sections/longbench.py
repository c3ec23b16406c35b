"""LongBench: scores by data set, measured here or of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from hici.report.charts.scores import score_figure
from hici.report.gather import Gathered, Result
from hici.report.numbers import MISSING, fixed
from hici.report.page import Block, Figure, Table
from hici.report.section import Section
from hici.report.series import Series, series_of


def _series(gathered: Gathered) -> list[Series]:
    measured = series_of(gathered.labelled("longbench"), gathered.looks)
    return measured + [_predictions(gathered, result) for result in gathered.of("score") if result.record.get("scores")]


def _predictions(gathered: Gathered, result: Result) -> Series:
    """A result of `hici score longbench`."""
    record = result.record
    metrics, samples = record.get("metrics", {}), record.get("samples", {})
    entries = [
        {"dataset": name, "score": score, "metric": metrics.get(name, MISSING), "samples": samples.get(name)}
        for name, score in record["scores"].items()
    ]
    look = gathered.looks[result.label, ""]
    return Series(result.label, "", f"{result.label}: predictions", look, entries)


def _draw(gathered: Gathered) -> list[Block]:
    series = _series(gathered)

    def draw(narrow: bool) -> object:
        return score_figure(series, name="dataset", value="score", label="score (0 to 100)", narrow=narrow)

    return [
        Figure(
            "longbench",
            draw,
            "LongBench scores by data set; further right is better.",
            "LongBench scores. " + " ".join(map(_sentence, series)),
            _long_table(series),
        ),
        score_table("LongBench scores by data set", series, "dataset"),
    ]


def _sentence(one: Series) -> str:
    scores = [entry["score"] for entry in one.entries]
    best, least = (pick(one.entries, key=lambda entry: entry["score"]) for pick in (max, min))
    return (
        f"{one.name}: mean {fmean(scores):.2f} of {len(scores)} data sets, from {fixed(least['score'], 2)} "
        f"({least['dataset']}) to {fixed(best['score'], 2)} ({best['dataset']})."
    )


def score_table(caption: str, series: Sequence[Series], name: str) -> Table:
    """A row a data set, a column a series, the mean below."""
    found = [{entry[name]: entry["score"] for entry in one.entries} for one in series]
    sets = list(dict.fromkeys(key for each in found for key in each))
    rows = [[str(key), *(fixed(each.get(key), 2) for each in found)] for key in sets]
    common = [key for key in sets if all(key in each for each in found)]
    if len(common) > 1:
        what = "mean" if len(common) == len(sets) else f"mean of the {len(common)} that all have"
        rows.append([what, *(fixed(fmean(each[key] for key in common), 2) for each in found)])
    return Table(caption, ["", *(one.name for one in series)], rows)


def _long_table(series: Sequence[Series]) -> Table:
    rows = [
        [one.name, str(entry["dataset"]), str(entry.get("metric", MISSING)), fixed(entry["score"], 2),
         fixed(entry.get("samples"), 0), fixed(entry.get("context"), 0)]
        for one in series for entry in one.entries
    ]  # fmt: skip
    columns = ["run and attention", "data set", "metric", "score", "samples", "context"]
    return Table("LongBench", columns, rows, text_columns=3)


SECTION = Section(70, "LongBench", lambda gathered: bool(_series(gathered)), _draw)
