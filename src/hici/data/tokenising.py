"""Sources -> pieces -> files of the token cache, in one process or several."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import pickle
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hici.data.cache import Piece, Shard, TokenCache, tokenise
from hici.data.encoder import Encoder
from hici.data.samples import letters, plain_digest
from hici.data.sources import Record

logger = logging.getLogger(__name__)

PIECE_LETTERS = 2**22  # of text that are tokenised together: about 1M tokens, some seconds of work
_SMALL = 64  # part of a piece after which it ends with a file, so that a change in one leaves the pieces of others

Advance = Callable[[int], None]  # letters done


class Tokenised(NamedTuple):
    """A file of the cache, and where its D documents are from.

    Attributes:
        labels: files or data sets.
        label: number of each document's label: int64 [D].
        numbers: of each document's record in its file or data set: int64 [D].
        shard: what is known of the documents.
    """

    labels: list[str]
    label: np.ndarray
    numbers: np.ndarray
    shard: Shard


class Pieces:
    """Records of files or of a data set with something to learn, in pieces. A record is never split.

    Small files share a piece. Where it ends is decided by what is in it, so the same files give the same pieces, and
    behind a file that changed the old ones are soon found again.

    Attributes:
        kept: records of each label in the pieces given so far.
        empty: records of each label without anything to learn, left out.
    """

    def __init__(self, records: Iterable[Record], encoder: Encoder, limit: int | None = None) -> None:
        self.records = records
        self.encoder = encoder
        self.limit = limit
        self.kept: Counter[str] = Counter()
        self.empty: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Piece]:
        piece, size, left = Piece([], [], []), 0, self.limit
        for record in self.records:
            sample = self.encoder.check(record)
            if sample is None:
                self.empty[record.label] += 1
                continue
            if piece.samples and piece.labels[-1] != record.label and _ends(piece, size):
                yield piece
                piece, size = Piece([], [], []), 0
            piece.labels.append(record.label)
            piece.numbers.append(record.number)
            piece.samples.append(sample)
            self.kept[record.label] += 1
            left = None if left is None else left - 1
            size += letters(sample)
            if size >= PIECE_LETTERS:
                yield piece
                piece, size = Piece([], [], []), 0
            if left == 0:
                break
        if piece.samples:
            yield piece


def _ends(piece: Piece, size: int) -> bool:
    """Whether a piece of `size` letters ends with the file that is finished: it is large enough, or by its content."""
    return size >= PIECE_LETTERS // _SMALL or plain_digest(piece.samples[-1])[0] < 4  # one file of 64


def refuse_empty(label: str, kept: int, empty: int) -> None:
    """Log what a file or data set holds without anything to learn; raise ValueError when that is everything."""
    if kept == 0:
        raise ValueError(
            f"{label} gives no token: there is no text or answer in it ({empty} empty records); remove it from the "
            "data or name the right column"
        )
    if empty:
        logger.warning("%s: %d empty records are left out", label, empty)


class Tokeniser:
    """Puts pieces into the cache where they are not in it; a context manager.

    Args:
        cache, encoder: where to, and how.
        workers: processes. One works in this process; more are started when the first piece is missing.
        advance: called with letters that are in the cache: of a piece; in one process, of a long document's part too.
    """

    def __init__(
        self, cache: TokenCache, encoder: Encoder, *, workers: int = 1, advance: Advance | None = None
    ) -> None:
        self.cache = cache
        self.encoder = encoder
        self.workers = workers
        self.advance = advance or (lambda letters: None)
        self._pool: ProcessPoolExecutor | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._pending: deque[tuple[Future[None], Piece]] = deque()
        self._parts: list[tuple[Piece, Path, Shard | None]] = []

    def __enter__(self) -> Tokeniser:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._scratch is not None:
            self._scratch.cleanup()

    def add(self, piece: Piece) -> None:
        """One piece more; waits while each process has two of them."""
        path = self.cache.path(piece)
        shard = self.cache.read(path)
        if shard is None and self.workers > 1:
            self._pending.append((self._processes().submit(_work, self._encoder_file(), piece, path), piece))
            while len(self._pending) > 2 * self.workers:
                self._finish_one()
        else:
            if shard is None:
                tokenise(piece, self.encoder, path, self.advance)
            else:
                self.advance(letters(piece.samples))
        # what another process must still read of the piece is only where its documents are from
        self._parts.append((piece._replace(samples=[]), path, shard))

    def results(self) -> list[Tokenised]:
        """All pieces, in the order in which they were added.

        Raises:
            ValueError: a file cannot be read back; what a process raised.
            RuntimeError: a process was ended from outside.
        """
        while self._pending:
            self._finish_one()
        found = []
        for piece, path, known in self._parts:
            shard = self.cache.read(path) if known is None else known
            if shard is None:
                raise ValueError(
                    f"{path} in the token cache cannot be read back; give another place with token_cache, on a sound "
                    "disk"
                )
            labels = {label: i for i, label in enumerate(dict.fromkeys(piece.labels))}
            label = np.array([labels[label] for label in piece.labels], dtype=np.int64)[shard.which]
            numbers = np.array(piece.numbers, dtype=np.int64)[shard.which]
            found.append(Tokenised(list(labels), label, numbers, shard))
        return found

    def _finish_one(self) -> None:
        future, piece = self._pending.popleft()
        try:
            future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a process that tokenised {piece.labels[0]} was ended from outside, perhaps for want of memory; start "
                "again with fewer data_workers (what is finished stays in the token cache)"
            ) from error
        self.advance(letters(piece.samples))

    def _processes(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # spawn: a fork would copy the threads' locks of torch and of the tokenizer
            self._pool = ProcessPoolExecutor(
                self.workers, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread
            )
        return self._pool

    def _encoder_file(self) -> Path:
        """The encoder for the processes, pickled once."""
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="hici-tokens-")
            (Path(self._scratch.name) / "encoder").write_bytes(pickle.dumps(self.encoder))
        return Path(self._scratch.name) / "encoder"


def _one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of this process: the others have the other cores


@functools.lru_cache(maxsize=1)
def _load_encoder(path: Path) -> Encoder:
    encoder: Encoder = pickle.loads(path.read_bytes())
    return encoder


def _work(encoder: Path, piece: Piece, path: Path) -> None:
    tokenise(piece, _load_encoder(encoder), path)
