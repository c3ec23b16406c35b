"""Documents of tokens that stay on disk: what is known of each, and its tokens when they are asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hici.data.cache import BROKEN, UINT16_VOCABULARY, map_file
from hici.data.sources import is_token_file, place
from hici.data.tokenising import Tokenised

logger = logging.getLogger(__name__)

_OPEN_FILES = 64  # mapped at a time, each an open file: a process may have 1,024, or fewer, for everything
_BLOCK = 2**22  # tokens of a .bin looked at a time


class TokenFile(NamedTuple):
    """A token file (.bin) and its documents, the stretches between EOS tokens: starts and sizes, int64 [D]."""

    path: Path
    dtype: np.dtype[np.unsignedinteger]
    starts: np.ndarray
    sizes: np.ndarray


class Place(NamedTuple):
    """A file that holds documents' tokens: its path, dtype of a .bin (None: of the cache), and what it is of."""

    path: Path
    dtype: np.dtype[np.unsignedinteger] | None
    label: str


class Store:
    """Files of tokens, memory-mapped while they are in use. Can be pickled; the maps are opened anew."""

    def __init__(self, places: list[Place]) -> None:
        self.places = places
        self._open: OrderedDict[Path, dict[str, np.ndarray]] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"places": self.places, "_open": OrderedDict()}

    def arrays(self, number: int) -> dict[str, np.ndarray]:
        """`tokens`, and in the cache `kinds`, of a file.

        Raises:
            ValueError: it is gone, or another one than it was.
        """
        path, dtype, _ = self.places[number]
        if path not in self._open:
            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)
            try:
                self._open[path] = map_file(path)[0] if dtype is None else {"tokens": np.memmap(path, dtype, "r")}
            except BROKEN as error:
                what = "of the token cache " if dtype is None else ""
                raise ValueError(
                    f"{path} {what}cannot be read any more ({error}); leave the data and the token cache as they are "
                    "while a run reads them, and start again: what is missing in the cache is made anew"
                ) from error
        self._open.move_to_end(path)
        return self._open[path]


@dataclasses.dataclass(frozen=True)
class Documents:
    """A table of D documents, in order. All arrays are [D] and int64 but `hashes` and `plain`.

    Attributes:
        store: their tokens.
        file, start, size: file in the store, first token in it, and number of tokens (without EOS).
        number: of the record in its file or data set.
        hashes: SHA-256 of the tokens as int64, of a sample's kinds too: uint8 [D, 32].
        plain: SHA-256 of the text (of a whole sample) without white space: uint8 [D, 32]; of a .bin, `hashes`.
        answers, user: instruction samples: tokens of answers, and of the user's message that may be shortened.
        highest: the highest token id.
    """

    store: Store
    file: np.ndarray
    start: np.ndarray
    size: np.ndarray
    number: np.ndarray
    hashes: np.ndarray
    plain: np.ndarray
    answers: np.ndarray
    user: np.ndarray
    highest: np.ndarray

    def __len__(self) -> int:
        return len(self.size)

    def select(self, which: np.ndarray) -> Documents:
        """The documents with these numbers (or of this mask), in this order."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Documents(**{k: v if k == "store" else v[which] for k, v in values.items()})

    def source(self, i: int) -> str:
        """Where document i is from, as `a.txt` or `a.jsonl:12`."""
        return place(self.store.places[self.file[i]].label, int(self.number[i]))

    def tokens(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens start..stop of document i: int64, a copy."""
        return self._part("tokens", i, start, stop).astype(np.int64)

    def kinds(self, i: int) -> np.ndarray:
        """Kinds of the tokens of sample i (`hici.data.prompts`): uint8 [t]."""
        return np.array(self._part("kinds", i, 0, None))

    def digest(self, i: int) -> bytes:
        """Its row of `hashes`."""
        return self.hashes[i].tobytes()

    def _part(self, name: str, i: int, start: int, stop: int | None) -> np.ndarray:
        first = int(self.start[i])
        stop = int(self.size[i]) if stop is None else stop
        return self.store.arrays(int(self.file[i]))[name][first + start : first + stop]


def table(parts: Iterable[Tokenised | TokenFile]) -> Documents:
    """All documents of files of the cache and of token files, in order."""
    places, columns = [], []
    for part in parts:
        if isinstance(part, TokenFile):
            places.append(Place(part.path, part.dtype, str(part.path)))
            columns.append({"file": np.full(len(part.starts), len(places) - 1), **_of_token_file(part)})
        else:
            shard = part.shard
            columns.append({
                "file": len(places) + part.label, "start": shard.starts[:-1], "size": np.diff(shard.starts),
                "number": part.numbers, "hashes": shard.hashes, "plain": shard.plain, "answers": shard.answers,
                "user": shard.user, "highest": shard.highest,
            })  # fmt: skip
            places += [Place(shard.path, None, label) for label in part.labels]
    names = [f.name for f in dataclasses.fields(Documents) if f.name != "store"]
    return Documents(Store(places), **{name: np.concatenate([column[name] for column in columns]) for name in names})


