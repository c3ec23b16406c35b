"""What a section of the report is. `hici.report.sections` holds them, one file each, as `SECTION`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hici.registry import entries
from hici.report.gather import Gathered
from hici.report.page import Block


@dataclass(frozen=True)
class Section:
    """A section before it is drawn.

    Attributes:
        order: sections stand by it.
        applies: whether there is anything to show.
        draw: its blocks.
    """

    order: int
    title: str
    applies: Callable[[Gathered], bool]
    draw: Callable[[Gathered], Sequence[Block]]


def all_sections() -> list[Section]:
    """Those of `hici.report.sections`, in their order."""
    return sorted(entries("hici.report.sections", "SECTION"), key=lambda section: section.order)
