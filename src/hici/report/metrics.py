"""metrics.jsonl: what a training run leaves behind, one JSON object a line.

A line is an optimizer step, {"step": 7, "loss": 2.1, ...}, or an event, {"event": "checkpoint", "step": 7, ...}.
`step` counts from 1; events before the first step have step 0. `hici.train.tracking` writes the file.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from hici.files import split_torn

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl, in the file's order.

    A last line that a killed process did not finish is left out, with a warning.

    Raises:
        ValueError: no such file; a line that is no entry, with its number.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; `hici train` writes it, so check the path")
    whole, torn = split_torn(path.read_bytes())
    if torn:
        logger.warning("%s: the last line is not whole (%d bytes) and is left out", path, len(torn))
    return [_entry(path, i, line) for i, line in enumerate(whole.splitlines(), start=1)]


def steps_of(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The optimizer steps among the entries."""
    return [entry for entry in entries if "event" not in entry]


def events_of(entries: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The events of those names among the entries."""
    return [entry for entry in entries if entry.get("event") in names]


def _entry(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is not JSON ({error}); take the line out, or restore the file") from (
            error
        )
    step = entry.get("step") if isinstance(entry, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(
            f"{path}, line {number} has step {step!r}, but an entry is an object with a whole number `step` >= 0; take "
            "the line out, or restore the file"
        )
    for name in ("losses", "leaks_future", "clips"):
        if not isinstance(entry.get(name, {}), dict):
            raise ValueError(
                f"{path}, line {number} has {name} {entry[name]!r}, but it is an object; take the line out, or restore "
                "the file"
            )
    return entry
