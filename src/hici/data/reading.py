"""Sources -> tables of documents, through the token cache."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hici.data.cache import TokenCache
from hici.data.documents import Documents, TokenFile, check_vocabulary, table, token_file
from hici.data.encoder import TEXT, Encoder
from hici.data.sources import HubOptions, Source, record_sets
from hici.data.tokenising import Advance, Pieces, Tokenised, Tokeniser, refuse_empty

logger = logging.getLogger(__name__)


class _Planned(NamedTuple):
    """A file or data set whose pieces were given to the tokeniser: how many, of how many records, and empty ones."""

    label: str
    pieces: int
    records: int
    empty: int


class Reader:
    """Reads sources into tables of documents.

    Args:
        encoder, cache: how texts become tokens, and where these are kept.
        vocab_size: entries of the model's vocabulary.
        hub: how hub data sets are read.
        max_documents: of each source, the first ones; None: all.
    """

    def __init__(
        self,
        encoder: Encoder,
        cache: TokenCache,
        vocab_size: int,
        *,
        hub: HubOptions | None = None,
        max_documents: int | None = None,
    ) -> None:
        self.encoder = encoder
        self.cache = cache
        self.vocab_size = vocab_size
        self.hub = hub or HubOptions()
        self.max_documents = max_documents

    def read(self, groups: list[list[Source]], *, workers: int = 1, progress: bool = False) -> list[Documents]:
        """One table for each group of sources.

        Raises:
            ValueError: a source that cannot be read or has no text; wrong columns; a token beyond the vocabulary.
        """
        sources = [source for group in groups for source in group]
        letters = None if any(s.hub for s in sources) else sum(p.stat().st_size for s in sources for p in s.files)
        with (
            _bar(letters, shown=progress) as advance,
            Tokeniser(self.cache, self.encoder, workers=workers, advance=advance) as tokeniser,
        ):
            plans = [[part for source in group for part in self._add(source, tokeniser)] for group in groups]
            done = iter(tokeniser.results())
        tables = [table(_parts(plan, done)) for plan in plans]
        for documents in tables:
            check_vocabulary(documents, self.vocab_size)
        return tables

    def _add(self, source: Source, tokeniser: Tokeniser) -> Iterator[_Planned | TokenFile]:
        left = self.max_documents
        for label, records in record_sets(source, self.hub):
            if left == 0:
                return
            if records is None:
                part = self._token_file(label, left)
                kept = len(part.starts)
                yield part
            else:
                pieces = Pieces(records, self.encoder, left)
                count = 0
                for piece in pieces:
                    tokeniser.add(piece)
                    count += 1
                kept = pieces.kept
                if not kept:
                    refuse_empty(label, 0, pieces.empty)
                yield _Planned(label, count, kept, pieces.empty)
            left = None if left is None else left - kept

    def _token_file(self, label: str, limit: int | None) -> TokenFile:
        if self.encoder.data_format != TEXT:
            raise ValueError(
                f"{label} is a token file, but data_format is instruction, whose answers it does not know; take it out "
                "of the data or use data_format: text"
            )
        return token_file(Path(label), self.vocab_size, self.encoder.tokenizer.eos_token_id, limit)


def _parts(plan: list[_Planned | TokenFile], done: Iterator[Tokenised]) -> Iterator[Tokenised | TokenFile]:
    """The files of a group in order; `done` are all pieces in the order in which they were planned."""
    for part in plan:
        if isinstance(part, TokenFile):
            yield part
            continue
        found = [next(done) for _ in range(part.pieces)]
        kept = sum(len(np.unique(piece.numbers)) for piece in found)
        refuse_empty(part.label, kept, part.empty + part.records - kept)
        samples = sum(len(piece.numbers) for piece in found)
        if samples > kept:
            logger.warning(
                "%s: the chat template rewrites earlier turns, so %d conversations became %d samples of one answer or "
                "more (docs/data.md)", part.label, kept, samples,
            )  # fmt: skip
        yield from found


@contextlib.contextmanager
def _bar(letters: int | None, *, shown: bool) -> Iterator[Advance]:
    """On a terminal, a progress bar over letters of text (None: not known how many)."""
    if not shown or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("reading data"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=letters)
        yield lambda done: bar.advance(task, done)
