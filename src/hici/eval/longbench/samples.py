"""LongBench's own data files: DATASET.jsonl, one sample a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hici.eval.longbench.datasets import get_dataset, in_order
from hici.eval.longbench.scorer import answer_problem

_FIELDS = ("input", "context", "answers", "all_classes", "length")

Sample = dict[str, Any]  # a line as it is: _FIELDS, and in LongBench's files dataset, language, _id


def find_data(sources: Sequence[str | Path], datasets: Sequence[str] | None = None) -> dict[str, Path]:
    """{dataset: file} of files and folders of .jsonl files, in LongBench's order.

    Args:
        datasets: those that are wanted; None: all that are there.

    Raises:
        ValueError: a path that does not exist; a folder without .jsonl; a file that is named like no dataset (in a
            folder from which `datasets` chooses, others may lie beside); one dataset twice; one that is not there.
    """
    wanted = None if datasets is None else {get_dataset(name).name for name in datasets}
    found: dict[str, Path] = {}
    for source in map(Path, sources):
        for path in _files(source.expanduser()):
            if wanted is not None and path.stem not in wanted:
                continue
            get_dataset(path.stem, f"LongBench dataset (of {path})", "Rename the file, or choose with --datasets.")
            if path.stem in found:
                raise ValueError(f"{found[path.stem]} and {path} are both of {path.stem}; give one of them")
            found[path.stem] = path
    missing = in_order(wanted - set(found)) if wanted is not None else []
    if missing:
        raise ValueError(f"there is no {missing[0]}.jsonl in {', '.join(map(str, sources))}; give its file or folder")
    return {name: found[name] for name in in_order(found)}


def read_samples(path: str | Path, name: str) -> list[Sample]:
    """All samples of a file of the dataset `name`.

    Raises:
        ValueError: an empty file; a line that is no sample of it, by number.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")  # bytes: only \n ends a line, since JSON text may hold other line ends
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{path} is empty; it should hold one sample of {name} a line")
    samples = []
    for number, line in enumerate(lines, start=1):
        try:
            sample = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is no JSON ({error}); restore the file") from error
        problem = _problem(sample, name)
        if problem is not None:
            raise ValueError(f"{path} line {number}: {problem}; give LongBench's own file of {name}, or restore it")
        samples.append(sample)
    return samples


def evenly_spaced(available: int, count: int | None) -> list[int]:
    """Indices of `count` of `available` samples: the middles of as many equal parts; None: all."""
    count = available if count is None else min(count, available)
    return [(2 * i + 1) * available // (2 * count) for i in range(count)]


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        found = sorted(path for path in source.iterdir() if path.suffix == ".jsonl" and path.is_file())
        if not found:
            raise ValueError(f"{source} holds no .jsonl file; give LongBench's data folder, or its files")
        return found
    if not source.is_file():
        raise ValueError(f"{source} does not exist; give LongBench's data folder, or its files")
    return [source]


def _problem(sample: Any, name: str) -> str | None:
    if not isinstance(sample, dict):
        return "it is no JSON object"
    missing = [field for field in _FIELDS if field not in sample]
    if missing:
        return f"it lacks {', '.join(missing)}"
    for field in ("input", "context"):
        if not isinstance(sample[field], str):
            return f"{field} is {str(sample[field])[:40]!r}, no text"
    if not isinstance(sample["length"], int) or isinstance(sample["length"], bool):
        return f"length is {sample['length']!r}, no number of words"
    named = sample.get("dataset", name)
    if named not in (name, name.removesuffix("_e")):
        return f"its dataset is {named!r}"
    return answer_problem(get_dataset(name), sample["answers"], sample["all_classes"])
