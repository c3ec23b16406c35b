"""Training comparisons (`benchmarks/compare.py`): methods trained alike, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from hici.eval.labels import NOT_CAUSAL, attention_label
from hici.report.charts.comparison import Trained, comparison_figure
from hici.report.gather import Comparison, Gathered
from hici.report.numbers import MISSING, fixed, gib, signed, signed_span, whole
from hici.report.page import Block, Figure, Heading, Table, Text, slug
from hici.report.section import Section
from hici.report.series import COLOURS, DASHES, MARKERS, Look


def _draw(gathered: Gathered) -> list[Block]:
    blocks: list[Block] = []
    for number, comparison in enumerate(gathered.comparisons, start=1):
        blocks += [Heading(comparison.label), *_blocks(number, comparison)]
    return blocks


def _blocks(number: int, comparison: Comparison) -> list[Block]:
    record, trained = comparison.record, trained_of(comparison.record)
    settings = record["settings"]

    def draw(narrow: bool) -> object:
        return comparison_figure(trained, narrow=narrow)

    lengths = sorted({length for one in trained for length in one.losses})
    ends = " ".join(map(_sentence, trained))
    blocks: list[Block] = [
        Text(f"{settings.get('model')}, from {whole(settings.get('base_context'))} to {whole(settings.get('context'))} "
             "tokens. All methods of a seed saw the same tokens in every step."),
        Figure(
            f"training-comparison-{number}-{slug(comparison.label)}",
            draw,
            "Left: perplexity of held-out text by length, mean of the seeds, in full attention unless the name of the "
            "line says otherwise. Right: the loss while training, in each method's own attention: in hici attention "
            f"with visibility all or current it is {NOT_CAUSAL}, and no measure of a method.",
            f"Training comparison {comparison.label}. {ends}",
            _perplexities(trained, lengths),
        ),
        _costs(record["costs"]),
    ]  # fmt: skip
    if record["comparisons"]:
        blocks.append(_differences(record["comparisons"]))
    failures = record.get("failures") or []
    return blocks + [Text(f"Failed, and not in the tables: {failure}", "note") for failure in failures]


def _sentence(one: Trained) -> str:
    longest = max(one.losses)
    return f"{one.name}: {fixed(math.exp(fmean(one.losses[longest])), 2)} at {longest:,} tokens."


def trained_of(record: dict[str, Any]) -> list[Trained]:
    """Baselines first, then methods. A window of one segment in HiCI attention is full attention, and left out."""
    parts = [(name, None, each) for name, evaluations in record["baselines"].items() for each in evaluations]
    parts += [(run["method"], run, each) for run in record["runs"] for each in run["evaluations"]]
    found: dict[str, tuple[dict[int, list[float]], list[list[float]], bool]] = {}
    for method, run, each in parts:
        if each["attention"] != "full" and each["segments"] == 1:
            continue
        label = attention_label(each | {"causal": not each["leaks_future"]})
        name = method if each["attention"] == "full" else f"{method}, in {label} attention"
        losses, curves, _ = found.setdefault(name, ({}, [], each["leaks_future"]))
        losses.setdefault(each["windows"]["context"], []).append(each["mean_loss"])
        own = run["trained"].get("losses") if run and each["attention"] == "full" else None
        if own and own not in curves:
            curves.append(own)
    return [
        Trained(name, Look(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)], hollow),
                losses, curves)
        for i, (name, (losses, curves, hollow)) in enumerate(found.items())
    ]  # fmt: skip


def _perplexities(trained: Sequence[Trained], lengths: Sequence[int]) -> Table:
    rows = []
    for one in trained:
        cells = []
        for length in lengths:
            losses = one.losses.get(length, [])
            seeds = f" ({', '.join(fixed(math.exp(loss), 3) for loss in losses)})" if len(losses) > 1 else ""
            cells.append(fixed(math.exp(fmean(losses)), 3) + seeds if losses else MISSING)
        rows.append([one.name, *cells])
    return Table("Perplexity by length: of the seeds' mean loss, and in brackets of each seed",
                 ["method", *(f"{length:,} tokens" for length in lengths)], rows)  # fmt: skip


def _costs(costs: dict[str, Any]) -> Table:
    rows = [
        [method, " / ".join(map(whole, cost.get("steps", []))), " / ".join(map(whole, cost.get("tokens", []))),
         fixed(cost.get("seconds_per_step"), 3), gib(cost.get("peak_memory_bytes"))]
        for method, cost in costs.items()
    ]  # fmt: skip
    return Table("What training took", ["method", "steps", "tokens", "seconds a step", "peak memory, GiB"], rows)


def _differences(found: Sequence[dict[str, Any]]) -> Table:
    rows = [
        [f"{each['a']} minus {each['minus']}", each["verdict"], whole(each["length"]),
         signed(each["loss_difference"], 4), signed_span(each["interval_windows"], 4),
         signed_span(each["interval_windows_and_seeds"], 4)]
        for each in found
    ]  # fmt: skip
    return Table(
        "Differences in held-out loss, nats a token, same windows and seeds, with 95 % intervals: over windows, and "
        "over windows and seeds",
        ["pair", "verdict", "length", "difference", "over windows", "and seeds"],
        rows,
        text_columns=2,
    )


SECTION = Section(95, "Training comparison", lambda gathered: bool(gathered.comparisons), _draw)
