"""What `hici report` is given: results, training runs and comparisons, found, checked and labelled."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from hici.eval.labels import attention_label
from hici.eval.results import is_result, read_result
from hici.files import read_json
from hici.report.fields import check_fields
from hici.report.metrics import METRICS_FILE
from hici.report.runs import RESULT_FILE, RunLog, distinct_labels, read_run
from hici.report.series import Key, Labelled, Look, looks_of

logger = logging.getLogger(__name__)

REPORT_MARKER = ".hici-report.json"  # a directory with it is a report
_PROTOCOLS = ("published", "strict", "position")
_MODEL_FILES = ("config.json", "adapter_config.json", "hici_config.json")
_COMPARISON_FIELDS = ("settings", "costs", "comparisons", "baselines", "runs", "made_with")


class Result(NamedTuple):
    """A result file. label: the run's, as in every table and legend."""

    label: str
    path: Path
    record: dict[str, Any]


class Comparison(NamedTuple):
    """A training comparison (`benchmarks/compare.py --out`)."""

    label: str
    path: Path
    record: dict[str, Any]


@dataclass(frozen=True)
class Gathered:
    """All that a report is of."""

    results: list[Result] = field(default_factory=list)
    runs: list[RunLog] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)

    @cached_property
    def labels(self) -> list[str]:
        """Of results, runs and comparisons; each once, in their order."""
        everything: Iterable[Any] = (*self.results, *self.runs, *self.comparisons)
        return list(dict.fromkeys(each.label for each in everything))

    @cached_property
    def looks(self) -> dict[Key, Look]:
        """One for the whole report."""
        return looks_of((result.label, result.record) for result in self.results)

    def of(self, task: str, protocol: str | None = None) -> list[Result]:
        """Results of a task (and of a protocol)."""
        return [
            result
            for result in self.results
            if result.record["task"] == task and protocol in (None, result.record["protocol"].get("name"))
        ]

    def labelled(self, task: str, protocol: str | None = None) -> list[Labelled]:
        """As `series_of` takes them."""
        return [(result.label, result.record) for result in self.of(task, protocol)]

    def protocols(self, task: str) -> list[str]:
        """Names of the protocols of a task: the known ones first, then the others as they come."""
        names = dict.fromkeys(str(result.record["protocol"].get("name")) for result in self.of(task))
        return sorted(names, key=lambda name: _PROTOCOLS.index(name) if name in _PROTOCOLS else len(_PROTOCOLS))


class _Folder(NamedTuple):
    results: list[Path]
    comparisons: list[Path]
    others: list[Path]
    run: bool
    unfinished: list[Path]

    @property
    def is_empty(self) -> bool:
        return not (self.results or self.comparisons or self.run)


def gather(arguments: Sequence[str | Path]) -> Gathered:
    """All that lies at the arguments: result files, training comparisons, and directories with them.

    A directory is searched itself and one level below; each may be a training run's output_dir. Other JSON files there
    are left out, with a warning. A result is named after its directory, or after its file where several results of a
    directory measure the same; below a training run, after the run.

    Raises:
        ValueError: nothing there; something given twice; a file that is damaged, or a result of another version.
    """
    homes: list[tuple[Path, Path]] = []  # (home, result file)
    runs: list[Path] = []
    comparisons: list[Path] = []
    for argument in arguments:
        path = Path(argument).expanduser()
        if path.is_file():
            is_one = is_comparison(read_json(path))
            comparisons += [path] if is_one else []
            homes += [] if is_one else [(path.parent, path)]
        elif path.is_dir():
            _search(path, homes, runs, comparisons)
        else:
            raise ValueError(
                f"{path} does not exist; give a result's JSON, a directory with results, or the output_dir of a "
                "training run"
            )
    _refuse_twice([path for _, path in homes] + runs + comparisons)
    files = [(home.resolve(), path, _read(path)) for home, path in homes]
    places = list(dict.fromkeys([home for home, _, _ in files] + [run.resolve() for run in runs]))
    names = dict(zip(places, distinct_labels(places), strict=True))
    results = [result for place in places for result in _labelled(place, names, files)]
    order = {path: i for i, (_, path, _) in enumerate(files)}
    return Gathered(
        results=sorted(results, key=lambda result: order[result.path]),
        runs=[read_run(run, names[run.resolve()]) for run in runs],
        comparisons=[Comparison(path.stem, path, read_json(path)) for path in comparisons],
    )


