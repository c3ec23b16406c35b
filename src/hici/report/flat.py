"""Nested JSON values as names and texts."""

from __future__ import annotations

import json
import re
from typing import Any

from hici.report.page import Cell

_HASH = re.compile(r"(sha256:)?([0-9a-f]{40,})(\+changes)?")


def flatten(value: Any, name: str = "", depth: int = 9) -> dict[str, str]:
    """{"model.rope.positions": "8192", ...}: dots between the names of objects, lists as JSON.

    `depth`: objects below so many others are one JSON text.
    """
    if isinstance(value, dict) and value and depth > 0:
        flat: dict[str, str] = {}
        for key, each in value.items():
            flat |= flatten(each, f"{name}.{key}" if name else str(key), depth - 1)
        return flat
    return {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def shortened(text: str, letters: int = 64) -> str | Cell:
    """A hash by its first 12 digits, any other long text by its beginning; the whole is the cell's title."""
    found = _HASH.fullmatch(text)
    if found:
        return Cell(f"{found[2][:12]}{found[3] or ''}", text)
    return text if len(text) <= letters else Cell(f"{text[: letters - 1]}…", text)
