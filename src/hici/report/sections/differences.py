"""Differences between runs, pair by pair, where they measured the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from hici.eval.labels import attention_label
from hici.report.differences import (
    Difference,
    Measured,
    accuracy_difference,
    differing_protocol,
    loss_difference,
    pooled,
    value_difference,
)
from hici.report.gather import Gathered, Result
from hici.report.numbers import MISSING, signed, signed_span
from hici.report.page import Block, Table
from hici.report.section import Section

_WORDS = "Lower or higher is said where zero lies outside of the interval."
_ALL_PAIRS_UP_TO = 4  # of more series, each is compared with the first only


def _tables(gathered: Gathered) -> list[Table]:
    tables = [_perplexity(gathered, protocol) for protocol in gathered.protocols("perplexity")]
    tables += [_retrieval(gathered), _longbench(gathered), _lm(gathered)]
    return [table for table in tables if table is not None]


def _measured(results: Iterable[Result]) -> dict[str, list[Measured]]:
    """By the series' name."""
    found: dict[str, list[Measured]] = {}
    for result in results:
        for condition in result.record["conditions"]:
            name = f"{result.label}: {attention_label(condition)}"
            found.setdefault(name, []).append(Measured(name, condition, result.record))
    return found


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """(later, earlier)."""
    if len(names) <= _ALL_PAIRS_UP_TO:
        return [(later, earlier) for earlier, later in itertools.combinations(names, 2)]
    return [(name, names[0]) for name in names[1:]]


def _table(
    caption: str, columns: Sequence[str], cells: dict[str, Callable[[str], str]], notes: Sequence[str] = ()
) -> Table | None:
    """Rows of pairs. cells: pair's name -> column -> text. None: no pair has anything in common."""
    rows = [[pair, *(cell(column) for column in columns)] for pair, cell in cells.items()]
    rows = [row for row in rows if any(cell != MISSING for cell in row[1:])]
    return Table(caption, ["pair", *columns], rows, text_columns=None, notes=notes) if rows else None


def _shown(found: Difference | str | None, digits: int, scale: float = 1.0) -> str:
    if found is None or isinstance(found, str):
        return found or MISSING
    bounds = None if found.interval is None else [scale * bound for bound in found.interval]
    interval = "" if bounds is None else f" ({signed_span(bounds, digits)})"
    verdict = f", {found.verdict}" if found.verdict in ("lower", "higher") else ""
    return f"{signed(scale * found.value, digits)}{interval}{verdict}"


def _perplexity(gathered: Gathered, protocol: str) -> Table | None:
    found = {
        name: {f"{each.condition['context']:,} tokens": each for each in own}
        for name, own in _measured(gathered.of("perplexity", protocol)).items()
    }

    def cell(a: str, b: str) -> Callable[[str], str]:
        def at(column: str) -> str:
            if column not in found[a] or column not in found[b]:
                return MISSING
            return _shown(loss_difference(found[a][column], found[b][column]), 4)

        return at

    contexts = sorted({each.condition["context"] for own in found.values() for each in own.values()})
    return _table(
        f"Difference in loss, nats a token, protocol {protocol}: first minus second over the same windows, with a 95 % "
        f"interval (paired, Student's t over groups that are independent). {_WORDS} Lower is better.",
        [f"{context:,} tokens" for context in contexts],
        {f"{a} minus {b}": cell(a, b) for a, b in _pairs(list(found))},
    )


def _retrieval(gathered: Gathered) -> Table | None:
    measured = _measured(gathered.of("retrieval"))
    tasks = list(dict.fromkeys(each.condition["task"] for own in measured.values() for each in own))
    contexts = sorted({each.condition["context"] for own in measured.values() for each in own})
    rows = [
        [f"{task}, {a} minus {b}", *(_retrieval_cell(measured[a], measured[b], task, context) for context in contexts)]
        for task in tasks
        for a, b in _pairs(list(measured))
    ]
    rows = [row for row in rows if any(cell != MISSING for cell in row[1:])]
    if not rows:
        return None
    return Table(
        "Difference in accuracy, percentage points, all depths together: first minus second, with a 95 % interval "
        f"(Newcombe's, from two Wilson intervals), and the right answers of both. {_WORDS} Higher is better.",
        ["task and pair", *(f"{context:,} tokens" for context in contexts)],
        rows,
        text_columns=None,
    )


def _retrieval_cell(a: Sequence[Measured], b: Sequence[Measured], task: str, context: int) -> str:
    left, right = ([each for each in own if (each.condition["task"], each.condition["context"]) == (task, context)]
                   for own in (a, b))  # fmt: skip
    if not left or not right:
        return MISSING
    reason = differing_protocol(left[0].record, right[0].record, task)
    depths, others = ({each.condition.get("depth") for each in own} for own in (left, right))
    if reason is None and depths != others:
        reason = "depths"
    if reason is not None:
        return f"not comparable: {reason} differ"
    one, other = (pooled([each.condition for each in own]) for own in (left, right))
    shown = _shown(accuracy_difference(one, other), 1, scale=100)
    return f"{shown}; {one.right:g} of {one.samples} against {other.right:g} of {other.samples}"


def _longbench(gathered: Gathered) -> Table | None:
    found = {name: {each.condition["dataset"]: each for each in own}
             for name, own in _measured(gathered.of("longbench")).items()}  # fmt: skip
    rows = []
    for a, b in _pairs(list(found)):
        common = [name for name in found[a] if name in found[b]]
        if not common:
            continue
        reasons = {differing_protocol(found[a][name].record, found[b][name].record, name) for name in common} - {None}
        if reasons:
            rows.append([f"{a} minus {b}", f"not comparable: {min(map(str, reasons))} differ", MISSING, MISSING])
            continue
        each = {name: found[a][name].condition["score"] - found[b][name].condition["score"] for name in common}
        least, most = min(each, key=each.__getitem__), max(each, key=each.__getitem__)
        rows.append([f"{a} minus {b}", f"{signed(fmean(each.values()), 2)} over {len(each)} data sets",
                     f"{signed(each[least], 2)} ({least})", f"{signed(each[most], 2)} ({most})"])  # fmt: skip
    columns = ["pair", "mean", "the least", "the most"]
    caption = "Difference in LongBench scores, points: first minus second (no interval: the data sets are the same)."
    return Table(caption, columns, rows, text_columns=None) if rows else None


def _lm(gathered: Gathered) -> Table | None:
    found: dict[str, dict[str, dict[str, Any]]] = {
        name: {f"{each.condition['task_name']}, {each.condition['metric']}": each.condition for each in own}
        for name, own in _measured(gathered.of("lm")).items()
    }

    def cell(a: str, b: str) -> Callable[[str], str]:
        def at(column: str) -> str:
            if column not in found[a] or column not in found[b]:
                return MISSING
            return _shown(value_difference(found[a][column], found[b][column]), 4)

        return at

    return _table(
        "Difference in tasks of lm-evaluation-harness: first minus second, with a 95 % interval as if the samples were "
        f"independent (too wide: they are the same). {_WORDS}",
        list(dict.fromkeys(column for own in found.values() for column in own)),
        {f"{a} minus {b}": cell(a, b) for a, b in _pairs(list(found))},
    )


def _draw(gathered: Gathered) -> Sequence[Block]:
    return _tables(gathered)


SECTION = Section(110, "Differences between runs", lambda gathered: bool(_tables(gathered)), _draw)
