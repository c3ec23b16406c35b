"""At a glance: for every pair of runs and every measurement, which one is better, and whether that can be told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

from hici.report.differences import (
    Difference,
    Measured,
    loss_difference,
    retrieval_difference,
    score_differences,
    task_difference,
)
from hici.report.figures import tokens
from hici.report.gather import Gathered
from hici.report.numbers import MISSING, signed, signed_span
from hici.report.page import Table
from hici.report.pairs import main_pairs, measured_by_series, name_of
from hici.report.series import Key

Cells = dict[tuple[Key, Key], str]

_FEW = 3  # columns of pairs that a page has room for
_CAPTION = "Which is better: the first of a pair, compared with the second."
_NOTE = (
    "Better and worse are said where the 95 % interval of the difference, in brackets, leaves zero out. Perplexity: "
    "loss in nats a token, over the same windows, at the longest context that both have. Retrieval: percentage points, "
    "over the lengths that both have and all depths. LongBench: points, mean of the data sets that both have. All "
    "lengths, and more pairs, stand in Differences between runs."
)


def verdict_table(gathered: Gathered) -> Table | None:
    """A row a pair, a column a measurement, or turned where pairs are few. None: nothing was measured twice."""
    columns = [(name, cells) for name, cells in _columns(gathered) if any(cell != MISSING for cell in cells.values())]
    pairs = dict.fromkeys(pair for _, cells in columns for pair, cell in cells.items() if cell != MISSING)
    if not pairs:
        return None
    table = [["pair", *(name for name, _ in columns)]]
    table += [[f"{name_of(pair[0])} against {name_of(pair[1])}", *(cells.get(pair, MISSING) for _, cells in columns)]
              for pair in pairs]  # fmt: skip
    if len(pairs) <= min(_FEW, len(columns) - 1):
        table = [list(row) for row in zip(*table, strict=True)]
        table[0][0] = "measured"
    return Table(_CAPTION, table[0], table[1:], text_columns=None, notes=[_NOTE])


def _columns(gathered: Gathered) -> list[tuple[str, Cells]]:
    columns = [
        (f"perplexity, {protocol}", _cells(gathered, "perplexity", _perplexity, protocol))
        for protocol in gathered.protocols("perplexity")
        if protocol != "position"
    ]
    for task in _names(gathered, "retrieval", "task"):
        columns.append((task, _cells(gathered, "retrieval", partial(_retrieval, task=task))))
    columns.append(("LongBench", _cells(gathered, "longbench", _longbench)))
    for task in _names(gathered, "lm", "task_name"):
        columns.append((task, _cells(gathered, "lm", partial(_task, task=task))))
    return columns


def _names(gathered: Gathered, task: str, field: str) -> list[str]:
    return list(dict.fromkeys(c[field] for result in gathered.of(task) for c in result.record["conditions"]))


def _cells(
    gathered: Gathered,
    task: str,
    verdict: Callable[[Sequence[Measured], Sequence[Measured]], str],
    protocol: str | None = None,
) -> Cells:
    measured = measured_by_series(gathered.of(task, protocol))
    return {(a, b): verdict(measured[a], measured[b]) for a, b in main_pairs(list(measured))}


def _perplexity(a: Sequence[Measured], b: Sequence[Measured]) -> str:
    left, right = ({each.condition["context"]: each for each in own} for own in (a, b))
    common = left.keys() & right.keys()
    if not common:
        return MISSING
    longest = max(common)
    found = loss_difference(left[longest], right[longest])
    return f"{_told(found, a[0], b[0], 4, lower_is_better=True)}, at {tokens(longest)}"


def _retrieval(a: Sequence[Measured], b: Sequence[Measured], task: str) -> str:
    left, right = ([each for each in own if each.condition["task"] == task] for own in (a, b))
    lengths = {each.condition["context"] for each in left} & {each.condition["context"] for each in right}
    left, right = ([each for each in own if each.condition["context"] in lengths] for own in (left, right))
    return _told(retrieval_difference(left, right, task), a[0], b[0], 1, scale=100)


def _longbench(a: Sequence[Measured], b: Sequence[Measured]) -> str:
    found = score_differences(a, b)
    if isinstance(found, str):
        return found
    if not found:
        return MISSING
    return f"{signed(fmean(found.values()), 2)} over {len(found)} data sets, no interval"


def _task(a: Sequence[Measured], b: Sequence[Measured], task: str) -> str:
    """Of a task's first metric."""
    left, right = ([each for each in own if each.condition["task_name"] == task] for own in (a, b))
    both = [(one, other) for one in left for other in right if one.condition["metric"] == other.condition["metric"]]
    if not both:
        return MISSING
    one, other = both[0]
    lower = one.condition.get("higher_is_better") is False
    told = _told(task_difference(one, other), one, other, 4, lower_is_better=lower)
    return told if told == MISSING else f"{told}, {one.condition['metric']}"


def _told(
    found: Difference | str | None,
    a: Measured,
    b: Measured,
    digits: int,
    *,
    scale: float = 1.0,
    lower_is_better: bool = False,
) -> str:
    """ "better: -0.1952 (-0.2230 to -0.1674)". What is not causal is lower or higher, and not better."""
    if found is None or isinstance(found, str):
        return found or MISSING
    word = found.verdict
    if word in ("lower", "higher") and a.condition["causal"] and b.condition["causal"]:
        word = "better" if (word == "lower") == lower_is_better else "worse"
    bounds = None if found.interval is None else [scale * bound for bound in found.interval]
    interval = "" if bounds is None else f" ({signed_span(bounds, digits)})"
    return f"{word}: {signed(scale * found.value, digits)}{interval}"
