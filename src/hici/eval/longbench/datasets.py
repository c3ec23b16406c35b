"""The datasets of LongBench, from datasets.json beside this file (quoted; see NOTICE)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hici.registry import suggest

DATA_FILE = Path(__file__).with_name("datasets.json")
_EXTENDED = "_e"  # how LongBench-E names its selections of the same datasets, evenly spread over lengths


@dataclass(frozen=True)
class Dataset:
    """What LongBench prescribes for one dataset.

    Attributes:
        name: with "_e" for LongBench-E's selection.
        group, language: "few-shot learning", ...; "en", "zh" or "code".
        samples: how many the whole dataset has; None: not stated (LongBench-E).
        metric: a name in `hici.eval.longbench.scorer.METRICS`.
        max_new_tokens: generation length.
        first_line: only the prediction's first line is scored.
        chat: a chat model may be asked in its chat template (never few-shot and code prompts).
        stop_at_newline: generation ends with the first newline.
        prompt: with the fields {context} and {input}.
    """

    name: str
    group: str
    language: str
    samples: int | None
    metric: str
    max_new_tokens: int
    first_line: bool
    chat: bool
    stop_at_newline: bool
    prompt: str


def load_datasets() -> dict[str, Dataset]:
    """All by name, in LongBench's order, LongBench-E's behind them."""
    known = json.loads(DATA_FILE.read_text(encoding="utf-8"))["datasets"]
    found = {}
    for extended in (False, True):
        for plain, values in known.items():
            fields = {key: value for key, value in values.items() if key != "extended"}
            if extended:
                fields["samples"] = None
            if not extended or values["extended"]:
                name = plain + _EXTENDED * extended
                found[name] = Dataset(name=name, **fields)
    return found


def get_dataset(name: str, what: str = "LongBench dataset", remedy: str = "") -> Dataset:
    """The dataset of that name. Raises ValueError, naming the nearest one, when there is none."""
    known = load_datasets()
    if name not in known:
        raise ValueError(suggest(name, known, what, remedy))
    return known[name]


def in_order(names: Iterable[str]) -> list[str]:
    """Names of datasets in LongBench's order."""
    order = list(load_datasets())
    return sorted(names, key=order.index)
