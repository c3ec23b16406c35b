"""The screen of a training run: a progress bar with the time left, and a line of numbers every few steps."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

from hici.report.progress import progress_bar
from hici.report.tables import size

logger = logging.getLogger(__name__)

_HEADER_EVERY = 25  # lines


class _Column(NamedTuple):
    key: str
    title: str
    width: int
    form: Callable[[Any], str]


_COLUMNS = (
    _Column("loss", "loss", 9, "{:.4f}".format),
    _Column("hici_grad_norm", "norm HiCI", 11, "{:.3g}".format),
    _Column("other_grad_norm", "norm other", 12, "{:.3g}".format),
    _Column("hici_learning_rate", "rate HiCI", 11, "{:.2e}".format),
    _Column("learning_rate", "rate", 10, "{:.2e}".format),
    _Column("segments", "segments", 10, "{}".format),
    _Column("tokens_per_second", "tokens/s", 11, "{:,.0f}".format),
    _Column("peak_memory_bytes", "peak memory", 13, size),
)


class ConsoleTable:
    """Shows steps and events as they come: on a terminal below one another above a bar, else as plain lines."""

    def __init__(
        self,
        total_steps: int,
        logging_steps: int,
        *,
        first_step: int = 0,
        remarks: dict[str, str] | None = None,
        progress: bool = True,
        write: Callable[[str], None] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        """
        Args:
            total_steps, first_step: optimizer steps in all, and those done before (a run that goes on).
            logging_steps: steps between two lines; the first step of this process and the last one have a line too.
            remarks: what stands behind every loss of an attention, such as {"hici": "not causal: visibility all"}.
            progress: False: nothing is shown.
            write: takes a line where `stream` is no terminal; None: logged as information.
            stream: None: stderr.
        """
        self.total = total_steps
        self.every = logging_steps
        self.remarks = remarks or {}
        self.progress = progress
        self.write = logger.info if write is None else write
        self._columns: list[_Column] = []  # those of the first step
        self._lines = 0
        self._bar: Any = None
        stream = sys.stderr if stream is None else stream
        if progress and stream.isatty():
            self._bar = progress_bar(stream)
            self._bar.add_task("training", total=total_steps, completed=first_step)
            self._bar.start()

    def step(self, entry: dict[str, Any]) -> None:
        """Move the bar; every `logging_steps` steps, a line."""
        if not self.progress:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=entry["step"])
        first = not self._columns
        if first:
            self._columns = [column for column in _COLUMNS if column.key in entry]
        if first or entry["step"] % self.every == 0 or entry["step"] == self.total:
            self._table_line(entry)

    def event(self, entry: dict[str, Any]) -> None:
        """A line of its own."""
        if not self.progress:
            return
        name, facts = entry["event"], {key: entry[key] for key in entry if key not in ("event", "step")}
        if name == "start":
            self._show(f"method {entry['method']}{self._remark(entry['method'])}")
        elif name == "heldout":
            losses = [f"{kind} {_plain(loss)}{self._remark(kind)}" for kind, loss in entry["losses"].items()]
            self._show(f"step {entry['step']:,}: held-out loss, nats a token: {', '.join(losses)}")
        else:
            words = ", ".join(f"{key} {_plain(value)}" for key, value in facts.items())
            self._show(f"step {entry['step']:,}: {name}{': ' if words else ''}{words}")

    def close(self) -> None:
        """Leave the bar as it is, below the lines."""
        if self._bar is not None:
            self._bar.stop()

    def _remark(self, attention: str) -> str:
        return f" ({self.remarks[attention]})" if attention in self.remarks else ""

    def _table_line(self, entry: dict[str, Any]) -> None:
        width = len(f"{self.total:,}") * 2 + 1
        if self._lines % _HEADER_EVERY == 0:
            self._show("step".rjust(width) + "".join(column.title.rjust(column.width) for column in self._columns))
        self._lines += 1
        cells = [_cell(entry.get(column.key), column) for column in self._columns]
        self._show(f"{entry['step']:,}/{self.total:,}".rjust(width) + "".join(cells))

    def _show(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self.write(line)


def _cell(value: Any, column: _Column) -> str:
    return ("-" if value is None else column.form(value)).rjust(column.width)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)
