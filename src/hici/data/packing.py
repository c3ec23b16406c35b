"""Documents -> one token stream -> whole sequences; and the held-out split by document."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hici.data.documents import Document, check_ids, expand, load_documents, read_tokens

logger = logging.getLogger(__name__)


def token_stream(documents: Sequence[Document], eos_token_id: int | None) -> np.ndarray:
    """All documents in order, each followed by EOS (where there is one): int64 [tokens]."""
    end = [] if eos_token_id is None else [np.array([eos_token_id], dtype=np.int64)]
    return np.concatenate([part for document in documents for part in (document.tokens, *end)])


def load_stream(
    sources: str | Path | Sequence[str | Path], tokenizer: Any, *, vocab_size: int, text_key: str = "text"
) -> tuple[np.ndarray, int]:
    """(stream, documents) to measure on: int64 [tokens] of all sources in order, and how many documents they hold.

    A text document is followed by EOS; a token file is taken as it is, and counts as one.

    Raises:
        ValueError: as `load_documents`.
    """
    parts, count = [], 0
    for path in expand(sources):
        if path.suffix == ".bin":
            documents = [Document(str(path), read_tokens(path, vocab_size))]
            check_ids(documents[0], vocab_size)
            parts.append(documents[0].tokens)
        else:
            documents = load_documents(path, tokenizer, vocab_size=vocab_size, text_key=text_key)
            parts.append(token_stream(documents, tokenizer.eos_token_id))
        count += len(documents)
    return np.concatenate(parts), count


def pack(
    documents: Sequence[Document], length: int, eos_token_id: int | None, *, seed: int, what: str = "the data"
) -> np.ndarray:
    """Documents in a seeded random order, packed into whole sequences: int64 [sequences, length].

    `what` names the documents in an error. The tokens behind the last whole sequence are left out (fewer than
    `length`; the caller can count them).

    Raises:
        ValueError: fewer tokens than one sequence.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    stream = token_stream([documents[i] for i in order], eos_token_id)
    count = len(stream) // length
    if count == 0:
        raise ValueError(
            f"{what} has {len(stream)} tokens, fewer than one sequence of {length}; give more text or a shorter context"
        )
    return stream[: count * length].reshape(count, length)


def content_hash(document: Document) -> str:
    """SHA-256 of its tokens."""
    return hashlib.sha256(document.tokens.tobytes()).hexdigest()


def split_documents(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """(training, held out): whole documents, chosen by a hash of their tokens.

    The same documents give the same split in any order, and the same text is never on both sides. (Other documents
    can give another split: hold out files of their own to compare runs on different data.) `fraction` is of tokens
    and approximate: documents are taken in the order of their hash, without those that would overshoot twice; a share
    that is far from it is logged.

    Raises:
        ValueError: a fraction outside of [0, 1); fewer than two documents with a fraction above 0.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"held-out fraction {fraction} is not in [0, 1); give for example 0.05")
    if fraction == 0:
        return list(documents), []
    by_content: dict[str, list[Document]] = {}
    for document in documents:
        by_content.setdefault(content_hash(document), []).append(document)
    if len(by_content) < 2:
        raise ValueError(
            f"a held-out split by document needs two different documents, but the data has {len(by_content)}; give "
            "more files, a separate held-out set, or heldout_fraction=0"
        )
    wanted = fraction * sum(len(document.tokens) for document in documents)
    sizes = {key: sum(len(document.tokens) for document in by_content[key]) for key in sorted(by_content)}
    chosen: set[str] = set()
    tokens = 0
    for key, size in list(sizes.items())[:-1]:  # at least one stays for training
        if tokens < wanted and tokens + size <= 2 * wanted:
            chosen.add(key)
            tokens += size
    if not chosen:
        smallest = min(sizes, key=lambda key: sizes[key])
        chosen, tokens = {smallest}, sizes[smallest]
    if not 0.5 * wanted <= tokens <= 2 * wanted:
        logger.warning(
            "%.1f %% of the tokens are held out instead of %.1f %%, since documents are held out whole; split long "
            "documents, or give held-out data of its own", 100 * fraction * tokens / wanted, 100 * fraction,
        )  # fmt: skip
    train = [d for key, group in by_content.items() if key not in chosen for d in group]
    heldout = [d for key, group in by_content.items() if key in chosen for d in group]
    return train, heldout
