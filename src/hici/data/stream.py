"""Documents to measure on, and the token stream that they make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hici.data.documents import check_id, map_token_file
from hici.data.encoder import Encoder
from hici.data.sources import HubOptions, Record, place, record_sets, resolve
from hici.data.tokenising import Pieces, refuse_empty


class Document(NamedTuple):
    """One text, or one token file as it is: int64 [t]."""

    tokens: np.ndarray
    is_text: bool


def load_documents(
    sources: str | Path | Sequence[str | Path],
    tokenizer: Any,
    *,
    vocab_size: int,
    text_key: str = "text",
    hub: HubOptions | None = None,
) -> list[Document]:
    """All documents of the sources in order, to measure on; without special tokens. Nothing is cached.

    Raises:
        ValueError: nothing matches; a broken or empty file; wrong columns; a token outside of the vocabulary.
    """
    encoder = Encoder(tokenizer, text_key=text_key)
    found: list[Document] = []
    for source in resolve(sources):
        for label, records in record_sets(source, hub or HubOptions()):
            if records is None:
                documents = [Document(np.array(map_token_file(Path(label), vocab_size), dtype=np.int64), False)]
            else:
                documents = [Document(tokens, True) for tokens in _encoded(label, records, encoder)]
            for document in documents:
                check_id(label, int(document.tokens.max()), vocab_size)
            found += documents
    return found


def join_documents(documents: Sequence[Document], eos_token_id: int | None) -> np.ndarray:
    """One stream, int64 [tokens]: every text followed by EOS (where the tokenizer has one), token files as they are."""
    end = [] if eos_token_id is None else [eos_token_id]
    parts = [np.append(tokens, end) if is_text else tokens for tokens, is_text in documents]
    return np.concatenate(parts).astype(np.int64)


def load_stream(
    sources: str | Path | Sequence[str | Path],
    tokenizer: Any,
    *,
    vocab_size: int,
    text_key: str = "text",
    hub: HubOptions | None = None,
) -> tuple[np.ndarray, int]:
    """(`join_documents` of all `load_documents`, how many they are). Raises ValueError as they do."""
    documents = load_documents(sources, tokenizer, vocab_size=vocab_size, text_key=text_key, hub=hub)
    return join_documents(documents, tokenizer.eos_token_id), len(documents)


def _encoded(label: str, records: Iterator[Record], encoder: Encoder) -> list[np.ndarray]:
    """Tokens of all documents of a file or data set that have any. Raises ValueError when none has."""
    pieces = Pieces(records, encoder)
    documents = []
    for piece in pieces:
        samples = [(place(label, number), sample) for number, sample in zip(piece.numbers, piece.samples, strict=True)]
        documents += [encoded.ids for found in encoder.encode(samples) for encoded in found]
    found = [document for document in documents if len(document)]
    refuse_empty(label, len(found), pieces.empty[label] + len(documents) - len(found))
    return found
