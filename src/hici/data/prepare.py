"""Everything between the names of the data and rows to train on: `prepare`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from typing import Any, NamedTuple

import numpy as np

from hici.data.cache import TokenCache
from hici.data.documents import Documents
from hici.data.encoder import FORMATS, Encoder
from hici.data.packing import DocumentRows, PackedRows, Rows, SampleRows, fits_shortened
from hici.data.reading import Reader
from hici.data.samples import INSTRUCTION
from hici.data.sources import HubOptions, resolve
from hici.data.split import refuse_overlap, split_documents
from hici.registry import suggest

logger = logging.getLogger(__name__)

PACKINGS = ("packed", "document")
OVERLONG = ("skip", "shorten", "error")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What is read, and how it becomes rows. See docs/data.md.

    Attributes:
        sources: files, globs, folders, `hub:org/name`.
        length: tokens of a sequence.
        seed: of the order of training.
        data_format: "text", or "instruction" (loss on answers; each sample is a row whatever `packing` says).
        text_key: the text's column.
        packing: "packed" (whole sequences, EOS between documents) or "document" (each one rows of its own).
        prompt: of instruction data: "auto", "alpaca", "llama2", "chat".
        overlong: samples longer than `length`: "skip", "shorten" or "error".
        heldout_sources: held-out data; None: `heldout_fraction` of `sources`.
        heldout_windows: held-out rows, the same for every seed; 0: none, and nothing is held out of `sources`.
        hub_split, hub_config, streaming: of hub data sets.
        max_documents: of each source, the first ones with something to learn.
        token_cache: directory; None: `hici.data.cache.default_cache`.
        workers: processes that tokenise.

    Raises:
        ValueError: a value that is none of these; a number too small.
    """

    sources: list[str]
    length: int
    seed: int = 0
    data_format: str = "text"
    text_key: str = "text"
    packing: str = "packed"
    prompt: str = "auto"
    overlong: str = "skip"
    heldout_sources: list[str] | None = None
    heldout_fraction: float = 0.02
    heldout_windows: int = 8
    hub_split: str = "train"
    hub_config: str | None = None
    streaming: bool = False
    max_documents: int | None = None
    token_cache: str | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        for name, known in (("data_format", FORMATS), ("packing", PACKINGS), ("overlong", OVERLONG)):
            if getattr(self, name) not in known:
                raise ValueError(suggest(getattr(self, name), known, name))
        for name, least in (("length", 2), ("workers", 1), ("max_documents", 1), ("heldout_windows", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is below {least}; give at least {least}")
        if self.streaming and self.max_documents is None:
            raise ValueError("streaming without max_documents would read without end; give max_documents")


class PreparedData(NamedTuple):
    """Rows to train on and held-out rows, what train.json says of them, and a hash of all that decides them."""

    train: Rows
    heldout: Rows
    summary: dict[str, Any]
    fingerprint: str


class _Fitted(NamedTuple):
    """Samples that a row can hold, and how many were longer, were left out, will be shortened."""

    documents: Documents
    overlong: int
    skipped: int
    shortened: int


def prepare(options: DataOptions, tokenizer: Any, *, vocab_size: int, progress: bool = True) -> PreparedData:
    """Read, tokenise (once: the rest is in the cache), split and pack.

    Args:
        options: what and how.
        tokenizer: of transformers.
        vocab_size: entries of the model's vocabulary; the width of .bin tokens, and the limit of every id.
        progress: show a bar on a terminal while it tokenises.

    Raises:
        ValueError: sources that match nothing, cannot be read or give no text; wrong columns, an unknown prompt, ids
            beyond the vocabulary; data too short for one row; the same document in training and held out.
    """
    encoder = Encoder(tokenizer, options.data_format, text_key=options.text_key, prompt=options.prompt)
    reader = Reader(
        encoder,
        TokenCache(options.token_cache, encoder.fingerprint()),
        vocab_size,
        hub=HubOptions(options.hub_split, options.hub_config, options.streaming),
        max_documents=options.max_documents,
    )
    groups = [resolve(options.sources)]
    if options.heldout_sources is not None:
        groups.append(resolve(options.heldout_sources))
    fitted = [_fit(documents, options) for documents in reader.read(groups, workers=options.workers, progress=progress)]
    if len(fitted) == 2:
        training, heldout = fitted[0].documents, fitted[1].documents
        refuse_overlap(training, heldout)
    else:
        fraction = options.heldout_fraction if options.heldout_windows else 0.0
        training, heldout = split_documents(fitted[0].documents, fraction)
    eos = tokenizer.eos_token_id
    train = _rows(training, options, eos, "the data", options.seed)
    copies = len(training) - len(np.unique(training.hashes, axis=0))
    if copies:
        logger.warning("%d of %d documents to train on are copies of others; they stay", copies, len(training))
    longest = int(training.size.max())
    if not isinstance(train, PackedRows) and longest < options.length:
        logger.warning(
            "every document is shorter than the context of %d tokens (the longest has %d), so no row is as long as it: "
            "give longer documents, a shorter context_length, or for text packing: packed", options.length, longest,
        )  # fmt: skip
    what = f"the held-out part (heldout_fraction {options.heldout_fraction}, heldout_data or heldout_windows 0 help)"
    held = _rows(heldout, options, eos, what, None, limit=options.heldout_windows)  # whatever the seed
    fingerprint = _fingerprint(options, eos, training, heldout)
    return PreparedData(train, held, _summary(options, train, held, fitted, fingerprint), fingerprint)


def _fit(documents: Documents, options: DataOptions) -> _Fitted:
    """Samples longer than a row dealt with as `overlong` says; documents of text as they are."""
    longer = documents.size > options.length
    if options.data_format != INSTRUCTION or not longer.any():
        return _Fitted(documents, 0, 0, 0)
    first = int(np.flatnonzero(longer)[0])
    example = f"the first one, {documents.source(first)}, has {documents.size[first]}"
    if options.overlong == "error":
        raise ValueError(
            f"{longer.sum()} of {len(documents)} samples are longer than context_length={options.length}; {example} "
            "tokens. Give a longer context, or overlong: skip or shorten"
        )
    kept = fits_shortened(documents, options.length) if options.overlong == "shorten" else ~longer
    counts = _Fitted(documents.select(kept), int(longer.sum()), int((~kept).sum()), int((longer & kept).sum()))
    told = (
        f"{counts.overlong} of {len(documents)} samples are longer than {options.length} tokens ({example}): "
        f"{counts.shortened} are shortened in the middle of the user's longest message, {counts.skipped} left out"
    )
    if not len(counts.documents):
        raise ValueError(f"no sample is left: {told}; give a longer context_length or other data")
    logger.warning("%s", told)
    return counts


def _rows(
    documents: Documents, options: DataOptions, eos: int | None, what: str, seed: int | None, limit: int | None = None
) -> Rows:
    """Rows of one side, the first `limit` of them. Raises ValueError when there is none, but one is wanted."""
    length = options.length
    rows: Rows
    if options.data_format == INSTRUCTION:
        rows = SampleRows(documents, length, seed, limit)
    elif options.packing == "document":
        rows = DocumentRows(documents, length, seed, eos, limit)
        if rows.cut:
            logger.info("%d of %d documents are longer than %d tokens: each is cut into rows in a row",
                        rows.cut, len(documents), length)  # fmt: skip
    else:
        rows = PackedRows(documents, length, seed, eos, limit)
    if len(rows) == 0 and limit != 0:
        total = int(documents.size.sum()) + (len(documents) if eos is not None else 0)
        raise ValueError(
            f"{what} has {total} tokens, fewer than one sequence of {length}; give more text or a shorter context"
            if isinstance(rows, PackedRows)
            else f"{what} has {len(documents)} documents and no row of two tokens; give more data"
        )
    return rows


def _fingerprint(options: DataOptions, eos: int | None, training: Documents, heldout: Documents) -> str:
    """SHA-256 of all that decides the rows: the same for the same documents under other names or from another cache.

    Tokenizer and prompt are in it by what they made of the documents, `overlong` by what it left of them.
    """
    facts: dict[str, Any] = {name: getattr(options, name) for name in ("length", "seed", "heldout_windows")}
    if options.data_format != INSTRUCTION:
        facts |= {"packing": options.packing, "eos": eos}
    facts["documents"] = [len(training), len(heldout)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for side in (training, heldout):
        digest.update(np.ascontiguousarray(side.hashes).data)
    return "sha256:" + digest.hexdigest()


def _summary(
    options: DataOptions, train: Rows, heldout: Rows, fitted: list[_Fitted], fingerprint: str
) -> dict[str, Any]:
    held = heldout.documents
    summary: dict[str, Any] = {
        "documents": len(train.documents),
        "heldout_documents": len(held),
        "sequences": len(train),
        "tokens": int(train.documents.size.sum()),
        "tokens_outside_of_whole_sequences": train.left_out,
        "heldout_windows": len(heldout),
        "heldout_sources": [held.source(i) for i in range(len(held))],
        "fingerprint": fingerprint,
    }
    if options.data_format == INSTRUCTION:
        summary |= {
            "samples_overlong": sum(side.overlong for side in fitted),
            "samples_skipped": sum(side.skipped for side in fitted),
            "samples_shortened": sum(side.shortened for side in fitted),
            "answer_tokens": int(train.documents.answers.sum()),
        }
    return summary
