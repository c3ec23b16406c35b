"""Reading tokens into a cache in pieces: activation memory is that of a piece, and no logits are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from hici.models.cache import HiCICache
from hici.models.lookup import FULL, attention_mode, get_decoder
from hici.rope import changes_between

PIECE = 2048  # tokens of a piece in full attention
SMALL_PIECE = 512  # shorter segments are read several at a time

Progress = Callable[[int, int], None]


@torch.no_grad()
def prefill(
    model: Any,
    input_ids: Tensor,
    cache: Cache | None = None,
    *,
    attention_mask: Tensor | None = None,
    piece_size: int | None = None,
    progress: Progress | None = None,
) -> Cache:
    """Read tokens into a cache piece by piece, so that a long text does not need all of its activations.

    In mode "hici" the cache is a HiCICache, and by default a piece ends at a segment's border: as fast as all at once.
    In full attention the model's own cache is filled. A text whose length changes the rope (longrope, dynamic) is read
    in one piece.

    Args:
        input_ids: [B, T], the tokens that are not in the cache yet.
        cache: goes on with it; None: a new one.
        attention_mask: [B, cached + T], real tokens (1) and padding (0); None: all real.
        piece_size: tokens of a piece; None: see above.
        progress: called after each piece with (tokens read, T).

    Returns:
        The cache. To go on: `model.generate` with all tokens so far, or with the new ones and a mask that covers all.

    Raises:
        ValueError: no tokens; piece_size below 1; a mask of another length; in mode "hici" anything that a HiCICache
            refuses, or another cache; mode "hici_s2". What can be known is checked before anything is read.
    """
    length = input_ids.shape[1]
    if length == 0:
        raise ValueError("there are no tokens to read; give at least one")
    if piece_size is not None and piece_size < 1:
        raise ValueError(f"piece_size={piece_size} is below 1; give at least 1 token, or None")
    cache = _cache_for(model, cache)
    decoder, begun = get_decoder(model), cache.get_seq_length()
    if attention_mask is not None and attention_mask.shape[1] != begun + length:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens, but there are {begun + length} with those in the "
            "cache; give one entry for each"
        )
    if isinstance(cache, HiCICache):
        cache.check(decoder, input_ids, attention_mask)
    elif changes_between(decoder.config, begun, begun + length):
        raise ValueError(
            f"{begun + length} tokens have another rope than the {begun} in the cache, which would have to be read "
            "again; read everything in one call with a new cache"
        )
    if changes_between(decoder.config, 1, begun + length):  # somewhere inside: pieces would have different ropes
        piece_size = length
    done = 0
    while done < length:
        piece = input_ids[:, done : done + (piece_size or _next_piece(cache))]
        done += piece.shape[1]
        mask = None if attention_mask is None else attention_mask[:, : begun + done]
        decoder(input_ids=piece, attention_mask=mask, past_key_values=cache, use_cache=True)
        if progress is not None:
            progress(done, length)
    return cache


def _cache_for(model: Any, cache: Cache | None) -> Cache:
    mode = attention_mode(model)
    if mode == FULL:
        return DynamicCache(config=get_decoder(model).config) if cache is None else cache
    if cache is None and mode == "hici":
        return HiCICache(model)
    if not isinstance(cache, HiCICache):
        raise ValueError(
            f"a prefill in pieces with a {type(cache).__name__} in attention mode {mode!r}: only the first piece would "
            "get slots; give a HiCICache (visibility 'past'), or the whole prompt to one call of the model"
        )
    return cache


def _next_piece(cache: Cache) -> int:
    """Tokens up to a border of segments, of one segment or (short ones) several.

    Rows that stand at different places have their borders at different places, so none is better than another.
    """
    if not isinstance(cache, HiCICache):
        return PIECE
    size = cache.segment_size
    several = size * max(1, -(-SMALL_PIECE // size))
    phases = {tokens % size for tokens in cache.tokens}
    return several - (phases.pop() if len(phases) == 1 else 0)
