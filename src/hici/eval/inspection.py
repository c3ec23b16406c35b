"""Where attention goes: shares of global slots, local slots and tokens by layer and head, and how alike slots are.

Shapes: L layers, N segments, S tokens in a segment, M slots of one kind, H heads, D width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hici.attention import reference
from hici.core.segments import count_segments
from hici.eval.conditions import describe_condition, describe_model
from hici.eval.measure import Plan
from hici.eval.perplexity import check_stream, stream_sha256
from hici.eval.windows import disjoint_windows
from hici.models.lookup import HICI, attention_mode, attention_modules, get_causal_lm, get_decoder, hici_config
from hici.models.modes import leaks_future
from hici.models.observation import Observation, check_layers, observe_attention
from hici.rope import check_context

logger = logging.getLogger(__name__)

SHARES = ("global", "local", "tokens")  # they sum to 1
KINDS = ("global", "local")

_PROTOCOL = {
    "weights": "softmax weights of hici.attention.reference, in float32, of the model's own queries, keys and slots",
    "shares": "mean weight over the query tokens of all segments that have slots, and over windows",
    "shares_all_tokens": "the same over the query tokens of all segments",
    "by_segment": "the same over the query tokens of each segment and over heads",
    "first_token": "the part of tokens that the first token of the query's segment gets",
    "slot_similarity": "cosine of slot m of segment i and slot m of segment j, mean over slots and windows",
    "slot_likeness": "cosine of two different slots of one segment, mean over pairs, segments and windows",
    "layers": "numbered from 0, as in the weights' names; segments from 1",
}


def inspection_plan(
    model: Any,
    stream: np.ndarray,
    context: int,
    *,
    windows: int | None = 1,
    layers: Sequence[int] | None = None,
    allow_beyond_rope: bool = False,
    about: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
) -> Plan:
    """The measurement of attention shares and slot similarity (for `hici.eval.measure.measure`): a part is a window.

    Args:
        model: with HiCI attached, in attention mode "hici", with slots in use; also inside PEFT.
        stream: token ids, int64 [X]; see `hici.data.stream.load_stream`.
        context: tokens of a window.
        windows: that many, evenly spaced; None: all of the stream.
        layers: numbers of the layers to look at; None: all.
        about, data: what the result says of the model and of where the stream is from.

    Raises:
        ValueError: a model in another mode or without slots; a context that gives no segment any slots, or is beyond
            the rope; a stream shorter than a window, or with other ids than the model's; no such layer. From
            measuring: weights that are not finite.
    """
    _check_model(model, context)
    if not allow_beyond_rope:
        check_context(get_causal_lm(model).config, context)
    check_stream(stream, get_causal_lm(model).config.vocab_size)
    chosen = disjoint_windows(len(stream), context, max_windows=windows)
    numbers = check_layers(len(attention_modules(model)), layers)
    starts = {f"window at token {start}": start for start in chosen.starts}
    condition = describe_condition(model, context)
    if leaks_future(model):
        logger.warning("visibility %r: the slots that a token sees summarise its own future", condition["visibility"])
    return Plan(
        task="inspect",
        protocol={
            "name": "inspect",
            "context": context,
            "windows": {"starts": chosen.starts, "available": chosen.available},
            "layers": numbers,
            **_PROTOCOL,
        },
        model=describe_model(model, [HICI], about),
        data={**(data or {}), "tokens": len(stream), "sha256": stream_sha256(stream)},
        seed=None,
        parts=list(starts),
        measure_part=lambda name: _inspect(model, stream[starts[name] : starts[name] + context], numbers),
        summarise=lambda values: {"conditions": [{**condition, **_summary(list(values.values()), condition, numbers)}]},
    )


def _check_model(model: Any, context: int) -> None:
    config = hici_config(model)
    mode = attention_mode(model)
    if mode != HICI:
        raise ValueError(
            f"attention {mode!r} has no slots to look at; call set_attention(model, 'hici') (hici.models.modes) first"
        )
    if config.slots_in_use == 0:
        raise ValueError(
            "use_global=False and use_local=False leave tokens alone, so there are no shares to measure; switch one on "
            "with hici.reconfigure (on the command line drop --no-slots)"
        )
    size = config.resolve_segment_size(context)
    if config.visibility == "past" and count_segments(context, size) == 1:
        raise ValueError(
            f"context {context} is one segment of {size} tokens, and with visibility 'past' the first segment has no "
            f"slots; give a context of more than {size}, or smaller segments"
        )


@torch.inference_mode()
def _inspect(model: Any, tokens: np.ndarray, layers: Sequence[int]) -> dict[str, Any]:
    """One window: shares {kind: [L][N][H]}, similarity and likeness {kind: [L]...}."""
    found: list[dict[str, Any]] = []
    use_global, num_global = hici_config(model).use_global, hici_config(model).num_global_slots

    def look(seen: Observation) -> None:
        shares = reference.shares(
            seen.q_BTHE, seen.k_BTJE, seen.slot_k_BNPJE, segment_size=seen.segment_size, scale=seen.scale
        )
        if not bool(shares.tokens_BNH.isfinite().all()):
            raise ValueError(
                f"attention weights of layer {seen.layer} are not finite; a model with sound weights gives finite "
                "ones: check the weights, or compute in float32 (--dtype float32)"
            )
        split = num_global if use_global else 0
        slots = {"global": _one_text(seen.global_BNKD), "local": _one_text(seen.local_BNMD)}
        found.append(
            {
                "global": shares.slots_BNHP[0, ..., :split].sum(-1).tolist(),
                "local": shares.slots_BNHP[0, ..., split:].sum(-1).tolist(),
                "tokens": shares.tokens_BNH[0].tolist(),
                "first_token": shares.first_token_BNH[0].tolist(),
                "similarity": {kind: slot_similarity(slots[kind]).tolist() for kind in KINDS},
                "likeness": {kind: slot_likeness(slots[kind]) for kind in KINDS},
            }
        )

    was_training = model.training
    model.eval()
    try:
        ids = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64))[None]
        with observe_attention(model, look, layers):
            get_decoder(model)(input_ids=ids.to(get_decoder(model).device), use_cache=False)
    finally:
        model.train(was_training)
    value: dict[str, Any] = {name: [each[name] for each in found] for name in (*SHARES, "first_token")}
    for name in ("similarity", "likeness"):
        value[name] = {kind: [each[name][kind] for each in found] for kind in KINDS}
    return value


def _one_text(slots_BNMD: Tensor | None) -> Tensor:
    """[N, M, D] in float64 of a batch of one text; [0, 1, 1] where there are no slots."""
    return torch.zeros(0, 1, 1, dtype=torch.float64) if slots_BNMD is None else slots_BNMD[0].cpu().double()


def slot_similarity(slots_NMD: Tensor) -> Tensor:
    """Cosine of slot m of segment i and slot m of segment j, mean over slots: [N, N]."""
    unit_NMD = F.normalize(slots_NMD, dim=-1)
    return torch.einsum("imd,jmd->ij", unit_NMD, unit_NMD) / slots_NMD.shape[1]


def slot_likeness(slots_NMD: Tensor) -> float | None:
    """Mean cosine of two different slots of one segment: 1 says that all slots of a segment have become one.

    None: no segments, or one slot a segment.
    """
    segments, slots, _ = slots_NMD.shape
    if segments == 0 or slots == 1:
        return None
    unit_NMD = F.normalize(slots_NMD, dim=-1)
    cosines_NMM = unit_NMD @ unit_NMD.mT
    own_N = cosines_NMM.diagonal(dim1=-2, dim2=-1).sum(-1)
    return ((cosines_NMM.sum((-2, -1)) - own_N) / (slots * (slots - 1))).mean().item()


def _summary(values: list[dict[str, Any]], condition: dict[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The numbers of a condition: means over windows."""
    shares_WLNH = {name: np.array([value[name] for value in values]) for name in (*SHARES, "first_token")}
    sizes_N = _segment_sizes(condition)
    slotted_N = sizes_N * (np.arange(len(sizes_N)) >= (condition["visibility"] == "past"))
    # every window has the same segments, so their mean is a mean over all tokens
    by_head = {name: np.average(each, axis=2, weights=slotted_N) for name, each in shares_WLNH.items()}
    everywhere = {name: np.average(each, axis=2, weights=sizes_N) for name, each in shares_WLNH.items()}
    return {
        "layers": len(layers),
        "layer_numbers": list(layers),
        "segment_tokens": sizes_N.tolist(),
        "shares": {name: by_head[name].mean(0).tolist() for name in SHARES},
        "shares_all_tokens": {name: everywhere[name].mean(0).tolist() for name in SHARES},
        "first_token": by_head["first_token"].mean(0).tolist(),
        "by_segment": {name: each.mean((0, 3)).tolist() for name, each in shares_WLNH.items()},
        "by_window": {name: each.mean((1, 2)).tolist() for name, each in by_head.items()},
        "slot_similarity": {kind: _mean([value["similarity"][kind] for value in values]) for kind in KINDS},
        "slot_likeness": {kind: _mean([value["likeness"][kind] for value in values]) for kind in KINDS},
    }


def _segment_sizes(condition: dict[str, Any]) -> np.ndarray:
    """Query tokens of each segment; the last may be short."""
    size, context = condition["segment_size"], condition["context"]
    return np.diff([*range(0, context, size), context])


def _mean(values: list[Any]) -> Any:
    """Over windows, of nested lists of one shape; None stays."""
    if isinstance(values[0], list):
        return [_mean(list(each)) for each in zip(*values, strict=True)]
    return None if values[0] is None else math.fsum(values) / len(values)
