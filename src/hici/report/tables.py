"""Tables for the terminal: whole also when the output goes into a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_FILE_WIDTH = 200  # rich assumes 80 columns without a terminal


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print a table to stdout: first column left, the others right; cells fold, nothing is cut."""
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    _print(title, table, rows, notes)


def print_facts(title: str, rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print names and values to stdout, all left-aligned, without a header."""
    table = Table(show_header=False)
    for _ in range(max(len(row) for row in rows)):
        table.add_column(overflow="fold")
    _print(title, table, rows, notes)


def _print(title: str, table: Table, rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    console = Console(file=sys.stdout) if sys.stdout.isatty() else Console(file=sys.stdout, width=_FILE_WIDTH)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    # not the table's own title, which folds at the table's width
    for line in (title, table, *notes):
        console.print(line, markup=False, highlight=False, style="bold" if line is title else None)


def integer(value: int) -> str:
    """1234567 -> "1,234,567"."""
    return f"{value:,}"


def interval(bounds: tuple[float, float] | None, digits: int) -> str:
    """(1, 2) -> "[1.0, 2.0]"; "-" where there is none (one window)."""
    return "-" if bounds is None else f"[{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def size(num_bytes: float) -> str:
    """Bytes in GiB, or MiB below one."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
