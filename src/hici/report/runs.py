"""Training runs as they are reported: from metrics.jsonl, also while a run goes on, or from train.json alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hici.files import read_json
from hici.report.metrics import METRICS_FILE, events_of, read_metrics, steps_of
from hici.report.numbers import is_number

RESULT_FILE = "train.json"


@dataclasses.dataclass(frozen=True)
class RunLog:
    """A run's numbers.

    Attributes:
        steps: entries of optimizer steps, by `step` (see `hici.train.tracking`).
        heldout: {attention: [(step, loss), ...]}, nats a token.
        method, visibility: as trained; None: not recorded (visibility also where no slots are used).
        leaks_future: attentions whose losses see the future.
        clips: gradient clips by group ("hici", "other"); those that there are.
        resumes: steps from which the run went on.
        total_steps: None: not recorded.
        ended: whether the run's end is recorded.
    """

    label: str
    steps: list[dict[str, Any]]
    heldout: dict[str, list[tuple[int, float]]]
    method: str | None = None
    visibility: str | None = None
    leaks_future: frozenset[str] = frozenset()
    clips: dict[str, float] = dataclasses.field(default_factory=dict)
    resumes: tuple[int, ...] = ()
    total_steps: int | None = None
    ended: bool = False

    def points(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a field, where it has a number."""
        found = [(entry["step"], entry[key]) for entry in self.steps if is_number(entry.get(key))]
        return [step for step, _ in found], [value for _, value in found]


def read_run(directory: str | Path, label: str | None = None) -> RunLog:
    """The run whose output_dir is `directory`; metrics.jsonl counts more than train.json.

    Args:
        label: its name in pictures and tables; None: the directory's.

    Raises:
        ValueError: no run there; no step yet; a file that is damaged.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise ValueError(f"{directory} {what}, but a run is a directory; give the output_dir of a recipe")
    label = directory.resolve().name if label is None else label
    if (directory / METRICS_FILE).is_file():
        run = _from_metrics(read_metrics(directory / METRICS_FILE), label)
    elif (directory / RESULT_FILE).is_file():
        run = _from_result(directory / RESULT_FILE, label)
    else:
        raise ValueError(
            f"{directory} holds neither {METRICS_FILE} nor {RESULT_FILE}, so no run; give the output_dir of a recipe"
        )
    if not run.steps:
        raise ValueError(f"the run in {directory} has no optimizer step yet; ask again when it has done some")
    return run


def distinct_labels(directories: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart. Raises ValueError when one is given twice."""
    paths = [Path(directory).expanduser().resolve() for directory in directories]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise ValueError(f"{directories[i]} is given twice; give each run once")
    length = 1
    while True:
        labels = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
        length += 1


def _from_metrics(entries: list[dict[str, Any]], label: str) -> RunLog:
    # a resume tells the same facts again: its steps may be more
    starts = [event for event in events_of(entries, "start", "resume") if "method" in event]
    start = starts[-1] if starts else {}
    told = [entry["event"] for entry in events_of(entries, "resume", "end")]
    heldout: dict[str, dict[int, float]] = {}
    for event in events_of(entries, "heldout"):
        for attention, loss in event.get("losses", {}).items():
            if is_number(loss):
                heldout.setdefault(attention, {})[event["step"]] = loss  # measured again after a resume: the last one
    return RunLog(
        label=label,
        steps=steps_of(entries),
        heldout={attention: sorted(found.items()) for attention, found in heldout.items()},
        method=start.get("method"),
        visibility=start.get("visibility"),
        leaks_future=frozenset(name for name, leaks in start.get("leaks_future", {}).items() if leaks),
        clips={name: clip for name, clip in start.get("clips", {}).items() if is_number(clip)},
        resumes=tuple(event["step"] for event in events_of(entries, "resume")),
        total_steps=start.get("total_steps"),
        ended=told[-1:] == ["end"],
    )


def _from_result(path: Path, label: str) -> RunLog:
    result = read_json(path)
    steps = result.get("steps") if isinstance(result, dict) else None
    if not isinstance(steps, list) or not all(isinstance(entry, dict) and "step" in entry for entry in steps):
        raise ValueError(f"{path} has no list of steps, so `hici train` did not write it; give a run's output_dir")
    recipe, losses = result.get("recipe", {}), result.get("heldout_loss", {})
    last = steps[-1]["step"] if steps else 0
    heldout: dict[str, list[tuple[int, float]]] = {}
    for when, step in (("before", 0), ("after", last)):
        for attention, loss in losses.get(when, {}).items():
            if is_number(loss):
                heldout.setdefault(attention, []).append((step, loss))
    clips = {"hici": recipe.get("hici_max_grad_norm"), "other": recipe.get("max_grad_norm")}
    return RunLog(
        label=label,
        steps=steps,
        heldout=heldout,
        method=recipe.get("method", result.get("attention")),
        visibility=result.get("visibility"),
        leaks_future=frozenset(name for name, leaks in result.get("leaks_future", {}).items() if leaks),
        clips={name: clip for name, clip in clips.items() if is_number(clip)},
        total_steps=recipe.get("max_steps"),
        ended=True,
    )
