"""The progress bar of long work, on stderr."""

from __future__ import annotations

import sys
from typing import Any, TextIO

_SPEED_WINDOW = 24 * 3600.0  # seconds that the time left is estimated from: rich's 30 hold no step of a long context


def progress_bar(stream: TextIO | None = None) -> Any:
    """A `rich.progress.Progress` with count, time gone and time left; `stream` None: stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("after"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # what others write to stdout and stderr stays theirs: redirecting them would change the whole process
    return Progress(
        *columns,
        console=Console(file=sys.stderr if stream is None else stream),
        speed_estimate_period=_SPEED_WINDOW,
        redirect_stdout=False,
        redirect_stderr=False,
    )
