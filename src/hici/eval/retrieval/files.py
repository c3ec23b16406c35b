"""Local files of retrieval: text to hide things in, and test cases of LongEval's form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hici.data.sources import LINES_SUFFIXES, file_records, resolve
from hici.eval.retrieval.base import Filler
from hici.files import file_sha256

_LONGEST_SENTENCE = 300  # letters; longer ones (tables, program text) are cut between words
_SENTENCE = re.compile(r"""\S.*?(?:[.!?]["'\u201d\u2019)\]]*(?=\s)|$)""")


def read_haystack(names: Sequence[str]) -> tuple[Filler, dict[str, Any]]:
    """(sentences of text files, what a result says of them). White space becomes single spaces.

    Raises:
        ValueError: no such file; not text; nothing in it.
    """
    files = [path for source in resolve(list(names)) for path in source.files]
    sentences: list[str] = []
    for path in files:
        for record in file_records(path):
            if not isinstance(record.value, str):
                raise ValueError(f"--haystack {path} holds records, but sentences are taken from plain text; give .txt")
            sentences += split_sentences(record.value)
    about = {
        "files": [{"path": str(path), "sha256": file_sha256(path)} for path in files],
        "sentences": len(sentences),
    }
    return Filler(tuple(sentences), repeats=False), about


def split_sentences(text: str) -> list[str]:
    """Sentences of at most 300 letters (longer words stay whole); joined by spaces they are the text again."""
    sentences: list[str] = []
    for sentence in _SENTENCE.findall(" ".join(text.split())):
        piece = ""
        for word in sentence.split(" "):
            if piece and len(piece) + 1 + len(word) > _LONGEST_SENTENCE:
                sentences.append(piece)
                piece = word
            else:
                piece = f"{piece} {word}" if piece else word
        sentences.append(piece)
    return sentences


@dataclass(frozen=True)
class FileCase:
    """One test case of a file, asked as it stands there."""

    place: str
    prompt: str
    expected: str
    lead_in: str


@dataclass(frozen=True)
class CaseFile:
    """A file of LongEval's test cases: `task` is "topics" or "lines"."""

    path: str
    sha256: str
    task: str
    cases: tuple[FileCase, ...]


def read_cases(name: str) -> CaseFile:
    """A .jsonl of LongEval: every line has a `prompt`, and `topics` (the first is asked) or `expected_number`.

    Raises:
        ValueError: no such file; a line that is neither, or is of the other kind than the first; all by name.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() not in LINES_SUFFIXES or not path.is_file():
        problem = "does not exist" if not path.exists() else "is no .jsonl file"
        raise ValueError(f"--cases {name} {problem}; give a file with one test case a line")
    task, cases = None, []
    for record in file_records(path):
        assert isinstance(record.value, dict)
        kind, case = _case(record.value, record.place)
        if task is not None and kind != task:
            raise ValueError(f"{record.place} is a case of {kind}, and those before it are of {task}; give a file each")
        task = kind
        cases.append(case)
    assert task is not None
    return CaseFile(str(path), file_sha256(path), task, tuple(cases))


def _case(value: dict[str, Any], place: str) -> tuple[str, FileCase]:
    prompt, topics, number = (value.get(name) for name in ("prompt", "topics", "expected_number"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{place} has no text in 'prompt'; give LongEval's test cases, or leave the line out")
    if isinstance(number, int) and not isinstance(number, bool):
        return "lines", FileCase(place, prompt, str(number), "The <REGISTER_CONTENT> in that line is <")
    if isinstance(topics, list) and topics and isinstance(topics[0], str) and topics[0].strip():
        return "topics", FileCase(place, prompt, topics[0], "The first topic we discussed was")
    raise ValueError(
        f"{place} has neither a whole 'expected_number' (lines) nor a list of 'topics'; give LongEval's test cases, or "
        "leave the line out"
    )
