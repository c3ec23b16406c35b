"""Tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hici.report.gather import Gathered
from hici.report.numbers import MISSING, fixed
from hici.report.page import Block, Table
from hici.report.section import Section
from hici.report.series import series_of


def _draw(gathered: Gathered) -> list[Block]:
    series = series_of(gathered.labelled("lm"), gathered.looks)
    found = [{(e["task_name"], e["metric"]): e for e in one.entries} for one in series]
    keys = list(dict.fromkeys(key for each in found for key in each))
    rows = [
        [task, _metric(metric, found), *(_cell(each.get((task, metric))) for each in found)] for task, metric in keys
    ]
    caption = "Tasks of lm-evaluation-harness: value, and its standard error. Arrows: which way is better."
    return [Table(caption, ["task", "metric", *(one.name for one in series)], rows, text_columns=2)]


def _metric(metric: str, found: Sequence[dict[Any, dict[str, Any]]]) -> str:
    """With an arrow where the harness says which way is better."""
    told = {entry.get("higher_is_better") for each in found for (_, name), entry in each.items() if name == metric}
    if len(told) > 1 or None in told:
        return metric
    return f"{metric} {'↑' if True in told else '↓'}"


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return MISSING
    if entry["value"] is None:
        return str(entry.get("text", MISSING))
    error = entry.get("standard_error")
    return fixed(entry["value"], 4) + ("" if error is None else f" ± {fixed(error, 4)}")


SECTION = Section(80, "lm-evaluation-harness", lambda gathered: bool(series_of(gathered.labelled("lm"))), _draw)
