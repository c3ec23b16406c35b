"""How HiCI enters a model: pre-hooks that make slots, and the registered attention functions and mask.

No class is swapped and no forward is copied. A pre-hook on each attention module turns its input into slot keys and
values and adds them to the call's keyword arguments; transformers passes those on to the attention function that is
registered under the model's attention mode. In any other mode the hooks do nothing: the stock model, bit for bit.

Shapes: B batch, T tokens, X cached and new tokens, N segments, P slots, H query heads, J key/value heads,
E head dimension, D width.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from hici.attention import raw, s2
from hici.config import HiCIConfig
from hici.core.broadcast import build_slots
from hici.core.segments import put_tokens, real_first, real_positions, take_tokens, to_segments
from hici.models.architectures.base import Architecture
from hici.models.cache import HiCICache
from hici.models.cache_layer import HiCILayer
from hici.models.cache_reader import check_window
from hici.models.generation_cache import cache_of_call
from hici.models.lookup import HICI, MODES, S2
from hici.models.refusals import check_cache, check_call, check_mask, check_mask_length, refuse_packed

logger = logging.getLogger(__name__)


class Prefix(NamedTuple):
    """What the attention pre-hook hands to the attention function.

    Attributes:
        segment_size: S of this call.
        slot_k, slot_v: [B, N', P, J, E] of the last N' segments, or None.
        order: [B, T], compaction of a padded batch (`core.segments.real_first`), or None.
        raw: attend over the raw keys of the cache instead (decode).
        layer: a HiCICache's layer, which attends instead.
        anchor: an exact zero that ties unused parameters into the graph, or None.
    """

    segment_size: int
    slot_k: Tensor | None = None
    slot_v: Tensor | None = None
    order: Tensor | None = None
    raw: bool = False
    layer: HiCILayer | None = None
    anchor: Tensor | None = None


def attention_pre_hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On each attention module, in the modes of this library: make the slots and pass them on."""
    mode = module.config._attn_implementation
    if mode not in MODES:
        return None
    config: HiCIConfig = module.hici_config
    if "hici_num_segments" in kwargs:
        # of this call alone (the drop-in draws it). It comes with the arguments, since a checkpointed layer runs again
        # with the same arguments, whatever has changed on the model since
        kwargs = dict(kwargs)
        config = config.replace(num_segments=kwargs.pop("hici_num_segments"))
    hidden_BTD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    cache = kwargs.get(module.hici_architecture.cache_argument)
    if isinstance(cache, HiCICache):
        assert cache.step is not None  # the decoder's hook
        layer = cache.layers[module.layer_idx]
        layer.construct(module, hidden_BTD, cache.step)
        return args, {**kwargs, "hici": Prefix(segment_size=cache.step.segment_size, layer=layer)}
    if cache is not None and cache.get_seq_length(module.layer_idx) > 0:
        return args, {**kwargs, "hici": Prefix(segment_size=0, raw=True)}
    length = hidden_BTD.shape[1]
    segment_size = config.resolve_segment_size(length)
    if mode == HICI:
        # one short segment needs no filling up to S (in S2 the half group counts: S must stay)
        segment_size = min(segment_size, length)
    mask_BT = kwargs.get("attention_mask")
    order_BT = None if mask_BT is None else real_first(check_mask(mask_BT))
    prefix = Prefix(segment_size=segment_size, order=order_BT)
    if mode == HICI:
        prefix = _make_slots(module, config, hidden_BTD, mask_BT, prefix)
    else:
        prefix = prefix._replace(anchor=_zero(module.local_constructor, module.global_integrator))
    return args, {**kwargs, "hici": prefix}


def _make_slots(module: Any, config: HiCIConfig, hidden_BTD: Tensor, mask_BT: Tensor | None, prefix: Prefix) -> Prefix:
    length, segment_size = hidden_BTD.shape[1], prefix.segment_size
    real_BNS = None
    if prefix.order is not None and mask_BT is not None:
        hidden_BTD = take_tokens(hidden_BTD, prefix.order)
        n = -(-length // segment_size)
        real_BNS = real_positions(mask_BT.sum(1, keepdim=True), n, segment_size, hidden_BTD.device)
    elif length % segment_size:
        real_BNS = real_positions(length, -(-length // segment_size), segment_size, hidden_BTD.device)
    slots_BNPD = build_slots(
        to_segments(hidden_BTD, segment_size),
        real_BNS,
        module.local_constructor,
        module.global_integrator,
        visibility=config.visibility,
        use_global=config.use_global,
        use_local=config.use_local,
    )
    if slots_BNPD is None:
        return prefix._replace(anchor=_zero(module.local_constructor, module.global_integrator))
    architecture: Architecture = module.hici_architecture
    n = slots_BNPD.shape[1]
    # one row of slots: kernels of quantised layers take [batch, tokens, width] only
    keys, values = architecture.slot_keys_values(module, slots_BNPD.flatten(1, 2))
    slot_k, slot_v = (x.unflatten(1, (n, -1)) for x in (keys, values))
    anchor = None if config.use_global else _zero(module.global_integrator)
    return prefix._replace(slot_k=slot_k, slot_v=slot_v, anchor=anchor)


def _zero(*modules: nn.Module) -> Tensor | None:
    """An exact zero that depends on every trainable parameter: DDP wants all of them in every step."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad and p.numel()]
    if not (parameters and torch.is_grad_enabled()):
        return None
    return torch.stack([(p.flatten()[:1] * 0).float().sum() for p in parameters]).sum()


def hici_attention(
    module: Any,
    query_BHTE: Tensor,
    key_BJXE: Tensor,
    value_BJXE: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    hici: Prefix | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered as "hici" and "hici_s2": ([B, T, H, E], None)."""
    mode = module.config._attn_implementation
    check_call(mode, hici, kwargs)
    assert hici is not None  # check_call
    assert hici.raw or key_BJXE.shape[2] == query_BHTE.shape[2]  # else the pre-hook has overlooked a filled cache
    # under autocast RoPE leaves queries and keys in float32 and values in bfloat16: the one place that casts
    dtype = value_BJXE.dtype
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (query_BHTE, key_BJXE, value_BJXE))
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    if hici.raw:
        out = raw.attend(q, k, v, _optional_mask(attention_mask), scale=scale, window=sliding_window, dropout=dropout)
        return out, None
    if hici.layer is not None:
        return hici.layer.attend(module, q, k, v, scale=scale, dropout=dropout), None
    check_window(sliding_window, min(hici.segment_size, q.shape[1]))
    if hici.order is not None:
        q, k, v = (take_tokens(x, hici.order) for x in (q, k, v))
    if mode == S2:
        out = s2.attend(q, k, v, segment_size=hici.segment_size, scale=scale, dropout=dropout)
    else:
        slot_k, slot_v = (None if s is None else s.to(dtype) for s in (hici.slot_k, hici.slot_v))
        out = module.hici_attend(q, k, v, slot_k, slot_v, segment_size=hici.segment_size, scale=scale, dropout=dropout)
    if hici.order is not None:
        out = put_tokens(out, hici.order)
    if hici.anchor is not None:
        out = out + hici.anchor.to(dtype)
    return out, None


def hici_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask registered for both modes: which keys are real, bool [B, X]; None where all are."""
    if attention_mask is None:
        return None
    real_BX = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    if not torch.compiler.is_compiling() and bool(real_BX.all()):
        return None
    return real_BX


def decoder_pre_hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On the decoder: refuse what these modes cannot do, and number left-padded rows from their first real token.

    Slots carry no RoPE, so scores depend on absolute positions, and transformers numbers from the first pad.
    Positions that the caller passes are kept.
    """
    if module.config._attn_implementation not in MODES:
        return None
    if args:  # their order is another one in other architectures
        kwargs = {**dict(zip(module.hici_attached.arguments, args, strict=False)), **kwargs}
    mode = module.config._attn_implementation
    if kwargs.get("output_attentions") or module.config.output_attentions:
        raise ValueError(
            f"output_attentions=True, but attention mode {mode!r} makes no attention matrix; drop it, or call "
            "model.set_attn_implementation('eager')"
        )
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    if tokens.shape[1] == 0:
        raise ValueError(
            "the input has no tokens; give at least one (to go on with a cache, give all tokens so far and the new "
            "ones, or the new ones with an attention_mask that covers all)"
        )
    if kwargs.get("past_key_values") is None:
        kwargs["past_key_values"] = cache_of_call(module, mode, kwargs.get("use_cache"))
    cache = kwargs["past_key_values"]
    check_cache(mode, cache)
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            f"attention_mask is a {type(mask).__name__}, but attention mode {mode!r} builds its own causal mask; pass "
            "the [batch, tokens] mask of real tokens, or none"
        )
    if mask is not None:
        check_mask(mask)
        check_mask_length(mask, tokens, cache)
    if positions is not None:
        refuse_packed(mode, positions, mask, cache)
    derived = None
    if isinstance(cache, HiCICache):
        derived = cache.begin(module, tokens, mask)
    else:
        if not torch.compiler.is_compiling() and cache is not None and cache.get_seq_length() > 0:
            _tell_raw_decode(module, mode, tokens)
        if mask is not None:
            derived = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    if positions is None and derived is not None:
        kwargs["position_ids"] = derived
    return (), kwargs


def decoder_post_hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """On the decoder: the call has gone through all of it."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, HiCICache):
        cache.end()


def _tell_raw_decode(module: Any, mode: str, tokens: Tensor) -> None:
    """Once a model: decoding is expected to be so; a block of tokens may be a prefill in pieces, which is not."""
    if module.hici_attached.told_raw_decode:
        return
    module.hici_attached.told_raw_decode = True
    logger.log(
        logging.WARNING if tokens.shape[1] > 1 else logging.INFO,
        "attention mode %r with a filled cache: new tokens attend to all raw keys, without segments and slots (to "
        "read a prompt with slots, give it whole, without prefill_chunk_size)",
        mode,
    )


def _optional_mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else check_mask(mask)


for _mode in MODES:
    AttentionInterface.register(_mode, hici_attention)
    AttentionMaskInterface.register(_mode, hici_mask)
