"""Numbers as text, in tables and sentences of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

MISSING = "-"


def fixed(value: Any, digits: int) -> str:
    """3.14159, 2 -> "3.14"; a thousands separator; "-" for None."""
    return f"{value:,.{digits}f}" if is_number(value) else MISSING


def signed(value: float, digits: int) -> str:
    """With its sign, a minus like the others."""
    return f"{value:+,.{digits}f}"


def percent(share: Any, digits: int = 1) -> str:
    """0.853 -> "85.3"."""
    return fixed(100 * share, digits) if is_number(share) else MISSING


def span(bounds: Any, digits: int, scale: float = 1.0) -> str:
    """(1, 2) -> "1.0 to 2.0"; "-" for None."""
    if not isinstance(bounds, Sequence) or len(bounds) != 2:
        return MISSING
    return f"{fixed(scale * bounds[0], digits)} to {fixed(scale * bounds[1], digits)}"


def signed_span(bounds: Any, digits: int) -> str:
    """(-1, 2) -> "-1.0 to +2.0"; "-" for None."""
    return MISSING if bounds is None else f"{signed(bounds[0], digits)} to {signed(bounds[1], digits)}"


def gib(num_bytes: Any) -> str:
    """Bytes in GiB."""
    return fixed(num_bytes / 2**30, 2) if is_number(num_bytes) else MISSING


def whole(value: Any) -> str:
    """1234567 -> "1,234,567"."""
    return fixed(value, 0)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def listing(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