def _of_token_file(part: TokenFile) -> dict[str, np.ndarray]:
    tokens = np.memmap(part.path, part.dtype, "r")
    hashes = np.zeros((len(part.starts), 32), dtype=np.uint8)
    highest = np.zeros(len(part.starts), dtype=np.int64)
    for i, (start, size) in enumerate(zip(part.starts, part.sizes, strict=True)):
        document = np.asarray(tokens[start : start + size]).astype("<i8")
        hashes[i] = np.frombuffer(hashlib.sha256(document.tobytes()).digest(), dtype=np.uint8)
        highest[i] = document.max()
    none = np.zeros(len(part.starts), dtype=np.int64)
    return {"start": part.starts, "size": part.sizes, "number": np.arange(len(part.starts)), "hashes": hashes,
            "plain": hashes, "answers": none, "user": none, "highest": highest}  # fmt: skip


def map_token_file(path: Path, vocab_size: int) -> np.memmap:
    """A token file (.bin) as it is: uint16, or uint32 above 65,535 entries of vocabulary, memory-mapped.

    Raises:
        ValueError: the file is empty, no multiple of a token, or of uint32 where uint16 is read (each other one is
            0, as in no text).
    """
    dtype = np.dtype("<u2") if vocab_size <= UINT16_VOCABULARY else np.dtype("<u4")
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise ValueError(
            f"{path} has {size} bytes, but token files of a vocabulary of {vocab_size} hold {dtype.itemsize} bytes a "
            "token and at least one token; write it again"
        )
    tokens = np.memmap(path, dtype, "r")
    if dtype.itemsize == 2 and len(tokens) % 2 == 0 and _halves_of_uint32(tokens):
        raise ValueError(
            f"{path} is read as uint16, 2 bytes a token, since the vocabulary has {vocab_size} entries, but each other "
            "token of it is 0, as in a file of uint32, 4 bytes a token; write it again as uint16"
        )
    return tokens


def _halves_of_uint32(tokens: np.ndarray) -> bool:
    """Whether every second token is 0, and not all are."""
    starts = range(0, len(tokens), _BLOCK)
    if any(tokens[begin + 1 : begin + _BLOCK : 2].any() for begin in starts):
        return False
    return any(tokens[begin : begin + _BLOCK : 2].any() for begin in starts)


def token_file(path: Path, vocab_size: int, eos_token_id: int | None, limit: int | None = None) -> TokenFile:
    """Documents of a .bin: the stretches between EOS tokens, the first `limit` of them; without EOS, it is one.

    Raises:
        ValueError: see `map_token_file`; nothing but EOS.
    """
    tokens = map_token_file(path, vocab_size)
    found = [
        begin + np.flatnonzero(tokens[begin : begin + _BLOCK] == eos_token_id)
        for begin in range(0, len(tokens), _BLOCK)
        if eos_token_id is not None
    ]
    ends = np.concatenate([*found, [len(tokens)]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    kept = np.flatnonzero(ends > starts)[:limit]  # two EOS in a row have nothing between them
    if not len(kept):
        raise ValueError(f"{path} holds nothing but the EOS token {eos_token_id}; remove it from the data")
    return TokenFile(path, tokens.dtype, starts[kept], ends[kept] - starts[kept])


def check_vocabulary(documents: Documents, vocab_size: int) -> None:
    """Raise ValueError unless all tokens are in the model's vocabulary."""
    beyond = np.flatnonzero(documents.highest >= vocab_size)
    if len(beyond):
        check_id(documents.source(int(beyond[0])), int(documents.highest[beyond[0]]), vocab_size)


def check_id(source: str, highest: int, vocab_size: int) -> None:
    """Raise ValueError unless `source`'s highest token id is in the model's vocabulary."""
    if highest >= vocab_size:
        wide = is_token_file(source) and vocab_size > UINT16_VOCABULARY
        raise ValueError(
            f"{source} holds token {highest}, but the model's vocabulary has {vocab_size} entries "
            f"(0..{vocab_size - 1}); it was made with another tokenizer"
            + (", or as uint16, 2 bytes a token, and is read as uint32, 4 bytes a token" if wide else "")
        )
