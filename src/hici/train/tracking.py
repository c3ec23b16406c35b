"""What a training run tells while it goes: metrics.jsonl, the screen, TensorBoard.

All trackers have `step(entry)`, `event(entry)` and `close()`. An entry of `step` has these fields (those that there
are): step (from 1), loss, hici_grad_norm, other_grad_norm, learning_rate, hici_learning_rate, tokens (of this step, of
all processes), seconds (of this step), tokens_per_second, peak_memory_bytes (so far), segments (where they are drawn).
An entry of `event` has `event` and `step`: start (see `start_event`), resume, checkpoint (path), heldout (losses: by
attention), end. Only one process of a run has trackers.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from hici.files import atomic_file, split_torn
from hici.models.lookup import FULL, HICI
from hici.report.metrics import METRICS_FILE, read_metrics
from hici.train.console import ConsoleTable
from hici.train.output import TENSORBOARD
from hici.train.recipe import Recipe

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """One place that a run is told to."""

    def step(self, entry: dict[str, Any]) -> None:
        """An optimizer step."""

    def event(self, entry: dict[str, Any]) -> None:
        """Something that happens between steps."""

    def close(self) -> None:
        """The end of this process's part; may be called again."""


class Trackers:
    """Several trackers as one; a context manager that closes them."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self.trackers = list(trackers)

    def step(self, entry: dict[str, Any]) -> None:
        """Tell all of them of an optimizer step."""
        for tracker in self.trackers:
            tracker.step(entry)

    def event(self, entry: dict[str, Any]) -> None:
        """Tell all of them of an event."""
        for tracker in self.trackers:
            tracker.event(entry)

    def close(self) -> None:
        """Close all of them, also when one fails; the first failure is raised."""
        failures = []
        for tracker in self.trackers:
            try:
                tracker.close()
            except (OSError, ValueError) as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MetricsLog:
    """Appends entries to a metrics.jsonl; every line is on its way to the disk before the next step begins.

    A last line that a killed process did not finish is cut off when the file is opened, with a warning. Numbers that
    are NaN or infinite are no JSON: they become null, with a warning.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises ValueError when an existing file holds a line that is no entry."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._last = 0
        self._open()

    def step(self, entry: dict[str, Any]) -> None:
        """Append an optimizer step. Raises ValueError when it does not come after the last one in the file."""
        if entry["step"] <= self._last:
            raise ValueError(
                f"step {entry['step']} after step {self._last} in {self.path} would give the curve two values at one "
                f"place; call truncate_after({entry['step'] - 1}) when a run goes on from a checkpoint"
            )
        self._append(entry)
        self._last = entry["step"]

    def event(self, entry: dict[str, Any]) -> None:
        """Append an event, and have the disk hold everything so far."""
        self._append(entry)
        os.fsync(self._file.fileno())

    def truncate_after(self, step: int) -> int:
        """Drop the steps and events beyond `step`, so that a run goes on from there. Returns how many were dropped."""
        self.close()
        entries = read_metrics(self.path)
        kept = [entry for entry in entries if entry["step"] <= step]
        if len(kept) < len(entries):
            with atomic_file(self.path) as temporary:
                temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
            logger.info("%s: %d entries beyond step %d taken out", self.path, len(entries) - len(kept), step)
        self._open()
        return len(entries) - len(kept)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self) -> None:
        if self.path.exists():
            _repair(self.path)
            self._last = max((e["step"] for e in read_metrics(self.path) if "event" not in e), default=0)
        self._file = self.path.open("a", encoding="utf-8", newline="\n")

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(entry, str(self.path))) + "\n")
        self._file.flush()


class TensorBoardLog:
    """The same numbers as scalars for TensorBoard: train/loss, train/hici_grad_norm, ..., heldout/full, ..."""

    def __init__(self, directory: str | Path, *, resumed_at: int | None = None) -> None:
        """`resumed_at`: step of the checkpoint that the run goes on from; what is there beyond it is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge)

    def step(self, entry: dict[str, Any]) -> None:
        """One scalar for each number of the step."""
        for name, value in entry.items():
            if name != "step" and _is_number(value):
                self._writer.add_scalar(f"train/{name}", value, entry["step"])

    def event(self, entry: dict[str, Any]) -> None:
        """Held-out losses as scalars; every event flushes, so that a checkpoint does not outlive its curve."""
        for name, value in entry.get("losses", {}).items():
            self._writer.add_scalar(f"{entry['event']}/{name}", value, entry["step"])
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def check_tracking(recipe: Recipe) -> None:
    """Raise ValueError when the recipe asks for TensorBoard and its package is not installed."""
    if recipe.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "tensorboard=true needs the package tensorboard, which is not installed; pip install 'hici[tracking]', or "
            "take the key out (metrics.jsonl has the same numbers)"
        )


def make_trackers(
    recipe: Recipe,
    output: Path,
    *,
    resumed_at: int | None = None,
    progress: bool = True,
    write: Callable[[str], None] | None = None,
) -> Trackers:
    """The trackers of a recipe; call it in one process only.

    Args:
        resumed_at: step of the checkpoint that the run goes on from; later entries are taken out. None: a new run.
        progress, write: as `ConsoleTable`.

    Raises:
        ValueError: a new run, but `output` holds metrics already; TensorBoard is asked for and not installed.
    """
    path = output / METRICS_FILE
    if resumed_at is None and path.exists():
        raise ValueError(
            f"{path} exists, and a new run would go on with its curve; give another output_dir, or --overwrite true"
        )
    # before the file is made, so that nothing is left behind where the package is not installed
    board = [TensorBoardLog(output / TENSORBOARD, resumed_at=resumed_at)] if recipe.tensorboard else []
    metrics = MetricsLog(path)
    if resumed_at is not None:
        metrics.truncate_after(resumed_at)
    start = start_event(recipe)
    remark = f"not causal: visibility {start['visibility']}"
    screen = ConsoleTable(
        recipe.max_steps,
        recipe.logging_steps,
        first_step=resumed_at or 0,
        remarks={attention: remark for attention, leaks in start["leaks_future"].items() if leaks},
        progress=progress,
        write=write,
    )
    return Trackers([metrics, screen, *board])


def start_event(recipe: Recipe) -> dict[str, Any]:
    """The first entry of a run: what `hici report` must know to draw and to name it."""
    config = recipe.hici_config()
    slots = recipe.method == HICI and (config.use_global or config.use_local)
    return {
        "event": "start",
        "step": 0,
        "method": recipe.method,
        "visibility": config.visibility if slots else None,
        "leaks_future": {recipe.method: slots and config.visibility != "past", FULL: False},
        "clips": {"hici": _clip(recipe.hici_max_grad_norm), "other": _clip(recipe.max_grad_norm)},
        "total_steps": recipe.max_steps,
        "context_length": recipe.context_length,
    }


def _clip(value: float) -> float | None:
    """A gradient clip; None where there is none."""
    return value if math.isfinite(value) else None


def _repair(path: Path) -> None:
    """Cut off a last line that is not whole; give one that lacks only its newline that."""
    content = path.read_bytes()
    whole, torn = split_torn(content)
    if torn:
        logger.warning("%s: the last line was not finished (%d bytes) and is cut off", path, len(torn))
    if whole != content:
        with atomic_file(path) as temporary:
            temporary.write_bytes(whole)


def _finite(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item, f"{where}: {key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item, where) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        logger.warning("%s is %s, which JSON cannot hold; null is written", where, value)
        return None
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
