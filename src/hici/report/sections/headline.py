"""Summary: what is compared, and the main number of every run under every attention."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from hici.eval.labels import NOT_CAUSAL, attention_label
from hici.report.figures import tokens
from hici.report.gather import Gathered, Result
from hici.report.numbers import MISSING, fixed, listing, percent
from hici.report.page import Block, Table, Text
from hici.report.runs import RunLog
from hici.report.section import Section
from hici.report.verdicts import verdict_table

NOT_CAUSAL_NOTE = (
    f"({NOT_CAUSAL}): with this visibility a token sees a summary of its own future. Such a number says how well the "
    "slots inform, and is no perplexity of a language model; its markers are hollow in every figure."
)

Row = tuple[str, str]  # label, attention


def _draw(gathered: Gathered) -> list[Block]:
    blocks: list[Block] = []
    if gathered.results:
        verdicts = verdict_table(gathered)
        blocks += [*([verdicts] if verdicts else []), _compared(gathered), _numbers(gathered)]
        blocks += [Text(note, "note") for note in _same_weights(gathered)]
    if any(not condition["causal"] for result in gathered.results for condition in result.record["conditions"]):
        blocks.append(Text(NOT_CAUSAL_NOTE, "note"))
    blocks += [Text(_training_note(run), "note") for run in gathered.runs if run.leaks_future]
    return blocks


def _same_weights(gathered: Gathered) -> list[str]:
    """Runs that measured the same model."""
    found: dict[str, list[str]] = {}
    for result in gathered.results:
        model = result.record["model"] or {}
        if model.get("base_fingerprint"):
            weights = repr((model["base_fingerprint"], sorted((model.get("adapter_sha256") or {}).items())))
            labels = found.setdefault(weights, [])
            labels += [] if result.label in labels else [result.label]
    return [f"{listing(labels)} measured the same weights." for labels in found.values() if len(labels) > 1]


def _training_note(run: RunLog) -> str:
    attentions = ", ".join(sorted(run.leaks_future))
    return (
        f"{run.label} was trained with visibility {run.visibility}: its loss in {attentions} attention, in training "
        f"too, sees the future ({NOT_CAUSAL}); read the held-out loss in full attention."
    )


def _compared(gathered: Gathered) -> Table:
    labels = list(dict.fromkeys(result.label for result in gathered.results))
    facts = [_about([result for result in gathered.results if result.label == label]) for label in labels]
    rows = [[name, *(each[name] for each in facts)] for name in facts[0]]
    caption = "What is compared. A run is named after its directory, or after its file."
    return Table(caption, ["", *labels], rows, text_columns=None)


def _about(results: Sequence[Result]) -> dict[str, str]:
    """Facts of one run; where its results disagree, all of them."""
    models = [result.record["model"] for result in results if result.record["model"]]
    found = {
        "model": [_or_missing(model.get("path")) for model in models],
        "base": [_or_missing(model.get("base_model")) for model in models],
        "dtype": [_or_missing(model.get("dtype")) for model in models],
        "rope": [_rope(model) for model in models],
        "attention": [attention_label(each) for result in results for each in result.record["conditions"]],
        "measured": [result.record["task"] for result in results],
    }
    return {name: "; ".join(dict.fromkeys(values)) or MISSING for name, values in found.items()}


def _or_missing(value: Any) -> str:
    return MISSING if value is None else str(value)


def _rope(model: dict[str, Any]) -> str:
    rope = model.get("rope")
    if not isinstance(rope, dict):
        return "not recorded"
    before, after = (fixed(rope.get(name), 0) for name in ("positions_before", "positions"))
    return (
        f"extended ({rope['extended']}) from {before} to {after} positions"
        if rope.get("extended")
        else f"{after} positions"
    )


def _numbers(gathered: Gathered) -> Table:
    found = [(name, numbers) for name, numbers in _columns(gathered) if numbers]
    labels = list(dict.fromkeys(result.label for result in gathered.results))
    order = list(dict.fromkeys(row for _, numbers in found for row in numbers))
    order.sort(key=lambda row: labels.index(row[0]))
    rows = [[": ".join(part for part in row if part), *(numbers.get(row, MISSING) for _, numbers in found)]
            for row in order]  # fmt: skip
    return Table(
        "The main numbers. Perplexity: at the longest context of each (K = 1,024 tokens); retrieval: percent correct "
        "over all lengths and depths; LongBench: mean of the data sets' scores, and how many there are.",
        ["run and attention", *(name for name, _ in found)],
        rows,
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
    return {row: f"{fixed(c['ppl'], 2)} at {tokens(c['context'])}" for row, c in longest.items()}


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
    return {row: f"{fmean(values):.2f} ({len(values)})" for row, values in scores.items() if values}


def _applies(gathered: Gathered) -> bool:
    return bool(gathered.results) or any(run.leaks_future for run in gathered.runs)


SECTION = Section(10, "Summary", _applies, _draw)
