"""Sources -> tables of documents, through the token cache."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hici.data.cache import TokenCache
from hici.data.documents import Documents, TokenFile, check_vocabulary, table, token_file
from hici.data.encoder import TEXT, Encoder
from hici.data.sources import HubOptions, Record, Source, record_sets
from hici.data.tokenising import Advance, Pieces, Tokenised, Tokeniser, refuse_empty

logger = logging.getLogger(__name__)


_Set = tuple[str, Iterator[Record] | None]  # of `record_sets`


class _Planned(NamedTuple):
    """Files or a data set whose pieces were given to the tokeniser: how many; records of each label, and empty ones."""

    labels: list[str]
    pieces: int
    records: Counter[str]
    empty: Counter[str]


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
        sets = record_sets(source, self.hub)
        for tokens, group in itertools.groupby(sets, key=lambda item: item[1] is None):
            parts: list[_Planned | TokenFile]
            if tokens:  # noqa: SIM108 (it would look as if `group` were read twice)
                parts = list(self._token_files(group, left))
            else:
                parts = [self._plan(group, left, tokeniser)]
            yield from parts
            if left is not None:
                left -= sum(len(p.starts) if isinstance(p, TokenFile) else p.records.total() for p in parts)
                if left == 0:  # before the next file is read
                    return

    def _token_files(self, sets: Iterator[_Set], limit: int | None) -> Iterator[TokenFile]:
        for label, _ in sets:
            part = self._token_file(label, limit)
            yield part
            limit = None if limit is None else limit - len(part.starts)
            if limit == 0:
                return

    def _plan(self, sets: Iterator[_Set], limit: int | None, tokeniser: Tokeniser) -> _Planned:
        """Give the pieces of files in a row, or of a data set, to the tokeniser."""
        labels: list[str] = []

        def records() -> Iterator[Record]:
            for label, found in sets:
                labels.append(label)
                yield from found or ()
                if not pieces.kept[label]:
                    refuse_empty(label, 0, pieces.empty[label])

        pieces = Pieces(records(), self.encoder, limit)
        count = 0
        for piece in pieces:
            tokeniser.add(piece)
            count += 1
        return _Planned(labels, count, pieces.kept, pieces.empty)

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
        kept: Counter[str] = Counter()
        samples: Counter[str] = Counter()
        for piece in found:
            # samples of one record follow each other
            first = np.diff(piece.label, prepend=-1).astype(bool) | np.diff(piece.numbers, prepend=-2).astype(bool)
            size = len(piece.labels)
            kept.update(dict(zip(piece.labels, np.bincount(piece.label[first], minlength=size).tolist(), strict=True)))
            samples.update(dict(zip(piece.labels, np.bincount(piece.label, minlength=size).tolist(), strict=True)))
        for label in part.labels:
            refuse_empty(label, kept[label], part.empty[label] + part.records[label] - kept[label])
            if samples[label] > kept[label]:
                logger.warning(
                    "%s: the chat template rewrites earlier turns, so %d conversations became %d samples, one of each "
                    "answer (docs/data.md)", label, kept[label], samples[label],
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