def is_comparison(value: Any) -> bool:
    """Whether JSON values are what `benchmarks/compare.py` writes."""
    return isinstance(value, dict) and all(name in value for name in _COMPARISON_FIELDS)


def _search(directory: Path, homes: list[tuple[Path, Path]], runs: list[Path], comparisons: list[Path]) -> None:
    """Add what lies in a directory and one level below."""
    top = _look_into(directory)
    below = [path for path in sorted(directory.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    folders = [(directory, top)]
    for path in below:
        if (path / REPORT_MARKER).exists() or any((path / name).exists() for name in _MODEL_FILES):
            continue
        folder = _look_into(path, strict=False)
        if not folder.is_empty:
            folders.append((path, _look_into(path)))
    if all(folder.is_empty for _, folder in folders):
        raise ValueError(
            f"{directory} holds no result, no training comparison, and neither {METRICS_FILE} nor {RESULT_FILE}, so no "
            "training run either; give what `hici eval`, `hici score`, `hici inspect` or `hici train` wrote"
        )
    for path, folder in folders:
        if folder.run:
            runs.append(path)
        home = directory if top.run and not folder.run else path
        homes += [(home, file) for file in folder.results]
        comparisons += folder.comparisons
        if folder.others:
            logger.warning("%s: no results, and left out: %s", path, ", ".join(file.name for file in folder.others))
        if folder.unfinished:
            logger.warning(
                "%s: measurements that have not ended are left out (the same command ends them): %s",
                path,
                ", ".join(file.name for file in folder.unfinished),
            )


def _look_into(directory: Path, *, strict: bool = True) -> _Folder:
    """What lies in a directory itself. strict: a file that is no JSON is an error."""
    run = (directory / METRICS_FILE).is_file() or (directory / RESULT_FILE).is_file()
    results: list[Path] = []
    comparisons: list[Path] = []
    others: list[Path] = []
    for path in sorted(directory.glob("*.json")):
        if path.name.startswith(".") or not path.is_file() or (run and path.name == RESULT_FILE):
            continue
        try:
            value = read_json(path)
        except ValueError:
            if strict:
                raise
            continue
        kind = results if is_result(value) else comparisons if is_comparison(value) else others
        kind.append(path)
    unfinished = [path for path in sorted(directory.glob("*.partial-*.jsonl")) if not path.name.startswith(".")]
    return _Folder(results, comparisons, others, run, unfinished)


def _read(path: Path) -> dict[str, Any]:
    record = read_result(path)
    check_fields(path, record)
    return record


def _refuse_twice(paths: list[Path]) -> None:
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(f"{path} is given twice; give each result and each run once")
        seen.add(path.resolve())


def _labelled(place: Path, names: dict[Path, str], files: list[tuple[Path, Path, dict[str, Any]]]) -> list[Result]:
    """The results of a place: one run's, or each a run of its own where two measure the same or of other models."""
    own = [(path, record) for home, path, record in files if home == place]
    models = {_model_key(record) for _, record in own if record["model"] is not None}
    measured = [key for _, record in own for key in _measures(record)]
    if len(models) <= 1 and len(set(measured)) == len(measured):
        return [Result(names[place], path, record) for path, record in own]
    stems = [path.stem for path, _ in own]
    prefix = f"{names[place]}/" if len(names) > 1 else ""
    return [
        Result(prefix + (path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}/{path.stem}"), path, record)
        for path, record in own
    ]


def _model_key(record: dict[str, Any]) -> Hashable:
    """What tells models apart. (The fingerprint of the whole also tells whether a plain one had segments.)"""
    model = record["model"]
    hashes = model.get("adapter_sha256") or {}
    return (model.get("path"), model.get("base_fingerprint"), tuple(sorted(hashes.items())))


def _measures(record: dict[str, Any]) -> set[Hashable]:
    """What the numbers of a result are of: two results of one run share none."""
    head = (record["task"], str(record["protocol"].get("name")))
    if not record["conditions"]:
        return {head}
    return {
        (*head, attention_label(each), *(each.get(name) for name in ("context", "task", "cases", "dataset", "depth",
                                                                     "task_name", "metric")))
        for each in record["conditions"]
    }  # fmt: skip
