"""What the attention modes of this library cannot do, refused with the remedy.

Shapes: B batch, T tokens, X cached and new tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache, QuantizedCache

from hici.models.cache import HiCICache
from hici.models.cache_layer import USE_DYNAMIC
from hici.models.lookup import HICI


def check_call(mode: str, prefix: Any, kwargs: dict[str, Any]) -> None:
    """What reaches the attention function: the pre-hook's work is there, and nothing that it cannot compute."""
    if prefix is None:
        raise ValueError(
            f"attention mode {mode!r} is set, but no HiCI modules are attached to this model; call "
            f"hici.attach(model, HiCIConfig(...)) first, or model.set_attn_implementation('sdpa')"
        )
    if kwargs.get("cache") is not None:
        raise ValueError(
            f"a paged cache (continuous batching) in attention mode {mode!r}, which keeps no pages; use "
            "model.generate, or model.set_attn_implementation('sdpa')"
        )
    if kwargs.get("softcap") is not None:
        raise ValueError(
            f"the model caps its attention scores at {kwargs['softcap']}, which attention mode {mode!r} cannot "
            "compute; use a model without soft-capping, or model.set_attn_implementation('eager')"
        )
    if kwargs.get("is_causal") is not None:
        raise ValueError(
            f"is_causal={kwargs['is_causal']} was passed to attention mode {mode!r}: another tool (accelerate's "
            "context parallelism does so) has replaced the mask, and segments would be wrong; switch that tool off "
            "(parallelism_config without cp), or use model.set_attn_implementation('sdpa')"
        )


def check_cache(mode: str, cache: Any) -> None:
    """A cache of keys that grows with the tokens, or a HiCICache in mode "hici"; None."""
    if cache is None:
        return
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, which attention mode {mode!r} does not know; pass "
            f"{USE_DYNAMIC} or nothing"
        )
    if isinstance(cache, HiCICache) and mode != HICI:
        raise ValueError(
            f"a HiCICache in attention mode {mode!r}, which has no slots; pass {USE_DYNAMIC}, or call "
            "model.set_attn_implementation('hici')"
        )
    if isinstance(cache, QuantizedCache):
        raise ValueError(
            f"a quantized cache in attention mode {mode!r}, which needs the keys as they are; {_instead(mode)}"
        )
    if cache.is_compileable and cache.layers:
        raise ValueError(
            f"a static cache ({type(cache).__name__}) in attention mode {mode!r}: its unused places would be "
            f"summarised as tokens; {_instead(mode)}"
        )


def check_cache_implementation(mode: str, name: str | None) -> None:
    """`cache_implementation` of model.generate."""
    kind = "quantized" if name == "quantized" else "static" if name not in (None, "dynamic", "offloaded") else None
    if kind is not None:
        raise ValueError(
            f"cache_implementation={name!r} (a {kind} cache) in attention mode {mode!r}, which needs the keys of "
            f"{'the tokens as they are' if kind == 'quantized' else 'the tokens and nothing else'}; {_instead(mode)}"
        )


def _instead(mode: str) -> str:
    bounded = "hici.HiCICache(model) (memory that does not grow; visibility 'past')" if mode == HICI else None
    return "use " + ", ".join(filter(None, (bounded, USE_DYNAMIC))) + ", or model.set_attn_implementation('sdpa')"


def refuse_packed(mode: str, position_ids: Tensor, mask: Tensor | None, cache: Any) -> None:
    """Several documents in a row would share segments and slots."""
    if torch.compiler.is_compiling() or position_ids.dim() != 2 or position_ids.shape[1] < 2:
        return
    positions_BT = position_ids
    real_BT = torch.ones_like(positions_BT, dtype=torch.bool)
    if mask is not None and mask.dim() == 2:
        real_BT = mask[:, -positions_BT.shape[1] :].to(torch.bool)
        positions_BT = positions_BT.expand_as(real_BT)
    highest_so_far = torch.where(real_BT, positions_BT, -1).cummax(1).values
    restarts = real_BT[:, 1:] & (positions_BT[:, 1:] <= highest_so_far[:, :-1])
    if bool(restarts.any()):
        row, column = (int(x) for x in restarts.nonzero()[0])
        raise ValueError(
            f"position_ids restart at token {column + 1} of row {row} (packed documents), but attention mode {mode!r} "
            "counts segments over a whole row; give one document a row (padding is fine), or "
            "model.set_attn_implementation('sdpa')"
        )


def check_mask(mask: Tensor) -> Tensor:
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: HiCI's modes build their own causal mask; pass the "
            "[batch, tokens] mask of real tokens, or none"
        )
    return mask


def check_mask_length(mask_BX: Tensor, tokens: Tensor, cache: Any) -> None:
    if torch.compiler.is_compiling():  # lengths may be symbols there
        return
    length = tokens.shape[1] + (0 if cache is None else int(cache.get_seq_length()))
    if mask_BX.shape[1] != length:
        raise ValueError(
            f"attention_mask covers {mask_BX.shape[1]} tokens, but there are {length} with those in the cache; give "
            "one entry for each"
        )
