"""Prediction files in LongBench's format: DATASET.jsonl, a line a sample with pred, answers, all_classes, length."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hici.eval.line_numbers import name_problems
from hici.eval.longbench.datasets import Dataset, get_dataset, in_order
from hici.eval.longbench.scorer import answer_problem

logger = logging.getLogger(__name__)

_JOURNAL = re.compile(r".*\.partial-\d+\.jsonl")  # of an interrupted scoring whose result goes into the same directory
_SHOWN = 40  # letters of a wrong value that an error shows


@dataclass(frozen=True)
class Prediction:
    """One sample. length: words (or letters) of its context as LongBench counts them; None: the line does not tell."""

    line: int
    pred: str
    answers: list[str]
    classes: list[str] | None
    length: int | None


class Corrupt(NamedTuple):
    """A line that is no prediction, and why."""

    line: int
    problem: str


def find_predictions(directory: str | Path) -> dict[str, Path]:
    """{dataset: file} of a directory, in LongBench's order. Files of another ending than .jsonl are left out (logged).

    Raises:
        ValueError: no directory; no .jsonl in it; one that is named like no dataset.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory; give one model's folder of predictions, DATASET.jsonl files")
    files = sorted(path for path in directory.iterdir() if path.is_file())
    chosen = [path for path in files if path.suffix == ".jsonl" and not _JOURNAL.fullmatch(path.name)]
    others = [path.name for path in files if path not in chosen]
    if others:
        logger.info("%s: no predictions, left out: %s", directory, ", ".join(others))
    if not chosen:
        raise ValueError(
            f"{directory} holds no .jsonl file; give one model's folder of predictions, DATASET.jsonl files"
        )
    for path in chosen:
        get_dataset(path.stem, f"LongBench dataset (of {path})", "Rename the file, or move it elsewhere.")
    by_name = {path.stem: path for path in chosen}
    return {name: by_name[name] for name in in_order(by_name)}


def read_predictions(path: str | Path, dataset: Dataset) -> tuple[list[Prediction], list[Corrupt]]:
    """All samples of a file, and its corrupt lines. Raises ValueError for an empty file."""
    path = Path(path)
    lines = path.read_bytes().split(b"\n")  # bytes: only \n ends a line, since JSON text may hold other line ends
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{path} is empty; it should hold one prediction a line")
    read = [_prediction(number, line, dataset) for number, line in enumerate(lines, start=1)]
    return (
        [each for each in read if isinstance(each, Prediction)],
        [each for each in read if isinstance(each, Corrupt)],
    )


def refuse_corrupt(found: dict[Path, tuple[int, list[Corrupt]]]) -> None:
    """Raise ValueError, naming every corrupt line, unless there is none. `found`: {file: (all its lines, corrupt)}."""
    told = [
        f"{path} has {len(corrupt)} corrupt of {lines} lines ({name_problems(corrupt)})"
        for path, (lines, corrupt) in found.items()
        if corrupt
    ]
    if told:
        raise ValueError(
            f"{'; '.join(told)}; restore them, or give --allow-corrupt (allow_corrupt=True) to score them as 0 and "
            "list them in the result"
        )


def prediction_record(pred: str, sample: dict[str, Any]) -> dict[str, Any]:
    """The values of one line, for a prediction of one of LongBench's samples."""
    return {"pred": pred, **{key: sample.get(key) for key in ("answers", "all_classes", "length", "_id")}}


def _prediction(number: int, line: bytes, dataset: Dataset) -> Prediction | Corrupt:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Corrupt(number, f"no JSON ({_reason(error)})" if line.strip() else "empty")
    if not isinstance(values, dict):
        return Corrupt(number, "no JSON object")
    missing = [key for key in ("pred", "answers") if key not in values]
    if missing:
        return Corrupt(number, f"lacks {' and '.join(missing)}")
    if not isinstance(values["pred"], str):
        return Corrupt(number, f"pred is {str(values['pred'])[:_SHOWN]}, no text")
    length = values.get("length")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 0):
        return Corrupt(number, f"length is {repr(length)[:_SHOWN]}, no number of words")
    problem = answer_problem(dataset, values["answers"], values.get("all_classes"))
    if problem is not None:
        return Corrupt(number, problem)
    return Prediction(number, values["pred"], values["answers"], values.get("all_classes"), length)


def _reason(error: Exception) -> str:
    """Without a place in the line, so that lines with the same fault are told of together."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return {UnicodeDecodeError: "no UTF-8", RecursionError: "nested too deeply"}.get(type(error), str(error))
