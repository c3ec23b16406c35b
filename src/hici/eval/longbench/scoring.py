"""Scores of prediction files, by dataset and by length, as a measurement that can be written as a result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hici.eval.longbench.datasets import get_dataset
from hici.eval.longbench.predictions import find_predictions, read_predictions, refuse_corrupt
from hici.eval.longbench.scorer import Scorer
from hici.eval.measure import Plan
from hici.files import file_sha256

# of LongBench-E: below 4,000 words, below 8,000, and the rest
BUCKETS = (("0-4k", 4000), ("4-8k", 8000), ("8k+", math.inf))


def percent(scores: Sequence[float]) -> float:
    """The mean of scores from 0 to 1 in percent, with two decimals as LongBench publishes it."""
    return round(100 * math.fsum(scores) / len(scores), 2)


def by_length(scores: Sequence[float], lengths: Sequence[int | None]) -> dict[str, float | None] | None:
    """The mean score in each of LongBench-E's buckets; None for one without samples. None: a length is not known."""
    if any(length is None for length in lengths):
        return None
    found: dict[str, list[float]] = {name: [] for name, _ in BUCKETS}
    for score, length in zip(scores, lengths, strict=True):
        assert length is not None
        found[next(name for name, below in BUCKETS if length < below)].append(score)
    return {name: percent(values) if values else None for name, values in found.items()}


def score_file(path: str | Path, name: str, scorer: Scorer, *, allow_corrupt: bool = False) -> dict[str, Any]:
    """Score one prediction file of the dataset `name`.

    Returns:
        score (two decimals), metric, samples (lines), by_length (see `by_length`; corrupt lines are in no bucket),
        corrupt_lines (each scored 0) and unscored (a library refused the texts: scored 0, as in LongBench), both lists
        of {"file", "line", "problem"}.

    Raises:
        ValueError: an empty file; corrupt lines, unless they are allowed; a package that is missing.
    """
    dataset = get_dataset(name)
    scorer.check(dataset)
    predictions, corrupt = read_predictions(path, dataset)
    if not allow_corrupt:
        refuse_corrupt({Path(path): (len(predictions) + len(corrupt), corrupt)})
    scored = [scorer.score(dataset, each.pred, each.answers, each.classes) for each in predictions]
    scores = [each.score for each in scored]
    return {
        "score": percent([*scores, *(0.0 for _ in corrupt)]),
        "metric": dataset.metric,
        "samples": len(predictions) + len(corrupt),
        "by_length": by_length(scores, [each.length for each in predictions]) if predictions else None,
        "corrupt_lines": [{"file": Path(path).name, "line": c.line, "problem": c.problem} for c in corrupt],
        "unscored": [
            {"file": Path(path).name, "line": each.line, "problem": result.problem}
            for each, result in zip(predictions, scored, strict=True)
            if result.problem is not None
        ],
    }


def score_plan(directory: str | Path, *, edit_similarity: str = "levenshtein", allow_corrupt: bool = False) -> Plan:
    """Scores of one model's folder of predictions. The result's `scores` is {dataset: score}.

    Raises:
        ValueError: see `find_predictions` and `Scorer`; an empty file; corrupt lines of all files, unless they are
            allowed; a package that is missing.
    """
    files = find_predictions(directory)
    scorer = Scorer(edit_similarity)
    datasets = [get_dataset(name) for name in files]
    for dataset in datasets:
        scorer.check(dataset)
    found = {}  # what is wrong is told before work begins
    for path, dataset in zip(files.values(), datasets, strict=True):
        predictions, corrupt = read_predictions(path, dataset)
        found[path] = (len(predictions) + len(corrupt), corrupt)
    if not allow_corrupt:
        refuse_corrupt(found)

    def summarise(parts: dict[str, Any]) -> dict[str, Any]:
        return {
            "scores": {name: part["score"] for name, part in parts.items()},
            "by_length": {name: part["by_length"] for name, part in parts.items()},
            "metrics": {name: part["metric"] for name, part in parts.items()},
            "samples": {name: part["samples"] for name, part in parts.items()},
            "corrupt_lines": [line for part in parts.values() for line in part["corrupt_lines"]],
            "unscored": [line for part in parts.values() for line in part["unscored"]],
            "conditions": [],
        }

    return Plan(
        task="score",
        protocol={
            "name": "longbench",
            "edit_similarity": edit_similarity,
            "allow_corrupt": allow_corrupt,
            "packages": scorer.versions(datasets),
        },
        model=None,
        data={
            "directory": Path(directory).expanduser().resolve().name,
            "files": {path.name: path.stat().st_size for path in files.values()},
            "sha256": {path.name: file_sha256(path) for path in files.values()},
        },
        seed=None,
        parts=list(files),
        measure_part=lambda name: score_file(files[name], name, scorer, allow_corrupt=allow_corrupt),
        summarise=summarise,
    )
