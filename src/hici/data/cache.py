"""The token cache: a directory of files, each with the tokens of some documents, named by what it was made from.

A file's name is a hash of the documents' text and of the encoder (tokenizer, format, prompt). So a file is made once,
whatever the data is called and whichever run needs it, a run that was killed goes on behind the last file it finished,
and two runs at once can only write the same thing. A file is safetensors, and holds a hash of its arrays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from hici.data.encoder import Encoder
from hici.data.prompts import ANSWER, USER, Encoded
from hici.data.samples import Sample, plain_digest
from hici.data.sources import place
from hici.files import atomic_file, check_writable

logger = logging.getLogger(__name__)

UINT16_VOCABULARY = 65_535  # larger vocabularies need four bytes a token (published rule)
_TYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I64": np.int64}
_DIGEST = "sha256"
BROKEN = (OSError, ValueError, LookupError, AttributeError, struct.error)  # what `map_file` may raise
_OLD = 24 * 3600  # seconds after which a temporary file is one of a writer that was killed
_PER_TOKEN = ("tokens", "kinds")  # stay on disk; everything else is read, some 100 bytes a document


class Piece(NamedTuple):
    """Checked samples that are tokenised together: file or data set of each one, and number of its record in it."""

    labels: list[str]
    numbers: list[int]
    samples: list[Sample]


class Shard(NamedTuple):
    """What is known of a file of the cache without its tokens. D documents that have tokens.

    Attributes:
        path: of the file.
        starts: first token of each document, and behind the last: int64 [D + 1].
        which: which of the piece's samples each one is of: int64 [D].
        hashes: SHA-256 of each document's tokens as int64, of a sample's kinds too: uint8 [D, 32].
        plain: SHA-256 of the document's text, or of the whole sample's, without white space: uint8 [D, 32].
        answers, user: answer tokens, and tokens that may be shortened, of each one: int64 [D].
        highest: highest token id of each one: int64 [D].
    """

    path: Path
    starts: np.ndarray
    which: np.ndarray
    hashes: np.ndarray
    plain: np.ndarray
    answers: np.ndarray
    user: np.ndarray
    highest: np.ndarray


def default_cache() -> Path:
    """$XDG_CACHE_HOME/hici/tokens, or ~/.cache/hici/tokens."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hici" / "tokens"


class TokenCache:
    """The cache in a directory, for one encoder.

    Raises:
        ValueError: nothing can be written in the directory.
    """

    def __init__(self, directory: str | Path | None, encoder_fingerprint: str) -> None:
        self.directory = default_cache() if directory is None else Path(directory).expanduser()
        self.encoder_fingerprint = encoder_fingerprint
        try:
            check_writable(self.directory)
        except ValueError as error:
            raise ValueError(f"no token cache: {error} (token_cache)") from error
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Delete what writers that were killed left half written more than a day ago."""
        removed = 0
        for path in self.directory.glob("??/.*.safetensors.*"):
            with contextlib.suppress(OSError):  # another run removed it, or it is another user's
                if time.time() - path.stat().st_mtime > _OLD:
                    path.unlink()
                    removed += 1
        if removed:
            logger.info("%d half-written files of killed runs are removed from %s", removed, self.directory)

    def path(self, piece: Piece) -> Path:
        """Where a piece's tokens lie, whether or not they are there."""
        digest = hashlib.sha256(self.encoder_fingerprint.encode())
        for sample in piece.samples:
            digest.update(json.dumps(sample, sort_keys=True).encode())  # JSON says itself where it ends
        name = digest.hexdigest()
        return self.directory / name[:2] / f"{name}.safetensors"

    def read(self, path: Path) -> Shard | None:
        """The file at `path`, checked against its hash; None: there is none, or a broken one (which is logged)."""
        if not path.is_file():
            return None
        try:
            arrays, digest = map_file(path)
            if _digest(arrays) != digest:
                raise ValueError("its hash is another")
            index = {name: np.array(array) for name, array in arrays.items() if name not in _PER_TOKEN}
            return Shard(path, **index)
        except (*BROKEN, TypeError) as error:
            logger.warning("%s in the token cache is broken (%s); its documents are tokenised again", path.name, error)
            return None


def tokenise(piece: Piece, encoder: Encoder, path: Path, advance: Callable[[int], None] = lambda letters: None) -> None:
    """Write the tokens of a piece; documents without tokens, and samples without an answer's, are not in it.

    `advance`: see `Encoder.encode`.

    Raises:
        ValueError: the file cannot be written; see `Encoder.encode`.
    """
    places = [place(label, number) for label, number in zip(piece.labels, piece.numbers, strict=True)]
    encoded = encoder.encode(list(zip(places, piece.samples, strict=True)), advance)
    found = [(i, document) for i, documents in enumerate(encoded) for document in documents if _teaches(document)]
    ids = [document.ids for _, document in found]
    kinds = [document.kinds for _, document in found]
    hashes = b"".join(
        hashlib.sha256(row.astype("<i8").tobytes() + kind.tobytes()).digest()
        for row, kind in zip(ids, kinds, strict=True)
    )
    plain = [plain_digest(sample) for sample in piece.samples]
    highest = np.array([row.max() for row in ids], dtype=np.int64)
    small = max(len(encoder.tokenizer), int(highest.max(initial=0)) + 1) <= UINT16_VOCABULARY
    joined = np.concatenate([np.zeros(0, dtype=np.int64), *ids])
    arrays = {
        "tokens": joined.astype(np.uint16 if small else np.uint32),
        "kinds": np.concatenate([np.zeros(0, dtype=np.uint8), *kinds]),
        "starts": np.cumsum([0, *map(len, ids)], dtype=np.int64),
        "which": np.array([i for i, _ in found], dtype=np.int64),
        "hashes": np.frombuffer(hashes, dtype=np.uint8).reshape(-1, 32),
        "plain": np.frombuffer(b"".join(plain[i] for i, _ in found), dtype=np.uint8).reshape(-1, 32),
        "answers": np.array([(row == ANSWER).sum() for row in kinds], dtype=np.int64),
        "user": np.array([(row == USER).sum() for row in kinds], dtype=np.int64),
        "highest": highest,
    }
    try:
        with atomic_file(path) as temporary:
            save_file(arrays, temporary, metadata={_DIGEST: _digest(arrays)})
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the token cache {path.parent.parent} cannot be written ({error}); make room, or give another place with "
            "token_cache"
        ) from error


def _teaches(document: Encoded) -> bool:
    return bool((document.kinds == ANSWER).any()) if len(document.kinds) else len(document.ids) > 0


def map_file(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """Arrays of a file, views of one memory map, and the hash that it claims. Raises one of `BROKEN`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise ValueError(f"it has {size} bytes, fewer than its header")
        header: dict[str, Any] = json.loads(file.read(length))
    digest = header.pop("__metadata__")[_DIGEST]
    begin = 8 + length
    if size != begin + max(entry["data_offsets"][1] for entry in header.values()):
        raise ValueError(f"it has {size} bytes, others than its header says")
    raw = np.memmap(path, np.uint8, "r")  # one for all arrays: each map holds an open file
    arrays: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        arrays[name] = raw[begin + start : begin + stop].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays, digest


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
