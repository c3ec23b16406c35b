"""Documents -> rows to train on (data sets of torch), and a batch of rows.

A row is {"input_ids": int64 [t], "labels": int64 [t]}; labels are -100 where there is no loss, and the first token of
a row is never a target. Rows are read from the token cache when they are asked for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hici.data.documents import Documents
from hici.data.prompts import ANSWER, USER

IGNORE = -100  # a label without a loss; torch's own default


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of at most `length` tokens over documents, in an order that the seed fixes; the first `limit` of them.

    Without a seed, the order is of the documents' hashes: the same for every run on the same documents.

    Attributes:
        available: rows without the limit.
        left_out: tokens of the documents (and EOS behind them) that are in none of these.
    """

    available: int
    left_out: int

    def __init__(self, documents: Documents, length: int, seed: int | None, limit: int | None = None) -> None:
        self.documents = documents
        self.length = length
        self.limit = limit
        if seed is None:
            self.order = np.lexsort(documents.hashes.T[::-1])
        else:
            self.order = np.random.default_rng(seed).permutation(len(documents))

    def __len__(self) -> int:
        return self.available if self.limit is None else min(self.limit, self.available)

    @abstractmethod
    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int64 [t], targets bool [t]) of a row."""

    @abstractmethod
    def parts(self, index: int) -> list[int]:
        """Numbers of the documents that a row has tokens of, in order."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        tokens, targets = self.row(index)
        labels = np.where(targets, tokens, IGNORE)
        labels[0] = IGNORE
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}

    def sources(self, index: int) -> str:
        """Names of the documents that a row has tokens of."""
        return ", ".join(self.documents.source(i) for i in self.parts(index))


class PackedRows(Rows):
    """All documents in a row, each followed by EOS (where there is one), cut into whole sequences of `length`.

    The tokens behind the last whole sequence are left out, fewer than `length`.
    """

    def __init__(
        self, documents: Documents, length: int, seed: int | None, eos_token_id: int | None, limit: int | None = None
    ) -> None:
        super().__init__(documents, length, seed, limit)
        self.eos = [] if eos_token_id is None else [eos_token_id]
        # where each document ends in the stream, EOS included
        self.ends = np.cumsum(documents.size[self.order] + len(self.eos), dtype=np.int64)
        self.available, self.left_out = divmod(int(self.ends[-1]) if len(self.ends) else 0, length)

    def parts(self, index: int) -> list[int]:
        first, last = np.searchsorted(self.ends, [index * self.length, (index + 1) * self.length - 1], side="right")
        return [int(i) for i in self.order[first : last + 1]]

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        begin = index * self.length
        place = int(np.searchsorted(self.ends, begin, side="right"))
        pieces: list[np.ndarray] = []
        needed = self.length
        while needed:
            document = int(self.order[place])
            size = int(self.documents.size[document])
            start = begin + self.length - needed - (int(self.ends[place]) - size - len(self.eos))
            part = self.documents.tokens(document, start, min(size, start + needed))
            needed -= len(part)
            pieces.append(part)
            if needed and self.eos:
                pieces.append(np.array(self.eos, dtype=np.int64))
                needed -= 1
            place += 1
        return np.concatenate(pieces), np.ones(self.length, dtype=bool)


class DocumentRows(Rows):
    """Each document with its EOS is a row; a longer one is cut into consecutive rows of `length` tokens.

    A rest of one token, which could be no target, is left out. `cut`: documents that became several rows.
    """

    def __init__(
        self, documents: Documents, length: int, seed: int | None, eos_token_id: int | None, limit: int | None = None
    ) -> None:
        super().__init__(documents, length, seed, limit)
        self.eos = [] if eos_token_id is None else [eos_token_id]
        sizes = documents.size[self.order] + len(self.eos)
        self.ends = np.cumsum(sizes // length + (sizes % length > 1), dtype=np.int64)  # rows up to each document
        self.available = int(self.ends[-1]) if len(self.ends) else 0
        self.left_out = int((sizes % length == 1).sum())
        self.cut = int((sizes > length + 1).sum())

    def parts(self, index: int) -> list[int]:
        return [int(self.order[np.searchsorted(self.ends, index, side="right")])]

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        place = int(np.searchsorted(self.ends, index, side="right"))
        document = int(self.order[place])
        size = int(self.documents.size[document])
        start = self.length * (index - (int(self.ends[place - 1]) if place else 0))
        tokens = self.documents.tokens(document, min(start, size), min(size, start + self.length))
        if len(tokens) < self.length and self.eos:
            tokens = np.append(tokens, self.eos)
        return tokens, np.ones(len(tokens), dtype=bool)


class SampleRows(Rows):
    """Each instruction sample is a row, with loss on its answers; longer ones lose the middle of the user's message."""

    def __init__(self, documents: Documents, length: int, seed: int | None, limit: int | None = None) -> None:
        super().__init__(documents, length, seed, limit)
        self.available = len(documents)
        self.left_out = int(np.maximum(documents.size - length, 0).sum())

    def parts(self, index: int) -> list[int]:
        return [int(self.order[index])]

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        sample = int(self.order[index])
        tokens, kinds = self.documents.tokens(sample), self.documents.kinds(sample)
        excess = len(tokens) - self.length
        if excess > 0:
            user = np.flatnonzero(kinds == USER)
            first = (len(user) - excess) // 2
            kept = np.delete(np.arange(len(tokens)), user[first : first + excess])
            tokens, kinds = tokens[kept], kinds[kept]
        return tokens, kinds == ANSWER


def fits_shortened(documents: Documents, length: int) -> np.ndarray:
    """Which samples fit when the user's longest message is shortened, at least one token of it staying: bool [D]."""
    excess = documents.size - length
    return np.asarray((excess <= 0) | (excess < documents.user))


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch: input_ids and labels [B, T]; shorter rows are padded on the right, then with attention_mask [B, T]."""
    length = max(len(row["input_ids"]) for row in rows)
    pad = lambda name, value: torch.stack([  # noqa: E731
        torch.nn.functional.pad(row[name], (0, length - len(row[name])), value=value) for row in rows
    ])  # fmt: skip
    batch = {"input_ids": pad("input_ids", 0), "labels": pad("labels", IGNORE)}  # 0 is in every vocabulary
    sizes = torch.tensor([len(row["input_ids"]) for row in rows])
    if bool((sizes < length).any()):
        batch["attention_mask"] = (torch.arange(length) < sizes[:, None]).long()
    return batch
