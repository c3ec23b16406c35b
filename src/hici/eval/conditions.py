"""Under which attention a number was measured: what stands beside it in every result, table and picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hici.core.segments import count_segments
from hici.data.encoder import tokenizer_fingerprint
from hici.eval.labels import NOT_CAUSAL, attention_label
from hici.models.fingerprint import weights_checksum
from hici.models.lookup import FULL, HICI, attention_mode, get_causal_lm, hici_config
from hici.models.modes import leaks_future, visibility_in_use

__all__ = ["NOT_CAUSAL", "attention_label", "describe_condition", "describe_model"]


def describe_condition(model: Any, context: int | None) -> dict[str, Any]:
    """The attention that `model` is in now, as JSON values.

    Returns:
        attention ("full", "hici", "hici_s2"); visibility (None: no slots in use); causal (False: a token sees a summary
        of its own future); segment_size and segments of `context` tokens (None in full attention); context (None: of
        any length, then segments is None too).
    """
    mode = attention_mode(model)
    size = segments = None
    if mode != FULL:
        config = hici_config(model)
        size = config.segment_size
        if context is not None:
            size = min(config.resolve_segment_size(context), context)
            segments = count_segments(context, size)
    return {
        "attention": mode,
        "visibility": visibility_in_use(model),
        "causal": not leaks_future(model),
        "segment_size": size,
        "segments": segments,
        "context": context,
    }


def describe_model(
    model: Any, attentions: Sequence[str], about: dict[str, Any] | None, tokenizer: Any = None
) -> dict[str, Any]:
    """`about`, and what tells this model from every other one, so that no result of another is taken over.

    An `about` that has a weights_checksum (that of the command line) says all of it already. `tokenizer`: where numbers
    depend on it beyond the data's tokens (prompts, chat templates, answers as text).
    """
    if about is not None and "weights_checksum" in about:
        return about
    lm = get_causal_lm(model)
    config = None if all(attention == FULL for attention in attentions) else hici_config(model)
    slots = config is not None and HICI in attentions and bool(config.slots_in_use)
    own = {} if tokenizer is None else {"tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)}
    return own | {
        "weights_checksum": weights_checksum(model, hici_modules=slots),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": lm.device.type,
        "hici": None if config is None else config.to_dict(),
        "rope_parameters": dict(lm.config.rope_parameters),
        "end_token_id": lm.generation_config.eos_token_id,
        **(about or {}),
    }
