"""Scores of LongEval's predictions (topics and lines): files N_response.txt, one sample a line.

A line is "Label: ..., Predict: ..., prompt length: ..." (lines: with "Parsed: ..." in it).
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hici.eval.line_numbers import name_lines
from hici.eval.measure import Plan
from hici.files import file_sha256

logger = logging.getLogger(__name__)

TOPICS = "topics"
LINES = "lines"
RULES = {
    TOPICS: "the label occurs in the prediction, both lower-cased",
    LINES: "the last number of the prediction is the label",
}
_FILE = re.compile(r"(\d+)_response\.txt")
_LINE = re.compile(r"Label: (?P<label>.*?), Predict: (?P<predict>.*), prompt length: (?P<tokens>\d{1,18})")
_PARSED = re.compile(r", Parsed: -?\d+$")


@dataclass(frozen=True)
class Response:
    """One sample: the true answer, what the model wrote, the tokens of its prompt."""

    label: str
    predict: str
    prompt_tokens: int


def is_correct(kind: str, response: Response) -> bool:
    """Whether the sample counts, by the published rule (`RULES`)."""
    if kind == TOPICS:
        return response.label.lower() in response.predict.lower()
    numbers = re.findall(r"\d+", _PARSED.sub("", response.predict))
    return bool(numbers) and numbers[-1].lstrip("0") == response.label.lstrip("0")  # as text: of any length


def find_responses(directory: str | Path) -> dict[str, Path]:
    """{N: file} of a directory, N ascending. Other files are left out (logged).

    Raises:
        ValueError: no directory; no N_response.txt in it.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory; give one model's folder of N_response.txt files")
    files = sorted(path for path in directory.iterdir() if path.is_file())
    found = {match[1]: path for path in files if (match := _FILE.fullmatch(path.name))}
    others = [path.name for path in files if path not in found.values()]
    if others:
        logger.info("%s: no responses, left out: %s", directory, ", ".join(others))
    if not found:
        raise ValueError(f"{directory} holds no N_response.txt (N: a number); give one model's folder of them")
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def read_responses(path: str | Path, kind: str) -> list[Response | None]:
    """All samples of a file; None for a line that is no response. Raises ValueError for an empty file."""
    path = Path(path)
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{path} is empty; it should hold one response a line")
    return [_response(line.removesuffix(b"\r"), kind) for line in lines]


def refuse_corrupt(read: dict[Path, list[Response | None]], kind: str) -> None:
    """Raise ValueError, naming every corrupt line of every file, unless there is none."""
    told = []
    for path, responses in read.items():
        corrupt = [number for number, response in enumerate(responses, start=1) if response is None]
        if corrupt:
            told.append(f"{path} has {len(corrupt)} corrupt of {len(responses)} lines ({name_lines(corrupt)})")
    if told:
        label = "a number" if kind == LINES else "..."
        raise ValueError(f"{'; '.join(told)}, not UTF-8 of the form 'Label: {label}, Predict: ..., prompt length: N'; "
                         "restore them")  # fmt: skip


def responses_plan(directory: str | Path, kind: str) -> Plan:
    """Accuracy for every number of topics or lines. The result's `accuracy` is {N: percent}.

    Raises:
        ValueError: see `find_responses`; an empty file; corrupt lines of all files.
    """
    files = find_responses(directory)
    read = {name: read_responses(path, kind) for name, path in files.items()}
    refuse_corrupt({files[name]: responses for name, responses in read.items()}, kind)

    def measure_part(name: str) -> dict[str, Any]:
        responses = [response for response in read[name] if response is not None]
        tokens = [response.prompt_tokens for response in responses]
        correct = [is_correct(kind, response) for response in responses]
        return {
            "accuracy": round(100 * sum(correct) / len(correct), 2),
            "samples": len(correct),
            "correct": sum(correct),
            "prompt_tokens": [min(tokens), max(tokens)],
        }

    return Plan(
        task="score",
        protocol={"name": kind, "rule": RULES[kind]},
        model=None,
        data={
            "directory": Path(directory).expanduser().resolve().name,
            "files": {path.name: path.stat().st_size for path in files.values()},
            "sha256": {path.name: file_sha256(path) for path in files.values()},
        },
        seed=None,
        parts=list(files),
        measure_part=measure_part,
        summarise=lambda parts: {
            **{field: {name: part[field] for name, part in parts.items()}
               for field in ("accuracy", "samples", "correct", "prompt_tokens")},
            "conditions": [],
        },
    )  # fmt: skip


def _response(line: bytes, kind: str) -> Response | None:
    try:
        match = _LINE.fullmatch(line.decode("utf-8"))
    except UnicodeDecodeError:
        return None
    if match is None or not match["label"].strip() or (kind == LINES and not match["label"].isdecimal()):
        return None
    return Response(match["label"], match["predict"], int(match["tokens"]))
