"""What the report reads of a result beyond its schema: checked once, so that a damaged file is named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NUMBER, _WHOLE, _TEXT = (int, float), (int,), (str,)
_ATTENTION: dict[str, tuple[type, ...]] = {"attention": _TEXT, "causal": (bool,), "visibility": (str, type(None))}
_CONDITIONS: dict[str, dict[str, tuple[type, ...]]] = {
    "perplexity": _ATTENTION | {"context": _WHOLE, "mean_loss": _NUMBER, "ppl": _NUMBER},
    "retrieval": _ATTENTION | {"context": _WHOLE, "task": _TEXT, "samples": _WHOLE, "accuracy": _NUMBER},
    "longbench": _ATTENTION | {"dataset": _TEXT, "score": _NUMBER},
    "lm": _ATTENTION | {"task_name": _TEXT, "metric": _TEXT, "value": (int, float, type(None))},
    "inspect": _ATTENTION | {"shares": (dict,)},
}
# of any condition, where they are there and not null
_NUMBERS = ("mean_loss", "standard_error", "tokens_per_second", "peak_memory_bytes", "seconds", "tokens_scored",
            "segments", "samples", "depth")  # fmt: skip
_SPANS = ("loss_interval", "ppl_interval", "accuracy_interval")
_LISTS = ("losses", "counts")
_PARTS = ("global", "local", "tokens")


def check_fields(path: Path, record: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the file, where a condition lacks what is drawn of it."""
    expected = _CONDITIONS.get(record["task"], _ATTENTION)
    for name in ("protocol", "provenance"):
        if not isinstance(record[name], dict):
            raise _damaged(path, f"its {name} is no object")
    for name in ("model", "data"):
        if not isinstance(record[name], dict | None):
            raise _damaged(path, f"its {name} is neither an object nor null")
    if not isinstance(record["provenance"].get("machine"), dict | None):
        raise _damaged(path, "its machine is neither an object nor null")
    for number, condition in enumerate(record["conditions"], start=1):
        if not isinstance(condition, dict):
            raise _damaged(path, f"its condition {number} is no object")
        for name, kinds in expected.items():
            value = condition.get(name)
            if name not in condition or not _fits(value, kinds):
                found = f"is {value!r}" if name in condition else "is missing"
                raise _damaged(path, f"`{name}` of its condition {number} {found}")
        _check_optional(path, number, condition)
        if record["task"] == "inspect":
            _check_shares(path, number, condition)
        if record["task"] == "perplexity" and record["protocol"].get("name") == "position":
            _check_bins(path, number, condition.get("bins"))
    if record["task"] == "score":
        _check_scores(path, record)


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _check_optional(path: Path, number: int, condition: Mapping[str, Any]) -> None:
    """What a condition need not have, but which is drawn where it is there."""
    for name in (*_NUMBERS, *_SPANS, *_LISTS, "windows", "context"):
        value = condition.get(name)
        if value is None:
            continue
        fits = (
            _are_numbers(value) and len(value) == 2 if name in _SPANS
            else _are_numbers(value) if name in _LISTS
            else isinstance(value, dict) if name == "windows"
            else _fits(value, _WHOLE) and value >= 1 if name == "context"
            else _fits(value, _NUMBER)
        )  # fmt: skip
        if not fits:
            raise _damaged(path, f"`{name}` of its condition {number} is {str(value)[:60]}")


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(_fits(each, _NUMBER) for each in value)


def _check_shares(path: Path, number: int, condition: Mapping[str, Any]) -> None:
    """Shares of each part, [layer][head]; similarities, [layer][segment][segment], where there are any."""
    tables = [condition["shares"].get(part) for part in _PARTS]
    if not all(isinstance(rows, list) and rows and all(_are_numbers(row) and row for row in rows) for rows in tables):
        raise _damaged(path, f"`shares` of its condition {number} lacks [layer][head] for one of {', '.join(_PARTS)}")
    if len({tuple(map(len, rows)) for rows in tables}) > 1:
        raise _damaged(path, f"`shares` of its condition {number} has other layers or heads for one part than another")
    for matrices in (condition.get("slot_similarity") or {}).values():
        square = matrices is None or (
            isinstance(matrices, list)
            and len(matrices) == len(tables[0])
            and all(isinstance(m, list) and all(_are_numbers(r) and len(r) == len(m) for r in m) for m in matrices)
        )
        if not square:
            raise _damaged(path, f"`slot_similarity` of its condition {number} is not [layer][segment][segment]")


def _check_bins(path: Path, number: int, bins: Any) -> None:
    needed = ("first", "last", "tokens", "mean_loss")
    whole = isinstance(bins, list) and all(
        isinstance(b, dict)
        and all(_fits(b.get(name), _NUMBER) for name in needed)
        and (b.get("interval") is None or (_are_numbers(b["interval"]) and len(b["interval"]) == 2))
        for b in bins
    )
    if not bins or not whole:
        raise _damaged(path, f"`bins` of its condition {number} is no list of objects with {', '.join(needed)}")


def _check_scores(path: Path, record: Mapping[str, Any]) -> None:
    for name in ("scores", "accuracy"):
        values = record.get(name, {})
        if not isinstance(values, dict) or not all(_fits(value, _NUMBER) for value in values.values()):
            raise _damaged(path, f"`{name}` is no object of numbers")


def check_comparison(path: Path, record: Mapping[str, Any]) -> None:
    """The same for a training comparison."""
    kinds = {"settings": dict, "costs": dict, "baselines": dict, "data": dict, "comparisons": list, "runs": list}
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            raise _damaged(path, f"its {name} is no {'object' if kind is dict else 'list'}")
    for number, run in enumerate(record["runs"], start=1):
        whole = isinstance(run, dict) and "method" in run and isinstance(run.get("trained"), dict)
        if not whole or not isinstance(run.get("evaluations"), list):
            raise _damaged(path, f"its run {number} lacks method, trained or evaluations")
    evaluations = [each for run in record["runs"] for each in run["evaluations"]]
    if not evaluations + [each for found in record["baselines"].values() for each in found]:
        raise ValueError(f"{path} is a comparison in which nothing was measured; leave it out")


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is damaged: {what}; restore it or measure again")
