"""Text files, globs, folders, .jsonl and token .bin files into documents of tokens.

A document is one text file, one line of a .jsonl, or one stretch between EOS tokens of a .bin.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".text")
_UINT16_VOCABULARY = 65_535  # larger vocabularies need four bytes a token (published rule)


class Document(NamedTuple):
    """Tokens (int64, without EOS) and where they came from."""

    source: str
    tokens: np.ndarray


def load_documents(
    sources: str | Path | Sequence[str | Path], tokenizer: Any, *, vocab_size: int | None = None, text_key: str = "text"
) -> list[Document]:
    """Read and tokenise all sources, in a stable order.

    Args:
        sources: files, globs (`books/*.txt`, `**` too) or folders (their text files, recursively). Endings: `.jsonl`
            (one object with `text_key` a line), `.bin` (raw uint16 tokens, uint32 above 65,535 entries), anything
            else is UTF-8 text.
        tokenizer: a transformers tokenizer; used without special tokens. Only its EOS id is used for `.bin`.
        vocab_size: entries of the model's vocabulary; decides the width of `.bin` tokens and checks every id.
        text_key: the text's key in a `.jsonl` object.

    Raises:
        ValueError: nothing matches; a file is missing, empty, binary or not UTF-8; a line without the key; a token
            outside of the vocabulary.
    """
    documents: list[Document] = []
    for path in expand(sources):
        if path.suffix == ".bin":
            documents += _token_documents(path, tokenizer, vocab_size)
        elif path.suffix == ".jsonl":
            documents += _tokenised(_jsonl_texts(path, text_key), tokenizer)
        else:
            documents += _tokenised([(str(path), read_text(path))], tokenizer)
    if vocab_size is not None:
        for document in documents:
            check_ids(document, vocab_size)
    return documents


def expand(sources: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files behind paths, globs and folders, sorted, each once (also when it is named in two ways)."""
    paths: dict[Path, Path] = {}
    for source in [sources] if isinstance(sources, (str, Path)) else sources:
        for path in _expand_one(str(source)):
            paths.setdefault(path.resolve(), path)
    if not paths:
        raise ValueError(f"no data: {sources!r} names no file; give text files, globs, folders, .jsonl or .bin")
    return list(paths.values())


def _expand_one(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in (*TEXT_SUFFIXES, ".jsonl", ".bin") and p.is_file())
        if not found:
            raise ValueError(f"{source} is a folder without {', '.join(TEXT_SUFFIXES)}, .jsonl or .bin files")
        return found
    if path.is_file():
        return [path]
    found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not found:
        raise ValueError(f"{source} does not exist, and as a glob it matches no file; check the path")
    return found


def read_text(path: Path) -> str:
    """A text file's content. Raises ValueError when it is empty, binary or not UTF-8."""
    raw = path.read_bytes()
    if b"\0" in raw:
        raise ValueError(f"{path} holds NUL bytes, so it is binary and not text; convert it, or name a token file .bin")
    try:
        text = raw.decode("utf-8-sig")  # some editors put a byte order mark in front
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start}: {raw[error.start]:#x}); convert it, for example with iconv"
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is empty; remove it from the data or fill it")
    return text


def _jsonl_texts(path: Path, key: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(
        read_text(path).split("\n"), start=1
    ):  # not splitlines: JSON text may hold other line ends
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} is not JSON ({error.msg}); every line of a .jsonl is one object") from error
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            have = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{place} has no text under {key!r} (it has: {have}); name the key with text_key")
        if not record[key].strip():
            raise ValueError(f"{place}: the text under {key!r} is empty; remove the line")
        yield place, record[key]


def _tokenised(texts: Any, tokenizer: Any) -> list[Document]:
    documents = []
    for source, text in texts:
        # verbose=False: a document may be longer than the tokenizer's idea of the model's context; it is packed later
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        documents.append(Document(source, np.asarray(ids, dtype=np.int64)))
    return documents


def _token_documents(path: Path, tokenizer: Any, vocab_size: int | None) -> list[Document]:
    stream = read_tokens(path, vocab_size)
    ends = np.flatnonzero(stream == tokenizer.eos_token_id) if tokenizer.eos_token_id is not None else np.array([], int)
    pieces = np.split(stream, ends)
    documents = [piece[1:] if i else piece for i, piece in enumerate(pieces)]  # the EOS itself is put back in packing
    return [Document(f"{path}#{i}", piece) for i, piece in enumerate(documents) if len(piece)]


def read_tokens(path: Path, vocab_size: int | None) -> np.ndarray:
    """A token file as it is: int64 [tokens].

    Raises:
        ValueError: the width of a token is not known; the file is empty or no multiple of it.
    """
    if vocab_size is None:
        raise ValueError(f"{path} is a token file, whose width depends on the vocabulary; give vocab_size")
    dtype = np.dtype("<u2") if vocab_size <= _UINT16_VOCABULARY else np.dtype("<u4")
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise ValueError(
            f"{path} has {size} bytes, but token files of a vocabulary of {vocab_size} hold {dtype.itemsize} bytes a "
            "token and at least one token; write it again"
        )
    return np.fromfile(path, dtype=dtype).astype(np.int64)


def check_ids(document: Document, vocab_size: int) -> None:
    """Raise ValueError unless the document has tokens and all of them are in the vocabulary."""
    if not len(document.tokens):
        raise ValueError(f"{document.source} gives no token; remove it from the data")
    low, high = int(document.tokens.min()), int(document.tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{document.source} holds token {high if high >= vocab_size else low}, but the model's vocabulary has "
            f"{vocab_size} entries (0..{vocab_size - 1}); it was made with another tokenizer"
        )
