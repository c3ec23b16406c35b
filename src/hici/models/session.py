"""A session: tokens that a model has read stay read, for the questions and turns that follow."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from hici.models.cache import HiCICache, Snapshot
from hici.models.lookup import FULL, HICI, attention_mode, get_causal_lm, hici_config
from hici.models.prefill import Progress, prefill
from hici.rope import check_context


class _Place(NamedTuple):
    length: int
    snapshot: Snapshot
    passing: bool


class Session:
    """What one model has read, in the attention mode that it is in, and the cache that holds it.

    In full attention everything can be kept and taken back token by token. In mode "hici" with a HiCICache a place
    that was `kept`, or the present one, can be gone on from. With decode over raw keys nothing is kept, since a prompt
    must be read in one prefill.

    Args:
        model: also below PEFT.
        allow_beyond_rope: more tokens than the model's rope settings represent.
        progress: see `prefill`; for reading only.
    """

    def __init__(self, model: Any, *, allow_beyond_rope: bool = False, progress: Progress | None = None) -> None:
        self.model = get_causal_lm(model)
        self.allow_beyond_rope = allow_beyond_rope
        self.progress = progress
        self.cache: HiCICache | DynamicCache | None = None
        mode = attention_mode(model)
        if mode == FULL:
            self.cache = DynamicCache(config=self.model.config)
        elif mode == HICI and hici_config(model).bounded_decode:
            self.cache = HiCICache(model, allow_beyond_rope=allow_beyond_rope)
        self._ids: list[int] = []  # of all tokens in the cache
        self._kept: list[_Place] = []

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values (and, in bounded memory, the rest) that are kept; 0 where nothing is."""
        if isinstance(self.cache, HiCICache):
            return self.cache.nbytes
        layers: list[Any] = [] if self.cache is None else self.cache.layers
        return sum(x.nbytes for layer in layers for x in (layer.keys, layer.values) if x is not None)

    def check_length(self, tokens: int) -> None:
        """Raise ValueError when the model's rope does not represent that many (and that is not allowed)."""
        if not self.allow_beyond_rope:
            check_context(self.model.config, tokens)

    def read(self, ids: list[int]) -> int:
        """Make the cache hold exactly these tokens, reading as few as possible; returns how many were read.

        Raises:
            ValueError: nothing is kept in this mode; more tokens than the rope represents.
        """
        if self.cache is None:
            raise ValueError(
                "reading ahead with decode over raw keys: a prompt must be read in one prefill; use attention full, or "
                "attention hici with visibility 'past', a segment_size and decode 'auto'"
            )
        self.check_length(len(ids))
        self._go_back(common_length(self._ids, ids))
        new = ids[len(self._ids) :]
        if new:
            with torch.inference_mode():
                prefill(self.model, self._tensor(new), self.cache, progress=self.progress)
        self._ids = list(ids)
        return len(new)

    def keep(self, *, passing: bool = False) -> None:
        """Remember this place: it can be gone back to, whatever is read after it.

        `passing`: until the next passing one. A place costs as much memory as the cache.
        """
        if isinstance(self.cache, HiCICache):
            here = len(self._ids)
            self._kept = [x for x in self._kept if x.length < here and not (passing and x.passing)]
            self._kept.append(_Place(here, self.cache.snapshot(), passing))

    def recover(self) -> None:
        """After a call that was interrupted: back to the last place that was kept, or to the beginning."""
        self._go_back(self._kept[-1].length if self._kept else 0, whole=False)

    def after_generation(self, ids: list[int]) -> None:
        """The cache has read on by itself: `ids` are all tokens, of which it may hold fewer."""
        if self.cache is not None:
            self._ids = ids[: self.cache.get_seq_length()]

    def _go_back(self, length: int, *, whole: bool = True) -> None:
        """To at most `length` tokens."""
        if whole and length == len(self._ids):
            return
        cache = self.cache
        if isinstance(cache, HiCICache):
            self._kept = [x for x in self._kept if x.length <= length]
            if self._kept:
                length = self._kept[-1].length
                cache.restore(self._kept[-1].snapshot)
            else:
                length = 0
                cache.reset()
        elif whole and cache is not None and getattr(cache, "is_croppable", False):
            cache.crop(length - len(self._ids))
        else:
            length = 0
            self.cache = None if cache is None else DynamicCache(config=self.model.config)
        self._ids = self._ids[:length]

    def _tensor(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], device=self.model.device)

    # ---- files

    def save(self, path: str | Path) -> None:
        """Write the cache and what it has read (as a hash) to a file.

        Raises:
            ValueError: the cache is none of bounded memory; see `HiCICache.save`.
        """
        self.check_bounded("saving").save(path, about={"ids_sha256": _hash(self._ids), "ids": len(self._ids)})

    def load(self, path: str | Path, ids: list[int]) -> None:
        """Take the cache from a file in which these tokens, and no others, were read.

        Raises:
            ValueError: other tokens; see `HiCICache.load`.
        """
        from hici.models.cache_file import read_about

        self.check_bounded("loading")
        about = read_about(path)
        if about.get("ids_sha256") != _hash(ids):
            raise ValueError(
                f"{path} holds {about.get('ids', 'other')} tokens of another text (or another tokenizer or template); "
                "give the text that it was made from, or another file name"
            )
        self.cache = HiCICache.load(path, self.model, allow_beyond_rope=self.allow_beyond_rope)
        self._ids, self._kept = list(ids), []

    def check_bounded(self, what: str) -> HiCICache:
        """The HiCICache; ValueError when what was read is kept in another way, or not at all."""
        if not isinstance(self.cache, HiCICache):
            raise ValueError(
                f"{what}: what was read is kept in a file only where the cache is small; use attention hici with "
                "visibility 'past', a segment_size and decode 'auto', or read again"
            )
        return self.cache


def common_length(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _hash(ids: list[int]) -> str:
    return hashlib.sha256(torch.tensor(ids, dtype=torch.int64).numpy().tobytes()).hexdigest()
