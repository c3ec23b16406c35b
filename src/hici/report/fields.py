"""What the report reads of a result beyond its schema: checked once, so that a damaged file is named."""

from __future__ import annotations

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
    for number, condition in enumerate(record["conditions"], start=1):
        if not isinstance(condition, dict):
            raise _damaged(path, f"its condition {number} is no object")
        for name, kinds in expected.items():
            value = condition.get(name)
            if name not in condition or not _fits(value, kinds):
                found = f"is {value!r}" if name in condition else "is missing"
                raise _damaged(path, f"`{name}` of its condition {number} {found}")
        if record["task"] == "inspect":
            _check_shares(path, number, condition["shares"])
        if record["task"] == "perplexity" and record["protocol"].get("name") == "position":
            _check_bins(path, number, condition.get("bins"))
    if record["task"] == "score":
        _check_scores(path, record)


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _check_shares(path: Path, number: int, shares: dict[str, Any]) -> None:
    """[layer][head] of each part."""
    for part in _PARTS:
        rows = shares.get(part)
        if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
            raise _damaged(path, f"`shares` of its condition {number} has no rows of layers for {part!r}")


def _check_bins(path: Path, number: int, bins: Any) -> None:
    needed = ("first", "last", "tokens", "mean_loss")
    if not isinstance(bins, list) or not bins or not all(isinstance(b, dict) and set(needed) <= set(b) for b in bins):
        raise _damaged(path, f"`bins` of its condition {number} is no list of objects with {', '.join(needed)}")


def _check_scores(path: Path, record: Mapping[str, Any]) -> None:
    for name in ("scores", "accuracy"):
        values = record.get(name, {})
        if not isinstance(values, dict) or not all(_fits(value, _NUMBER) for value in values.values()):
            raise _damaged(path, f"`{name}` is no object of numbers")


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is damaged: {what}; restore it or measure again")
