"""A session: tokens that a model has read stay read, for the questions and turns that follow."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from hici.models.cache import HiCICache, Snapshot
from hici.models.lookup import FULL, HICI, attention_mode, get_causal_lm, hici_config
from hici.models.prefill import Progress, prefill
from hici.rope import changes_between, check_context


class _Place(NamedTuple):
    """Somewhere to go back to: its tokens, and the cache as it was."""

    ids: list[int]
    cache: Snapshot | DynamicCache
    passing: bool


class Session:
    """What one model has read, in the attention mode that it is in, and the cache that holds it.

    With a HiCICache, or where layers have a sliding window, what follows can go on from the present place or from one
    that was kept (`keep`). In full attention everything can be taken back token by token. With decode over raw keys
    nothing is held, since a prompt must be read in one prefill.

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
        if attention_mode(model) == FULL:
            self.cache = DynamicCache(config=self.model.config)
        elif attention_mode(model) == HICI and hici_config(model).bounded_decode:
            self.cache = HiCICache(model, allow_beyond_rope=allow_beyond_rope)
        self._ids: list[int] = []  # of all tokens in the cache
        self._places: list[_Place] = []

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values (and, in bounded memory, the rest) in the cache; 0 without one."""
        return _bytes(self.cache)

    @property
    def kept_bytes(self) -> int:
        """Of the places to go back to, each of which is a copy of the cache as it was."""
        return sum(_bytes(place.cache) for place in self._places)

    def check_length(self, tokens: int) -> None:
        """Raise ValueError when the model's rope does not represent that many (and that is not allowed)."""
        if not self.allow_beyond_rope:
            check_context(
                self.model.config,
                tokens,
                ", permit it (allow_beyond_rope=True, --allow-beyond-rope), or give and ask for fewer tokens",
            )

    def read(self, ids: list[int]) -> int:
        """Make the cache hold exactly these tokens, reading as few as possible; returns how many were read.

        Raises:
            ValueError: nothing is held in this mode; more tokens than the rope represents.
        """
        if self.cache is None:
            raise ValueError(
                "reading ahead with decode over raw keys: a prompt must be read in one prefill; use attention full, or "
                "attention hici with visibility 'past', a segment_size and decode 'auto'"
            )
        self.check_length(len(ids))
        self._go_back(ids)
        if changes_between(self.model.config, len(self._ids), len(ids)):  # what was read had another rope
            self._places = []
            self._restore(None)
        new = ids[len(self._ids) :]
        if new:
            with self.recovering(), torch.inference_mode():
                prefill(self.model, self._tensor(new), self.cache, progress=self.progress)
        self._ids = list(ids)
        return len(new)

    def keep(self, *, passing: bool = False) -> None:
        """Remember this place: it can be gone back to, whatever is read after it.

        `passing`: until the next passing one. A place costs as much memory as the cache (in full attention without
        sliding windows nothing: the cache itself can be shortened).
        """
        if self.cache is None or self._can_shorten:
            return
        if any(x.ids == self._ids and (passing or not x.passing) for x in self._places):
            return  # it is kept already, for as long
        copied = self.cache.snapshot() if isinstance(self.cache, HiCICache) else copy.deepcopy(self.cache)
        others = [x for x in self._places if x.ids != self._ids and not (passing and x.passing)]
        self._places = [*others, _Place(list(self._ids), copied, passing)]

    @contextlib.contextmanager
    def recovering(self) -> Iterator[None]:
        """When the work inside fails or is interrupted, the session goes back to where its cache is whole."""
        try:
            yield
        except BaseException:
            if self._can_shorten:
                self._shorten(len(self._ids))  # nobody has taken these away
            else:
                self._restore(self._best_place(self._ids))
            raise

    def after_generation(self, ids: list[int]) -> None:
        """The cache has read on by itself: `ids` are all tokens, of which it may hold fewer."""
        if self.cache is not None:
            self._ids = ids[: self.cache.get_seq_length()]

    @property
    def _can_shorten(self) -> bool:
        return isinstance(self.cache, DynamicCache) and not any(self.cache.is_sliding)

    def _go_back(self, ids: list[int]) -> None:
        """To where nothing was read but a beginning of `ids`."""
        common = common_length(self._ids, ids)
        if common == len(self._ids):
            return
        if self._can_shorten:
            self._shorten(common)
        else:
            self._restore(self._best_place(ids))

    def _best_place(self, ids: list[int]) -> _Place | None:
        """The longest of those that hold a beginning of `ids`; None: there is none."""
        fitting = [place for place in self._places if place.ids == ids[: len(place.ids)]]
        return max(fitting, key=lambda place: len(place.ids), default=None)

    def _restore(self, place: _Place | None) -> None:
        if isinstance(self.cache, HiCICache):
            if place is None:
                self.cache.reset()
            else:
                assert isinstance(place.cache, Snapshot)
                self.cache.restore(place.cache)
        elif self.cache is not None:
            copied = None if place is None else copy.deepcopy(place.cache)
            assert copied is None or isinstance(copied, DynamicCache)
            self.cache = DynamicCache(config=self.model.config) if copied is None else copied
        self._ids = [] if place is None else list(place.ids)

    def _shorten(self, length: int) -> None:
        """Layer by layer: after an interrupt they hold different numbers of tokens."""
        assert isinstance(self.cache, DynamicCache)
        for layer in self.cache.layers:
            layer.crop(min(length - layer.get_seq_length(), 0))
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
                f"{path} holds {about.get('ids', 'other')} tokens of another text, or of this one with another "
                "tokenizer or chat template (some put the date in front); give the text that it was made from, or "
                "another file"
            )
        self.cache = HiCICache.load(path, self.model, allow_beyond_rope=self.allow_beyond_rope)
        self._ids, self._places = list(ids), []

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


def _bytes(cache: HiCICache | DynamicCache | Snapshot | None) -> int:
    if cache is None or isinstance(cache, HiCICache | Snapshot):
        return 0 if cache is None else cache.nbytes
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values) if x is not None)


def _hash(ids: list[int]) -> str:
    return hashlib.sha256(torch.tensor(ids, dtype=torch.int64).numpy().tobytes()).hexdigest()
