"""The page: blocks (paragraphs, tables, figures, details), and their HTML by one template that escapes every text."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """A cell whose text is shortened: `full` is the whole value."""

    text: str
    full: str


@dataclass(frozen=True)
class Text:
    """A paragraph. kind: "plain", or "note" (framed)."""

    text: str
    kind: str = "plain"
    block: str = "text"


@dataclass(frozen=True)
class Table:
    """A table that scrolls by itself where it is wider than the page.

    Attributes:
        caption: says what the numbers are.
        columns, rows: cells are text, or `Cell` where it is shortened. The first column heads its row.
        text_columns: so many columns at the left hold text, the others numbers; None: all hold text.
        notes: lines below.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    text_columns: int | None = 1
    notes: Sequence[str] = ()
    block: str = "table"


@dataclass(frozen=True)
class Figure:
    """A picture in two widths, with its numbers.

    Attributes:
        name: of the PNG (NAME.png), and of the element.
        draw: narrow -> matplotlib figure.
        caption: what is seen and how it is read. alt: the main numbers in words.
        table: all numbers, folded away below.
    """

    name: str
    draw: Callable[[bool], Any]
    caption: str
    alt: str
    table: Table
    block: str = "figure"


@dataclass(frozen=True)
class Facts:
    """Names and values, folded away. rows: (name, value)."""

    summary: str
    rows: Sequence[tuple[str, str]]
    block: str = "facts"


@dataclass(frozen=True)
class Heading:
    """A heading inside of a section."""

    text: str
    block: str = "heading"


Block = Text | Table | Figure | Facts | Heading


@dataclass(frozen=True)
class Part:
    """A section of the page, drawn."""

    title: str
    blocks: Sequence[Block]
    anchor: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "anchor", slug(self.title))


class Picture(NamedTuple):
    """A figure's PNGs."""

    wide: bytes
    narrow: bytes


def slug(text: str) -> str:
    """ "Loss by position" -> "loss-by-position"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def render_page(title: str, lead: str, parts: Sequence[Part], pictures: dict[str, Picture], made_by: str) -> str:
    """The whole page as HTML.

    Args:
        pictures: of every figure, by name.
        made_by: the line at the end.
    """
    import jinja2

    files = resources.files("hici.report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)  # fmt: skip
    template = environment.from_string(files.joinpath("page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        lead=lead,
        parts=parts,
        made_by=made_by,
        style=files.joinpath("page.css").read_text(encoding="utf-8"),
        wide={name: _data_uri(picture.wide) for name, picture in pictures.items()},
        narrow={name: _data_uri(picture.narrow) for name, picture in pictures.items()},
        sizes={name: _png_size(picture.wide) for name, picture in pictures.items()},
        narrow_sizes={name: _png_size(picture.narrow) for name, picture in pictures.items()},
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _png_size(png: bytes) -> tuple[int, int]:
    """(width, height) from the header."""
    return int.from_bytes(png[16:20]), int.from_bytes(png[20:24])
