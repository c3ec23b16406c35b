"""Summary: what is compared, and the main number of every run under every attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from hici.eval.labels import NOT_CAUSAL, attention_label
from hici.report.gather import Gathered, Result
from hici.report.numbers import MISSING, fixed, percent
from hici.report.page import Block, Table, Text
from hici.report.section import Section

NOT_CAUSAL_NOTE = (
    f"({NOT_CAUSAL}): with this visibility a token sees a summary of its own future. Such a number says how well the "
    "slots inform, and is no perplexity of a language model; its markers are hollow in every figure."
)

Row = tuple[str, str]  # label, attention
Column = tuple[str, Callable[[Gathered], dict[Row, str]]]


def _draw(gathered: Gathered) -> list[Block]:
    blocks: list[Block] = []
    if gathered.results:
        blocks += [_compared(gathered), _numbers(gathered)]
    if any(not condition["causal"] for result in gathered.results for condition in result.record["conditions"]):
        blocks.append(Text(NOT_CAUSAL_NOTE, "note"))
    for run in gathered.runs:
        if run.leaks_future:
            blocks.append(Text(
                f"{run.label} was trained with visibility {run.visibility}: its loss in {', '.join(sorted(run.leaks_future))} "
                f"attention, in training too, sees the future ({NOT_CAUSAL}); read the held-out loss in full attention.", "note"))  # fmt: skip
    return blocks


def _compared(gathered: Gathered) -> Table:
    rows = []
    for label in dict.fromkeys(result.label for result in gathered.results):
        own = [result for result in gathered.results if result.label == label]
        models = [result.record["model"] for result in own if result.record["model"]]
        about: dict[str, Any] = models[0] if models else {}
        attentions = dict.fromkeys(attention_label(c) for result in own for c in result.record["conditions"])
        rope = dict.fromkeys(_rope(model) for model in models)
        dtypes = dict.fromkeys(str(model.get("dtype")) for model in models)
        rows.append([label, _or_missing(about.get("path")), _or_missing(about.get("kind")),
                     _or_missing(about.get("base_model")), ", ".join(dtypes) or MISSING, "; ".join(rope) or MISSING,
                     "; ".join(attentions) or MISSING,
                     ", ".join(dict.fromkeys(result.record["task"] for result in own))])  # fmt: skip
    columns = ["run", "model", "kind", "base", "dtype", "rope", "attention", "measured"]
    return Table("What is compared: a run is named after its directory or its file.", columns, rows, text_columns=None)


def _or_missing(value: Any) -> str:
    return MISSING if value is None else str(value)


def _rope(model: dict[str, Any]) -> str:
    rope = model.get("rope")
    if not isinstance(rope, dict):
        return "not recorded"
    if rope.get("extended"):
        return f"extended ({rope['extended']}) from {fixed(rope.get('positions_before'), 0)} to {fixed(rope.get('positions'), 0)}"
    return f"{fixed(rope.get('positions'), 0)} positions"


def _numbers(gathered: Gathered) -> Table:
    found = [(name, numbers) for name, numbers in _columns(gathered) if numbers]
    order = list(dict.fromkeys(row for _, numbers in found for row in numbers))
    order.sort(key=lambda row: list(dict.fromkeys(r.label for r in gathered.results)).index(row[0]))
    rows = [[label, attention or MISSING, *(numbers.get((label, attention), MISSING) for _, numbers in found)]
            for label, attention in order]  # fmt: skip
    return Table(
        "The main numbers. Perplexity: at the longest context of each; retrieval: percent correct over all lengths and "
        "depths; LongBench: mean of the data sets' scores.",
        ["run", "attention", *(name for name, _ in found)],
        rows,
        text_columns=2,
    )


def _columns(gathered: Gathered) -> list[tuple[str, dict[Row, str]]]:
    columns = [
        (f"perplexity, {protocol}", _longest(gathered.of("perplexity", protocol)))
        for protocol in gathered.protocols("perplexity")
        if protocol != "position"
    ]
    retrieval = gathered.of("retrieval")
    tasks = dict.fromkeys(condition["task"] for result in retrieval for condition in result.record["conditions"])
    columns += [(f"{task}, %", _accuracy(retrieval, task)) for task in tasks]
    columns.append(("LongBench", _longbench(gathered)))
    return columns


def _grouped(results: Sequence[Result], **where: Any) -> dict[Row, list[dict[str, Any]]]:
    groups: dict[Row, list[dict[str, Any]]] = {}
    for result in results:
        for condition in result.record["conditions"]:
            if all(condition.get(name) == value for name, value in where.items()):
                groups.setdefault((result.label, attention_label(condition)), []).append(condition)
    return groups


def _longest(results: Sequence[Result]) -> dict[Row, str]:
    longest = {row: max(conditions, key=lambda c: c["context"]) for row, conditions in _grouped(results).items()}
    return {row: f"{fixed(c['ppl'], 3)} at {c['context']:,}" for row, c in longest.items()}


def _accuracy(results: Sequence[Result], task: str) -> dict[Row, str]:
    groups = _grouped(results, task=task)
    return {
        row: percent(sum(c["accuracy"] * c["samples"] for c in cells) / max(1, sum(c["samples"] for c in cells)))
        for row, cells in groups.items()
    }


def _longbench(gathered: Gathered) -> dict[Row, str]:
    scores = {row: [c["score"] for c in conditions] for row, conditions in _grouped(gathered.of("longbench")).items()}
    for result in gathered.of("score"):
        if result.record.get("scores"):
            scores[result.label, ""] = list(result.record["scores"].values())
    return {row: f"{fmean(values):.2f} of {len(values)} sets" for row, values in scores.items() if values}


SECTION = Section(
    10, "Summary", lambda gathered: bool(gathered.results) or any(r.leaks_future for r in gathered.runs), _draw
)
