"""Differences between runs, pair by pair, where they measured the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from hici.report.differences import (
    Difference,
    Measured,
    loss_difference,
    pooled,
    retrieval_difference,
    score_differences,
    task_difference,
)
from hici.report.gather import Gathered
from hici.report.numbers import MISSING, signed, signed_span
from hici.report.page import Block, Table
from hici.report.pairs import ALL_PAIRS_UP_TO, CHOSEN, all_pairs, measured_by_series, name_of
from hici.report.section import Section
from hici.report.series import Key

_WORDS = "Lower or higher is said where zero lies outside of the interval."


def _tables(gathered: Gathered) -> list[Table]:
    tables = [_perplexity(gathered, protocol) for protocol in gathered.protocols("perplexity")]
    tables += [_retrieval(gathered), _longbench(gathered), _lm(gathered)]
    return [table for table in tables if table is not None]


def _pairs(measured: dict[Key, list[Measured]]) -> list[tuple[Key, Key]]:
    return all_pairs(list(measured))


def _notes(measured: dict[Key, list[Measured]]) -> list[str]:
    return [CHOSEN] if len(measured) > ALL_PAIRS_UP_TO else []


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
    return f"{signed(scale * found.value, digits)}{interval}, {found.verdict}"


def _perplexity(gathered: Gathered, protocol: str) -> Table | None:
    measured = measured_by_series(gathered.of("perplexity", protocol))
    found = {key: {f"{each.condition['context']:,} tokens": each for each in own} for key, own in measured.items()}

    def cell(a: Key, b: Key) -> Callable[[str], str]:
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
        {f"{name_of(a)} minus {name_of(b)}": cell(a, b) for a, b in _pairs(measured)},
        _notes(measured),
    )


def _retrieval(gathered: Gathered) -> Table | None:
    measured = measured_by_series(gathered.of("retrieval"))
    tasks = list(dict.fromkeys(each.condition["task"] for own in measured.values() for each in own))
    contexts = sorted({each.condition["context"] for own in measured.values() for each in own})
    rows = [
        [f"{task}, {name_of(a)} minus {name_of(b)}",
         *(_retrieval_cell(measured[a], measured[b], task, context) for context in contexts)]
        for task in tasks
        for a, b in _pairs(measured)
    ]  # fmt: skip
    rows = [row for row in rows if any(cell != MISSING for cell in row[1:])]
    if not rows:
        return None
    return Table(
        "Difference in accuracy, percentage points, all depths together: first minus second, with a 95 % interval "
        f"(Newcombe's, from two Wilson intervals), and the right answers of both. {_WORDS} Higher is better.",
        ["task and pair", *(f"{context:,} tokens" for context in contexts)],
        rows,
        text_columns=None,
        notes=_notes(measured),
    )


def _retrieval_cell(a: Sequence[Measured], b: Sequence[Measured], task: str, context: int) -> str:
    left, right = ([each for each in own if (each.condition["task"], each.condition["context"]) == (task, context)]
                   for own in (a, b))  # fmt: skip
    found = retrieval_difference(left, right, task)
    if found is None or isinstance(found, str):
        return found or MISSING
    one, other = pooled([each.condition for each in left]), pooled([each.condition for each in right])
    shown = _shown(found, 1, scale=100)
    return f"{shown}; {one.right:g} of {one.samples} against {other.right:g} of {other.samples}"


def _longbench(gathered: Gathered) -> Table | None:
    measured = measured_by_series(gathered.of("longbench"))
    rows = []
    for a, b in _pairs(measured):
        name, found = f"{name_of(a)} minus {name_of(b)}", score_differences(measured[a], measured[b])
        if isinstance(found, str):
            rows.append([name, found, MISSING, MISSING])
        elif found:
            least, most = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
            rows.append([name, f"{signed(fmean(found.values()), 2)} over {len(found)} data sets",
                         f"{signed(found[least], 2)} ({least})", f"{signed(found[most], 2)} ({most})"])  # fmt: skip
    columns = ["pair", "mean", "the least", "the most"]
    caption = "Difference in LongBench scores, points: first minus second (no interval: the data sets are the same)."
    return Table(caption, columns, rows, text_columns=None, notes=_notes(measured)) if rows else None


def _lm(gathered: Gathered) -> Table | None:
    measured = measured_by_series(gathered.of("lm"))
    found = {key: {f"{each.condition['task_name']}, {each.condition['metric']}": each for each in own}
             for key, own in measured.items()}  # fmt: skip

    def cell(a: Key, b: Key) -> Callable[[str], str]:
        def at(column: str) -> str:
            if column not in found[a] or column not in found[b]:
                return MISSING
            return _shown(task_difference(found[a][column], found[b][column]), 4)

        return at

    return _table(
        "Difference in tasks of lm-evaluation-harness: first minus second, with a 95 % interval as if the samples were "
        f"independent (too wide: they are the same). {_WORDS}",
        list(dict.fromkeys(column for own in found.values() for column in own)),
        {f"{name_of(a)} minus {name_of(b)}": cell(a, b) for a, b in _pairs(measured)},
        _notes(measured),
    )


def _draw(gathered: Gathered) -> Sequence[Block]:
    return _tables(gathered)


SECTION = Section(110, "Differences between runs", lambda gathered: bool(_tables(gathered)), _draw)
